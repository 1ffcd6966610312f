"""Whole models: encoder, decoder and encoder-decoder, each built as its config says."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from tfm_ref.cache import KVCache, StackCache
from tfm_ref.config import TransformerConfig
from tfm_ref.layers import ACTIVATIONS
from tfm_ref.masks import chunked_mask, sliding_window_mask
from tfm_ref.validation import check_mask, check_token_ids


class Embedding(nn.Module):
    """Look up a vector for each token, and for the part of the input in which it stands.

    ``x = √d_model · tokens[t] + segments[s]``, the factor only with ``scale_embeddings``.

    Args:
        config: the choices.

    Example:
        >>> config = TransformerConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=16)
        >>> Embedding(config)(torch.tensor([[3, 1, 4]])).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        c = config
        self.scale = math.sqrt(c.d_model) if c.scale_embeddings else 1.0
        self.tokens = nn.Embedding(c.vocab_size, c.d_model)
        self.segments = nn.Embedding(c.n_segments, c.d_model) if c.n_segments else None
        for table in self.children():
            nn.init.normal_(table.weight, std=c.d_model**-0.5)

    def forward(
        self, tokens: Integer[Tensor, "b n"], segments: Integer[Tensor, "#b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Look the tokens up.

        Args:
            tokens: numbers of the tokens.
            segments: number of the part in which each stands; all 0 if not given.

        Raises:
            ValueError: if tokens or segments are not int64 or int32 of shape (batch, length), are
                empty, or are no numbers of the tables; or if there are segments without a table.
        """
        check_token_ids("tokens", tokens, self.tokens.num_embeddings)
        x = self.tokens(tokens)
        x = x if self.scale == 1 else self.scale * x
        if self.segments is None:
            if segments is not None:
                raise ValueError("segments need n_segments of at least 1; got 0")
            return x
        if segments is None:
            segments = torch.zeros_like(tokens[:1])
        check_token_ids("segments", segments, self.segments.num_embeddings)
        return x + self.segments(segments)


class Stack(nn.Module):
    """Put blocks on one another, with positions at their entrance and a norm at their exit.

    It is causal or not, and has cross-attention or not, as the config says: encoder and decoder
    differ in nothing else.

    Args:
        config: the choices.

    Example:
        >>> config = TransformerConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=16)
        >>> Stack(config)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = c = config
        self.positions, self.local_positions = c.new_positions(), None
        if c.local_rope_theta is not None:
            self.local_positions = c.new_positions(is_local=True)
        self.embedding_norm = c.new_norm(c.d_model) if c.embedding_norm else None
        self.blocks = nn.ModuleList(c.new_block(layer) for layer in range(c.n_layers))
        self.norm = None if c.norm_placement == "post" else c.new_norm(c.d_model)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b m d"] | None = None,
        *,
        mask: Bool[Tensor, "#b #h #n #t"] | None = None,
        positions: Integer[Tensor, "#b n"] | None = None,
        context_mask: Bool[Tensor, "#b #h #n #m"] | None = None,
        cache: StackCache | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Pass the tokens through all blocks.

        Args:
            x: embedded tokens.
            context: what the cross-attention reads, and only it.
            mask: True = may attend; joined by AND with causality and windows.
            positions: position of each token; if not given 0, 1, 2, ... or, with a cache, those
                that follow. After padding on the left, they begin where the tokens do.
            context_mask: of the cross-attention; True = may attend.
            cache: remembers the tokens of x behind those that it holds, and lets x see them.

        Returns:
            The changed tokens, shaped like x.

        Raises:
            ValueError: as :meth:`tfm_ref.layers.Block.forward`, if the positions do not fit, or
                if the stack is not causal and there is a cache.
        """
        terms = {"mask": mask, "positions": positions, "context_mask": context_mask}
        for state in self.states(x, context, **terms, cache=cache):
            x = state
        return x

    def states(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b m d"] | None = None,
        *,
        mask: Bool[Tensor, "#b #h #n #t"] | None = None,
        positions: Integer[Tensor, "#b n"] | None = None,
        context_mask: Bool[Tensor, "#b #h #n #m"] | None = None,
        cache: StackCache | None = None,
    ) -> Iterator[Float[Tensor, "b n d"]]:
        """Yield the tokens before the first block and after each; arguments as of ``forward``.

        What the last block gives is yielded after the norm at the exit, where there is one.
        """
        c = self.config
        if cache is not None:
            if not c.is_causal:
                raise ValueError("a cache needs is_causal = True: new tokens would change old ones")
            if cache.positions.length > cache.length:
                cache.truncate(cache.length)  # what a call that failed on its way has left
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + x.shape[1], device=x.device)[None]
        positions = all_positions = positions + c.first_position
        x = self.positions.embed(x, positions)
        if cache is not None:
            column = positions.expand(len(x), -1)[..., None]
            all_positions = cache.positions.append(column)[0][..., 0]
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        x = F.dropout(x, c.dropout) if self.training else x
        yield x
        terms = {
            is_local: self._terms(x, is_local, mask, positions, all_positions, columns)
            for is_local, columns in self._columns(x, cache).items()
        }
        for layer, block in enumerate(self.blocks):
            caches = None if cache is None else cache.layers[layer]
            terms_here = terms[c.is_local(layer)]
            x = block(x, context, context_mask=context_mask, caches=caches, **terms_here)
            if layer == c.n_layers - 1 and self.norm is not None:
                x = self.norm(x)
            yield x

    def _columns(self, x: Tensor, cache: StackCache | None) -> dict[bool, Tensor | None]:
        """Say for layers with a window, and for those without, which tokens x will find."""
        layers = {self.config.is_local(layer): layer for layer in range(self.config.n_layers)}
        if cache is None:
            return dict.fromkeys(layers)
        n, device = x.shape[1], x.device
        return {
            is_local: cache.layers[layer][0].columns(n, device=device)
            for is_local, layer in layers.items()
        }

    def _terms(
        self,
        x: Tensor,
        is_local: bool,
        mask: Tensor | None,
        positions: Tensor,
        all_positions: Tensor,
        columns: Tensor | None,
    ) -> dict:
        """Give what all layers of a kind, with window or without, tell their attention."""
        c, n, t = self.config, x.shape[1], all_positions.shape[1]
        if is_local:
            if mask is not None:
                check_mask(mask, x.new_empty(()).expand(len(x), c.n_heads, n, t))
            window = self._window(n, t, all_positions, columns)
            if window is not None:
                mask = window if mask is None else mask & window
            if columns is not None:
                all_positions = all_positions[:, columns]
                mask = None if mask is None else mask.expand(-1, -1, -1, t)[..., columns]
        terms = {"mask": mask, "is_causal": c.is_causal}
        if not is_local and c.query_scaling is not None:
            terms["query_scale"] = c.query_scaling(positions - c.first_position)
        if not (is_local or c.global_positions):
            return terms
        scheme = self.local_positions if is_local and self.local_positions else self.positions
        bias = scheme.bias(positions, all_positions)
        terms["bias"] = None if bias is None else bias.to(x.dtype)
        terms["rotation"] = scheme.rotation(positions)
        return terms

    def _window(
        self, n: int, t: int, all_positions: Tensor, columns: Tensor | None
    ) -> Tensor | None:
        """Make the mask of the window over all t tokens; None if it hides nothing."""
        c, device = self.config, all_positions.device
        if c.chunked:
            positions = all_positions - c.first_position
            return chunked_mask(n, t, window=c.window, positions=positions, device=device)
        if t <= c.window + c.n_first or (n == 1 and columns is not None):
            return None  # a cache that rolls has forgotten what the newest token must not see
        return sliding_window_mask(n, t, window=c.window, n_first=c.n_first, device=device)


class Head(nn.Module):
    """Score every token of the vocabulary as the next, or the missing, one.

    ``logits = x W``, with a projection, an activation and a norm before it if the config says
    ``head_transform``.

    Args:
        config: the choices.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = c = config
        self.transform = nn.Linear(c.d_model, c.d_model) if c.head_transform else None
        self.norm = c.new_norm(c.d_model) if c.head_transform else None
        self.proj = nn.Linear(c.d_model, c.vocab_size, bias=c.head_bias)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n w"]:
        """Give the logits."""
        c = self.config
        if self.transform is not None:
            x = self.norm(ACTIVATIONS[c.activation](self.transform(x)))
        logits = self.proj(x / math.sqrt(c.d_model) if c.scale_logits else x)
        if c.logit_softcap is not None:
            logits = c.logit_softcap * (logits / c.logit_softcap).tanh()
        return logits


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
        """Give a vector for every token of the source; terms as of :meth:`Stack.forward`."""
        return self.encoder(self.embedding(source), **terms)

    def decode(
        self, target: Integer[Tensor, "b n"], context: Float[Tensor, "b m d"], **terms
    ) -> Float[Tensor, "b n w"]:
        """Give the logits, from the encoder's vectors; terms as of :meth:`Stack.forward`."""
        return self.head(self.decoder(self.embedding(target), context, **terms))

    new_cache = DecoderLM.new_cache


def build(config: TransformerConfig) -> Encoder | DecoderLM | EncoderDecoder:
    """Build the model that a config describes.

    Example:
        >>> config = TransformerConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=16)
        >>> type(build(config)).__name__
        'DecoderLM'
    """
    if config.n_encoder_layers:
        return EncoderDecoder(config)
    return DecoderLM(config) if config.is_causal else Encoder(config)


def attention_maps(
    model: nn.Module, *args: object, **terms: object
) -> dict[str, Float[Tensor, "b h n m"]]:
    """Run a model, and give the weights of every attention in it.

    Each attention is asked with the very arguments that it got in the run: masks, windows,
    positions and context are those of its layer.

    Args:
        model: any module with attentions of this package inside.
        args: what the model is called with.
        terms: what the model is called with, by name.

    Returns:
        Weights by the name of the module, in the order of the run.

    Example:
        >>> config = TransformerConfig(vocab_size=10, d_model=8, n_layers=2, n_heads=2, d_ff=16)
        >>> maps = attention_maps(DecoderLM(config), torch.tensor([[3, 1, 4]]))
        >>> list(maps)
        ['stack.blocks.0.attention', 'stack.blocks.1.attention']
        >>> maps["stack.blocks.1.attention"][0, 0].triu(1).any()
        tensor(False)
    """
    maps = {}

    def record(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            maps[name] = module.attention_weights(*args, **kwargs)

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if hasattr(module, "attention_weights"):
                handle = module.register_forward_pre_hook(record(name), with_kwargs=True)
                hooks.callback(handle.remove)
        model(*args, **terms)
    return maps
