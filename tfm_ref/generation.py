"""Generation: a trained model writes, token by token; which token comes next is a choice."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from tfm_ref.models import DecoderLM, EncoderDecoder
from tfm_ref.validation import check_choice, check_size, check_token_ids

PENALTIES = {
    "gnmt": lambda length, power: ((5 + length) / 6) ** power,
    "power": lambda length, power: length**power,
}
"""What beam search divides a sum of log-probabilities by, by name.

gnmt: Wu et al. 2016, equation (14), whose first tokens cost less; power: Hugging Face transformers.
"""


def greedy(
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
) -> Integer[Tensor, "b y"]:
    """Continue each prompt with the token that the model holds for the most probable, each time.

    ``token_t = argmax p(· | prompt, token_1 ... token_(t-1))``; of equals, the lowest number.

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

    Returns:
        The new tokens without the prompt, the stop token among them; int64, as many columns as
        the longest text needs.

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
        >>> model, prompt = build(config).eval(), torch.tensor([[3, 1], [7, 4]])
        >>> greedy(model, prompt, max_new_tokens=5).shape
        torch.Size([2, 5])
    """

    def pick(logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    return _continue(
        model,
        prompt,
        pick,
        max_new_tokens=max_new_tokens,
        prompt_mask=prompt_mask,
        source=source,
        source_mask=source_mask,
        stop=stop,
        pad=pad,
        use_cache=use_cache,
    )


def sample(
    model: DecoderLM | EncoderDecoder,
    prompt: Integer[Tensor, "b n"],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    prompt_mask: Bool[Tensor, "b n"] | None = None,
    source: Integer[Tensor, "b m"] | None = None,
    source_mask: Bool[Tensor, "b m"] | None = None,
    stop: int | Iterable[int] | None = None,
    pad: int | None = None,
    use_cache: bool = True,
) -> Integer[Tensor, "b y"]:
    """Continue each prompt with a token drawn at random, each time.

    ``token_t ~ sampling_probs(logits_t)``

    Args:
        model: as in :func:`greedy`.
        prompt: as in :func:`greedy`.
        max_new_tokens: as in :func:`greedy`.
        temperature: as in :func:`sampling_probs`.
        top_k: as in :func:`sampling_probs`.
        top_p: as in :func:`sampling_probs`.
        generator: the source of randomness, on the device of the model; PyTorch's own if not
            given. The same seed gives the same tokens to the same batch.
        prompt_mask: as in :func:`greedy`.
        source: as in :func:`greedy`.
        source_mask: as in :func:`greedy`.
        stop: as in :func:`greedy`.
        pad: as in :func:`greedy`.
        use_cache: as in :func:`greedy`.

    Returns:
        As :func:`greedy`.

    Raises:
        ValueError: as :func:`greedy` and :func:`sampling_probs`.

    Example:
        >>> from tfm_ref import TransformerConfig, build
        >>> config = TransformerConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=16)
        >>> model, prompt = build(config).eval(), torch.tensor([[3, 1], [7, 4]])
        >>> sample(model, prompt, max_new_tokens=5, temperature=0.7, top_p=0.9).shape
        torch.Size([2, 5])
    """

    def pick(logits: Tensor) -> Tensor:
        probs = sampling_probs(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        return torch.multinomial(probs, 1, generator=generator)[:, 0]

    return _continue(
        model,
        prompt,
        pick,
        max_new_tokens=max_new_tokens,
        prompt_mask=prompt_mask,
        source=source,
        source_mask=source_mask,
        stop=stop,
        pad=pad,
        use_cache=use_cache,
    )


def sampling_probs(
    logits: Float[Tensor, "... w"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Float[Tensor, "... w"]:
    """Give the distribution from which a token is drawn: temperature, then top-k, then top-p.

    ``softmax(top_p_filter(top_k_filter(logits / temperature)))``

    Args:
        logits: of all tokens.
        temperature: below 1 favours the probable, above 1 the improbable.
        top_k: number of tokens to draw from; all if not given.
        top_p: probability of the tokens to draw from; 1 is all.

    Returns:
        Probabilities, shaped like the logits.

    Raises:
        ValueError: if the temperature is not finite and above 0, or as :func:`top_k_filter` and
            :func:`top_p_filter`.

    Example:
        >>> sampling_probs(torch.tensor([0.0, 1.0, 2.0]), temperature=0.5, top_k=2)
        tensor([0.0000, 0.1192, 0.8808])
    """
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature must be finite and above 0; got {temperature}. At 0 nothing is left to "
            "chance: use greedy"
        )
    logits = logits / temperature
    logits = logits if top_k is None else top_k_filter(logits, top_k)
    return top_p_filter(logits, top_p).softmax(-1)


def top_k_filter(logits: Float[Tensor, "... w"], top_k: int) -> Float[Tensor, "... w"]:
    """Keep the ``top_k`` highest logits, and those equal to the last of them; the rest is -inf.

    Args:
        logits: of all tokens.
        top_k: number of logits to keep.

    Raises:
        ValueError: if top_k is not an integer from 1 to the size of the vocabulary.

    Reference:
        Fan et al. 2018, "Hierarchical Neural Story Generation", section 5.4.

    Example:
        >>> top_k_filter(torch.tensor([0.0, 1.0, 2.0]), 2)
        tensor([-inf, 1., 2.])
    """
    check_size("top_k", top_k, most=logits.shape[-1])
    return logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)


def top_p_filter(logits: Float[Tensor, "... w"], top_p: float) -> Float[Tensor, "... w"]:
    """Keep the fewest tokens whose probabilities sum to ``top_p`` or more; the rest is -inf.

    A token is kept if those more probable sum to less than top_p: the one that crosses it is the
    last. Of equals, the lower number counts as the more probable.

    Args:
        logits: of all tokens.
        top_p: the probability to keep; 1 keeps all.

    Raises:
        ValueError: if top_p does not lie in 0 < top_p ≤ 1.

    Reference:
        Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.

    Example:
        >>> top_p_filter(torch.tensor([0.5, 0.3, 0.2]).log(), 0.6).exp()
        tensor([0.5000, 0.3000, 0.0000])
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in 0 < top_p <= 1; got {top_p}")
    if top_p == 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(-1, torch.promote_types(ordered.dtype, torch.float32))
    before = F.pad(probs.cumsum(-1)[..., :-1], (1, 0))
    kept = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before < top_p)
    return logits.where(kept, -math.inf)


class Hypotheses(NamedTuple):
    """What beam search has found for each prompt, best first.

    Args:
        tokens: the new tokens, the stop token among them; after it, padding.
        scores: sum of the log-probabilities of the tokens, over the length penalty. -inf where
            there are fewer texts than beams; such a text has no tokens.
        lengths: number of tokens of each.
    """

    tokens: Integer[Tensor, "b s y"]
    scores: Float[Tensor, "b s"]
    lengths: Integer[Tensor, "b s"]


def beam_search(
    model: DecoderLM | EncoderDecoder,
    prompt: Integer[Tensor, "b n"],
    *,
    max_new_tokens: int,
    n_beams: int = 4,
    length_penalty: float = 0.6,
    penalty: str = "gnmt",
    early_stopping: bool = False,
    prompt_mask: Bool[Tensor, "b n"] | None = None,
    source: Integer[Tensor, "b m"] | None = None,
    source_mask: Bool[Tensor, "b m"] | None = None,
    stop: int | Iterable[int] | None = None,
    pad: int | None = None,
    use_cache: bool = True,
) -> Hypotheses:
    """Continue each prompt in several ways at once, and keep those that are most probable so far.

    ``score = Σ log p(token_t | ...) / lp(length)`` with ``lp(length) = ((5 + length) / 6)^α``;
    the length counts the new tokens, the stop token among them.

    Each step looks at every next token of every beam. Of the ``n_beams`` best texts, those that
    end (by a stop token, or since they are max_new_tokens long) are hypotheses; the ``n_beams``
    best of those that do not end are the next beams. Of equals, the text found earlier is the
    better, then that of the better beam, then that with the lower token.

    A prompt is done when none of its beams can enter its n_beams best hypotheses any more. A sum
    of log-probabilities never grows, so that the best that a beam can reach is its sum over the
    largest lp that lies ahead: stopping then changes nothing.

    Args:
        model: as in :func:`greedy`.
        prompt: as in :func:`greedy`.
        max_new_tokens: as in :func:`greedy`.
        n_beams: number of beams, and of hypotheses.
        length_penalty: the exponent α; 0 compares the sums themselves, more favours long texts.
        penalty: lp, a name in :data:`PENALTIES`: "gnmt" as above, or "power", length^α.
        early_stopping: be content with the first n_beams hypotheses. One beam is then greedy.
        prompt_mask: as in :func:`greedy`.
        source: as in :func:`greedy`.
        source_mask: as in :func:`greedy`.
        stop: as in :func:`greedy`.
        pad: as in :func:`greedy`.
        use_cache: as in :func:`greedy`.

    Returns:
        Tokens, scores (float32 at least) and lengths of n_beams hypotheses for each prompt.

    Raises:
        ValueError: as :func:`greedy`; if n_beams is not an integer from 1 to the number of texts
            that there are, vocab_size^max_new_tokens; if the length penalty is not finite, or
            lp unknown.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 6.1: 4 beams, α = 0.6,
        max_new_tokens = length of the source + 50. Wu et al. 2016, "Google's Neural Machine
        Translation System", section 7, equation (14); without its coverage penalty and without
        its pruning. ``penalty="power"`` finds what ``generate`` of Hugging Face transformers does
        with ``early_stopping="never"``, or with True; its default, False, supposes that the
        beams grow no longer and may stop too early.

    Example:
        >>> from tfm_ref import TransformerConfig, build
        >>> config = TransformerConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=16)
        >>> model, prompt = build(config).eval(), torch.tensor([[3, 1], [7, 4]])
        >>> tokens, scores, lengths = beam_search(model, prompt, max_new_tokens=5)
        >>> tokens.shape, scores.shape
        (torch.Size([2, 4, 5]), torch.Size([2, 4]))
    """
    check_size("max_new_tokens", max_new_tokens)
    check_size("n_beams", n_beams)
    check_size("n_beams", n_beams, most=model.config.vocab_size**max_new_tokens)
    check_choice("penalty", penalty, PENALTIES)
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be finite; got {length_penalty}")
    stop, pad = _ends(model, stop, pad, prompt.device)
    lp = [PENALTIES[penalty](length, length_penalty) for length in range(1, max_new_tokens + 1)]
    b, device = len(prompt), prompt.device
    texts = torch.zeros(b, 1, 0, dtype=torch.long, device=device)
    sums = torch.zeros(b, 1, device=device)
    found = Hypotheses(
        tokens=torch.zeros(b, n_beams, 0, dtype=torch.long, device=device),
        scores=torch.full((b, n_beams), -math.inf, device=device),
        lengths=torch.zeros(b, n_beams, dtype=torch.long, device=device),
    )

    def step(logits: Tensor) -> tuple[Tensor, Tensor, bool]:
        nonlocal texts, sums, found
        (_, s, t), w = texts.shape, logits.shape[-1]
        all_sums = (logits.log_softmax(-1).unflatten(0, (b, s)) + sums[..., None]).flatten(1)
        best, order = _best(all_sums, n_beams + s * len(stop))
        beams, tokens = order // w, order % w
        longer = torch.cat([_take(texts, beams), tokens[..., None]], -1)
        ends = torch.isin(tokens, stop) | (t + 1 == max_new_tokens)

        ended = best.where(ends, -math.inf)[:, :n_beams] / lp[t]
        scores, kept = _best(torch.cat([found.scores, ended], 1), n_beams)
        known = F.pad(found.tokens, (0, 1), value=pad), longer[:, :n_beams]
        lengths = found.lengths, torch.full_like(ended, t + 1, dtype=torch.long)
        found = Hypotheses(
            _take(torch.cat(known, 1), kept), scores, _take(torch.cat(lengths, 1), kept)
        )

        sums, kept = _best(best.masked_fill(ends, -math.inf), n_beams)
        texts, worst = _take(longer, kept), scores[:, -1:]
        hope = sums[:, :1] / max(lp[t + 1 :], default=1)
        over = worst > -math.inf if early_stopping else hope <= worst
        sums = sums.masked_fill(over, -math.inf)
        rows = torch.arange(b, device=device)[:, None] * s + _take(beams, kept)
        return rows.flatten(), texts[..., -1].flatten(), bool((sums == -math.inf).all())

    _write(
        model,
        prompt,
        step,
        max_new_tokens=max_new_tokens,
        prompt_mask=prompt_mask,
        source=source,
        source_mask=source_mask,
        use_cache=use_cache,
    )
    tokens, scores, lengths = (t.clone() for t in found)  # as any other tensors, for training too
    return Hypotheses(tokens[..., : lengths.max()], scores, lengths)


def _best(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Give the best scores of each row, in order, and where they stand; of equals, the first.

    As a stable sort would, without sorting all: ``topk`` alone leaves open which equals it takes.
    """
    number = min(number, scores.shape[1])
    least = scores.topk(number).values[:, -1:]
    better, equal = scores > least, scores == least
    free = number - better.sum(1, keepdim=True)
    places = (better | (equal & (equal.cumsum(1) <= free))).nonzero()[:, 1].view(-1, number)
    best, order = scores.gather(1, places).sort(dim=1, descending=True, stable=True)
    return best, places.gather(1, order)


def _take(t: Tensor, places: Tensor) -> Tensor:
    """Take the entries at these places of the second axis, row by row."""
    return t[torch.arange(len(t), device=t.device)[:, None], places]


def _continue(
    model: DecoderLM | EncoderDecoder,
    prompt: Tensor,
    pick: Callable[[Tensor], Tensor],
    *,
    stop: int | Iterable[int] | None,
    pad: int | None,
    **terms: object,
) -> Tensor:
    """Continue each prompt in one way, with the tokens that ``pick`` takes from the logits."""
    stop, pad = _ends(model, stop, pad, prompt.device)
    stopped, written = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device), []

    def step(logits: Tensor) -> tuple[None, Tensor, bool]:
        nonlocal stopped
        tokens = pick(logits)
        if len(stop):
            tokens = tokens.masked_fill(stopped, pad)
            stopped = stopped | torch.isin(tokens, stop)
        written.append(tokens)
        return None, tokens, len(stop) > 0 and bool(stopped.all())

    _write(model, prompt, step, **terms)
    return torch.stack(written, 1)


@torch.inference_mode()
def _write(
    model: DecoderLM | EncoderDecoder,
    prompt: Tensor,
    step: Callable[[Tensor], tuple[Tensor | None, Tensor, bool]],
    *,
    max_new_tokens: int,
    prompt_mask: Tensor | None,
    source: Tensor | None,
    source_mask: Tensor | None,
    use_cache: bool,
) -> None:
    """Run the model on what is written; ``step`` turns logits into what is written next.

    It gives the rows that are continued (None: each, once), their tokens, and if all is over.
    """
    _check_model(model, source, source_mask)
    check_size("max_new_tokens", max_new_tokens)
    tokens, real = prompt, _real_tokens(model, "prompt", prompt, prompt_mask)
    _check_prompt(model, real, max_new_tokens)
    stack, context, context_mask = model.stack if source is None else model.decoder, None, None
    if source is not None:
        seen = _real_tokens(model, "source", source, source_mask)
        if len(source) != len(prompt):
            raise ValueError(
                f"source and prompt must have the same batch; got {len(source)} and {len(prompt)}"
            )
        context_mask = None if seen.all() else seen[:, None, None]
        context = model.encode(source, mask=context_mask, positions=_positions(seen))
    is_padded = not real.all()  # else no mask is needed, and positions need not be counted
    cache = model.new_cache(prompt.shape[1] + max_new_tokens - 1) if use_cache else None
    for _ in range(max_new_tokens):
        known = 0 if cache is None else cache.length
        x = stack(
            model.embedding(tokens[:, known:]),
            context,
            mask=real[:, None, None] if is_padded else None,
            positions=_positions(real)[:, known:] if is_padded else None,
            context_mask=context_mask,
            cache=cache,
        )
        logits = model.head(x[:, -1:])[:, 0]
        rows, new, is_over = step(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        if is_over:
            return
        if rows is not None:
            tokens, real = tokens[rows], real[rows]
            if source is not None:
                context = context[rows]
                context_mask = None if context_mask is None else context_mask[rows]
            if cache is not None:
                cache.reorder(rows)
        tokens = torch.cat([tokens, new[:, None]], 1)
        real = F.pad(real, (0, 1), value=True) if is_padded else real


def _positions(real: Tensor) -> Tensor:
    """Count the real tokens from 0; what pads them on the left is 0, too."""
    return (real.cumsum(-1) - 1).clamp(min=0)


def _ends(
    model: DecoderLM | EncoderDecoder,
    stop: int | Iterable[int] | None,
    pad: int | None,
    device: torch.device,
) -> tuple[Tensor, int]:
    """Give the stop tokens as a tensor, and what fills a row after them."""
    stop = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
    pad = (stop or [0])[0] if pad is None else pad
    check_token_ids("stop and pad", torch.tensor([[*stop, pad]]), model.config.vocab_size)
    return torch.tensor(stop, dtype=torch.long, device=device), pad


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


def _real_tokens(
    model: DecoderLM | EncoderDecoder, name: str, tokens: Tensor, mask: Tensor | None
) -> Tensor:
    """Say which tokens are no padding; refuse tokens and masks that do not fit."""
    check_token_ids(name, tokens, model.config.vocab_size)
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
