"""Whole models: encoder, decoder and encoder-decoder, each built as its config says."""

from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from tfm_ref.cache import KVCache, StackCache
from tfm_ref.config import TransformerConfig
from tfm_ref.embedding import Embedding, Head
from tfm_ref.stack import Stack


class LanguageModel(nn.Module):
    """Put one stack between an embedding and a head; :class:`Encoder` and :class:`DecoderLM`.

    Args:
        config: the choices.

    Raises:
        ValueError: if the config describes another kind of model.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if config.n_encoder_layers:
            raise ValueError(
                f"{type(self).__name__} has one stack; got n_encoder_layers = "
                f"{config.n_encoder_layers}: use EncoderDecoder"
            )
        self.config = config
        self.embedding = Embedding(config)
        self.stack = Stack(config)
        self.head = Head(config)
        self.tie()

    def tie(self) -> None:
        """Let the head share its matrix with the embedding, if the config says so."""
        if self.config.tied_embeddings:
            self.head.proj.weight = self.embedding.tokens.weight

    def forward(
        self,
        tokens: Integer[Tensor, "b n"],
        *,
        segments: Integer[Tensor, "#b n"] | None = None,
        mask: Bool[Tensor, "#b #h #n #t"] | None = None,
        positions: Integer[Tensor, "#b n"] | None = None,
        cache: StackCache | None = None,
    ) -> Float[Tensor, "b n w"]:
        """Give a logit for every token of the vocabulary, at every position.

        Args:
            tokens: numbers of the tokens; with a cache, of the new ones.
            segments: number of the part in which each token stands.
            mask: True = may attend; see :mod:`tfm_ref.masks`.
            positions: position of each token; if not given 0, 1, 2, ... or, with a cache, those
                that follow.
            cache: remembers the tokens, and lets later ones see them; see
                :meth:`DecoderLM.new_cache`.

        Raises:
            ValueError: if tokens, segments, mask, positions or cache do not fit.
        """
        terms = {"segments": segments, "mask": mask, "positions": positions, "cache": cache}
        return self.head(self.encode(tokens, **terms))

    def encode(self, tokens: Integer[Tensor, "b n"], **terms) -> Float[Tensor, "b n d"]:
        """Give a vector for every token, as it reaches the head; arguments as of ``forward``."""
        return self.stack(self.embedding(tokens, terms.pop("segments", None)), **terms)

    def hidden_states(
        self, tokens: Integer[Tensor, "b n"], **terms
    ) -> list[Float[Tensor, "b n d"]]:
        """Give the vectors before the first block and after each; arguments as of ``forward``."""
        x = self.embedding(tokens, terms.pop("segments", None))
        return list(self.stack.states(x, **terms))


class Encoder(LanguageModel):
    """Read a whole sequence at once: every token sees every other.

    With ``mask=prefix_mask(...)`` it is a prefix language model.

    Args:
        config: the choices, with ``is_causal=False``.

    Raises:
        ValueError: if the config is causal, or has an encoder beside it.

    Reference:
        Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language
        Understanding".

    Example:
        >>> import torch
        >>> config = TransformerConfig(
        ...     vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=16, is_causal=False
        ... )
        >>> Encoder(config)(torch.tensor([[3, 1, 4]])).shape
        torch.Size([1, 3, 10])
    """

    def __init__(self, config: TransformerConfig) -> None:
        if config.is_causal:
            raise ValueError("an Encoder needs is_causal = False; got True: use DecoderLM")
        super().__init__(config)
        self.pooler = nn.Linear(config.d_model, config.d_model) if config.pooler else None

    def pool(self, tokens: Integer[Tensor, "b n"], **terms) -> Float[Tensor, "b d"]:
        """Give one vector per sequence: the first token's; arguments as of ``forward``.

        ``tanh(x_0 W)`` with a pooler, else x_0.
        """
        first = self.encode(tokens, **terms)[:, 0]
        return first if self.pooler is None else self.pooler(first).tanh()


class DecoderLM(LanguageModel):
    """Continue a sequence: every token sees only what stands before it.

    Args:
        config: the choices, with ``is_causal=True`` and without an encoder.

    Raises:
        ValueError: if the config is not causal, or has an encoder beside it.

    Reference:
        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2).

    Example:
        >>> import torch
        >>> config = TransformerConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=16)
        >>> model, tokens = DecoderLM(config), torch.tensor([[3, 1, 4]])
        >>> torch.allclose(model(tokens)[:, :2], model(tokens[:, :2]), atol=1e-6)
        True
    """

    def __init__(self, config: TransformerConfig) -> None:
        if not config.is_causal:
            raise ValueError("a DecoderLM needs is_causal = True; got False: use Encoder")
        super().__init__(config)

    def new_cache(self, max_len: int, *, rolling: bool = True) -> StackCache:
        """Make a cache with room for ``max_len`` tokens of each sequence.

        Args:
            max_len: number of tokens.
            rolling: let layers with a window remember no more than it needs. Else they remember
                all, and one can go back to any length.

        Raises:
            ValueError: if max_len is not an integer of at least 1.
        """
        make = self.config.new_cache if rolling else lambda layer, max_len: KVCache(max_len)
        layers = [make(layer, max_len) for layer in range(self.config.n_layers)]
        return StackCache(layers, max_len)


class EncoderDecoder(nn.Module):
    """Read one sequence and write another: a decoder that also looks at an encoder's vectors.

    Both share one embedding.

    Args:
        config: the choices, with ``n_encoder_layers`` of at least 1.

    Raises:
        ValueError: if the config has no encoder.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.1.

    Example:
        >>> import torch
        >>> config = TransformerConfig(
        ...     vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=16, n_encoder_layers=1
        ... )
        >>> model = EncoderDecoder(config)
        >>> model(torch.tensor([[3, 1, 4]]), torch.tensor([[1, 5]])).shape
        torch.Size([1, 2, 10])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if not config.n_encoder_layers:
            raise ValueError("an EncoderDecoder needs n_encoder_layers of at least 1; got 0")
        self.config = config
        self.embedding = Embedding(config)
        self.encoder = Stack(config.encoder)
        self.decoder = Stack(config)
        self.head = Head(config)
        self.tie()

    tie = LanguageModel.tie

    def forward(
        self,
        source: Integer[Tensor, "b m"],
        target: Integer[Tensor, "b n"],
        *,
        source_mask: Bool[Tensor, "#b #h 1 #m"] | None = None,
        target_mask: Bool[Tensor, "#b #h #n #t"] | None = None,
        source_positions: Integer[Tensor, "#b m"] | None = None,
        target_positions: Integer[Tensor, "#b n"] | None = None,
    ) -> Float[Tensor, "b n w"]:
        """Give a logit for every token of the vocabulary, at every position of the target.

        Args:
            source: numbers of the tokens to read.
            target: numbers of the tokens written so far.
            source_mask: which tokens of the source may be seen, by both stacks: its padding.
            target_mask: True = may attend; joined with causality by AND.
            source_positions: position of each token of the source; 0, 1, 2, ... if not given.
            target_positions: position of each token of the target; 0, 1, 2, ... if not given.

        Raises:
            ValueError: if tokens, masks or positions do not fit.
        """
        return self.decode(
            target,
            self.encode(source, mask=source_mask, positions=source_positions),
            mask=target_mask,
            positions=target_positions,
            context_mask=source_mask,
        )

    def encode(self, source: Integer[Tensor, "b m"], **terms) -> Float[Tensor, "b m d"]:
        """Give a vector for every token of the source; terms as of :meth:`.Stack.forward`."""
        return self.encoder(self.embedding(source), **terms)

    def decode(
        self, target: Integer[Tensor, "b n"], context: Float[Tensor, "b m d"], **terms
    ) -> Float[Tensor, "b n w"]:
        """Give the logits, from the encoder's vectors; terms as of :meth:`.Stack.forward`."""
        return self.head(self.decoder(self.embedding(target), context, **terms))

    new_cache = DecoderLM.new_cache


Model = Encoder | DecoderLM | EncoderDecoder


def build(config: TransformerConfig) -> Model:
    """Build the model that a config describes.

    Example:
        >>> config = TransformerConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=16)
        >>> type(build(config)).__name__
        'DecoderLM'
    """
    if config.n_encoder_layers:
        return EncoderDecoder(config)
    return DecoderLM(config) if config.is_causal else Encoder(config)
