"""Generation: a trained model writes, token by token; which token comes next is a choice."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from tfm_ref.models import DecoderLM, EncoderDecoder
from tfm_ref.sampling import sampling_probs
from tfm_ref.validation import check_size, check_token_ids


class Writer:
    """Hold what a model writes: ask what it expects next, and append what is chosen.

    :func:`greedy`, :func:`sample` and :func:`~tfm_ref.beams.beam_search` are loops around it.

    Prompts of different lengths are padded on the left, so that all are continued from the last
    column. Positions are counted from the first real token.

    Args:
        model: the model, in eval mode.
        prompt: numbers of the tokens to continue; of an encoder-decoder, what its target begins
            with.
        max_new_tokens: the most tokens to write.
        prompt_mask: True = real token, False = padding on the left; all real if not given.
        source: numbers of the tokens that an encoder-decoder reads.
        source_mask: True = real token, on whichever side the padding stands.
        stop: the token, or several, after each of which a text is over. Those in the prompt
            end nothing.
        pad: what fills the row after a stop token; the first of ``stop`` if not given.
        use_cache: remember keys and values instead of computing them anew for each token. The
            tokens are the same.

    Raises:
        ValueError: if the model is no decoder or in training mode, whose dropout would spoil the
            text; if it is an encoder-decoder without a source, or has a source or its mask and is
            none; if tokens, stop or pad are no numbers of the vocabulary; if a mask does not fit
            its tokens, has a row without a token, or (that of the prompt) pads on the right, or
            pads at all where a window keeps first tokens (n_first); if max_new_tokens is
            not an integer of at least 1, or a row exceeds the room of learned positions.

    Example:
        >>> from tfm_ref import TransformerConfig, build
        >>> config = TransformerConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=16)
        >>> prompt = torch.tensor([[3, 1], [7, 4]])
        >>> writer = Writer(build(config).eval(), prompt, max_new_tokens=5)
        >>> writer.append(writer.logits().argmax(-1))
        >>> writer.new_tokens.shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        model: DecoderLM | EncoderDecoder,
        prompt: Integer[Tensor, "b n"],
        *,
        max_new_tokens: int,
        prompt_mask: Bool[Tensor, "b n"] | None = None,
        source: Integer[Tensor, "b m"] | None = None,
        source_mask: Bool[Tensor, "b m"] | None = None,
        stop: int | Iterable[int] | None = None,
        pad: int | None = None,
        use_cache: bool = True,
    ) -> None:
        _check_model(model, source, source_mask)
        check_size("max_new_tokens", max_new_tokens)
        stop = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
        self.pad = (stop or [0])[0] if pad is None else pad
        vocab_size = model.config.vocab_size
        check_token_ids("stop and pad", torch.tensor([[*stop, self.pad]]), vocab_size)
        self.stop = torch.tensor(stop, dtype=torch.long, device=prompt.device)
        self.model, self.max_new_tokens = model, max_new_tokens
        self._real = _real_tokens("prompt", prompt, prompt_mask, vocab_size)
        _check_prompt(model, self._real, max_new_tokens)
        self._is_padded = not self._real.all()  # else neither mask nor positions are needed
        self._tokens, self._len_prompt = prompt, prompt.shape[1]
        self._stack = model.stack if source is None else model.decoder
        self._context = self._context_mask = None
        if source is not None:
            self._read(source, _real_tokens("source", source, source_mask, vocab_size))
        room = self._len_prompt + max_new_tokens - 1
        self._cache = model.new_cache(room) if use_cache else None

    @torch.inference_mode()
    def _read(self, source: Tensor, real: Tensor) -> None:
        """Encode the source, once."""
        if len(source) != len(self._tokens):
            raise ValueError(
                "source and prompt must have the same batch; "
                f"got {len(source)} and {len(self._tokens)}"
            )
        self._context_mask = mask = None if real.all() else real[:, None, None]
        self._context = self.model.encode(source, mask=mask, positions=_positions(real))

    @property
    def new_tokens(self) -> Integer[Tensor, "b y"]:
        """Give what is written so far, without the prompt."""
        return self._tokens[:, self._len_prompt :]

    @torch.inference_mode()
    def logits(self) -> Float[Tensor, "b w"]:
        """Ask the model for the logits of the next token, in float32 at least."""
        known = 0 if self._cache is None else self._cache.length
        x = self._stack(
            self.model.embedding(self._tokens[:, known:]),
            self._context,
            mask=self._real[:, None, None] if self._is_padded else None,
            positions=_positions(self._real)[:, known:] if self._is_padded else None,
            context_mask=self._context_mask,
            cache=self._cache,
        )
        logits = self.model.head(x[:, -1:])[:, 0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def append(self, tokens: Int[Tensor, " b"], rows: Int[Tensor, " b"] | None = None) -> None:
        """Write a token after each row.

        Args:
            tokens: the tokens.
            rows: the row that each continues, as beam search needs it; its own if not given.
        """
        if rows is not None:
            self._tokens, self._real = self._tokens[rows], self._real[rows]
            if self._context is not None:
                self._context = self._context[rows]
            if self._context_mask is not None:
                self._context_mask = self._context_mask[rows]
            if self._cache is not None:
                self._cache.reorder(rows)
        self._tokens = torch.cat([self._tokens, tokens[:, None]], 1)
        if self._is_padded:
            self._real = F.pad(self._real, (0, 1), value=True)


def greedy(
    model: DecoderLM | EncoderDecoder, prompt: Integer[Tensor, "b n"], **terms: object
) -> Integer[Tensor, "b y"]:
    """Continue each prompt with the token that the model holds for the most probable, each time.

    ``token_t = argmax p(· | prompt, token_1 ... token_(t-1))``; of equals, the lowest number.

    Args:
        model: as of :class:`Writer`.
        prompt: as of :class:`Writer`.
        **terms: the other arguments of :class:`Writer`: max_new_tokens, and maybe prompt_mask,
            source, source_mask, stop, pad, use_cache.

    Returns:
        The new tokens without the prompt, the stop token among them; int64, as many columns as
        the longest text needs.

    Raises:
        ValueError: as :class:`Writer`.

    Example:
        >>> from tfm_ref import TransformerConfig, build
        >>> config = TransformerConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=16)
        >>> model, prompt = build(config).eval(), torch.tensor([[3, 1], [7, 4]])
        >>> greedy(model, prompt, max_new_tokens=5).shape
        torch.Size([2, 5])
    """
    return _continue(Writer(model, prompt, **terms), lambda logits: logits.argmax(-1))


def sample(
    model: DecoderLM | EncoderDecoder,
    prompt: Integer[Tensor, "b n"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    **terms: object,
) -> Integer[Tensor, "b y"]:
    """Continue each prompt with a token drawn at random, each time.

    ``token_t ~ sampling_probs(logits_t)``

    Args:
        model: as of :class:`Writer`.
        prompt: as of :class:`Writer`.
        temperature: as of :func:`~tfm_ref.sampling.sampling_probs`; so are top_k and top_p.
        top_k: number of tokens to draw from; all if not given.
        top_p: probability of the tokens to draw from; 1 is all.
        generator: the source of randomness, on the device of the model; PyTorch's own if not
            given. The same seed gives the same tokens to the same batch.
        **terms: as of :func:`greedy`.

    Returns:
        As :func:`greedy`.

    Raises:
        ValueError: as :class:`Writer` and :func:`~tfm_ref.sampling.sampling_probs`.

    Example:
        >>> from tfm_ref import TransformerConfig, build
        >>> config = TransformerConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=16)
        >>> model, prompt = build(config).eval(), torch.tensor([[3, 1], [7, 4]])
        >>> sample(model, prompt, max_new_tokens=5, temperature=0.7, top_p=0.9).shape
        torch.Size([2, 5])
    """

    def draw(logits: Tensor) -> Tensor:
        probs = sampling_probs(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        return torch.multinomial(probs, 1, generator=generator)[:, 0]

    return _continue(Writer(model, prompt, **terms), draw)


def _continue(writer: Writer, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Continue each prompt in one way, with the tokens that are chosen by their logits."""
    stopped = torch.tensor(False, device=writer.stop.device)
    for _ in range(writer.max_new_tokens):
        tokens = choose(writer.logits()).masked_fill(stopped, writer.pad)
        writer.append(tokens)
        if len(writer.stop):
            stopped = stopped | torch.isin(tokens, writer.stop)
            if stopped.all():
                break
    return writer.new_tokens


def _positions(real: Tensor) -> Tensor:
    """Count the real tokens from 0; what pads them on the left is 0, too."""
    return (real.cumsum(-1) - 1).clamp(min=0)


def _check_model(
    model: DecoderLM | EncoderDecoder, source: Tensor | None, source_mask: Tensor | None
) -> None:
    """Refuse a model that does not write, that trains, or whose source is not there."""
    if not isinstance(model, DecoderLM | EncoderDecoder):
        raise ValueError(
            f"the model must be a DecoderLM or an EncoderDecoder; got {type(model).__name__}"
        )
    if any(module.training for module in model.modules()):
        raise ValueError(
            "the model must be in eval mode, since dropout would spoil the text; "
            "call model.eval() before, and model.train() after"
        )
    if isinstance(model, EncoderDecoder) != (source is not None):
        raise ValueError(
            "a source must be given if and only if the model is an EncoderDecoder; "
            f"got {type(model).__name__} {'without' if source is None else 'with'} a source"
        )
    if source is None and source_mask is not None:
        raise ValueError("a source_mask needs a source; got none")


def _real_tokens(name: str, tokens: Tensor, mask: Tensor | None, vocab_size: int) -> Tensor:
    """Say which tokens are no padding; refuse tokens and masks that do not fit."""
    check_token_ids(name, tokens, vocab_size)
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if mask.dtype != torch.bool or mask.shape != tokens.shape:
        raise ValueError(
            f"{name}_mask must be boolean (True = real token) and shaped like {name}, "
            f"{tuple(tokens.shape)}; got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"each row of {name} must have a real token; rows {empty} have none")
    return mask


def _check_prompt(model: DecoderLM | EncoderDecoder, real: Tensor, max_new_tokens: int) -> None:
    """Refuse a prompt whose padding would change what is written, or that is too long."""
    gaps = (real[:, :-1] & ~real[:, 1:]).any(1).nonzero().flatten().tolist()
    if gaps:
        raise ValueError(
            "prompts must be padded on the left, so that the last column is the last token of "
            f"each; rows {gaps} have padding after a token"
        )
    longest, c = int(real.sum(1).max()), model.config
    if c.n_first and not real.all():
        raise ValueError(
            f"n_first ({c.n_first}) needs prompts without padding, which would be what a window "
            f"keeps in sight; got {(~real).sum().item()} places of padding"
        )
    if c.positions == "learned" and longest + max_new_tokens - 1 > c.max_seq_len:
        raise ValueError(
            "the longest prompt and all new tokens but the last must fit into max_seq_len "
            f"({c.max_seq_len}); got {longest} and {max_new_tokens - 1}"
        )
