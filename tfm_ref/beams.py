"""Beam search: several texts are written at once, and those most probable so far are kept."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from tfm_ref.generation import Writer
from tfm_ref.models import DecoderLM, EncoderDecoder
from tfm_ref.validation import check_choice, check_size

PENALTIES = {
    "gnmt": lambda length, power: ((5 + length) / 6) ** power,
    "power": lambda length, power: length**power,
}
"""What beam search divides a sum of log-probabilities by, by name.

gnmt: Wu et al. 2016, equation (14), whose first tokens cost less; power: Hugging Face transformers.
"""


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
    n_beams: int = 4,
    length_penalty: float = 0.6,
    penalty: str = "gnmt",
    early_stopping: bool = False,
    **terms: object,
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
        model: as of :class:`~tfm_ref.generation.Writer`.
        prompt: as of :class:`~tfm_ref.generation.Writer`.
        n_beams: number of beams, and of hypotheses.
        length_penalty: the exponent α; 0 compares the sums themselves, more favours long texts.
        penalty: lp, a name in :data:`PENALTIES`: "gnmt" as above, or "power", length^α.
        early_stopping: be content with the first n_beams hypotheses. One beam is then greedy.
        **terms: as of :func:`~tfm_ref.generation.greedy`.

    Returns:
        Tokens, scores (float32 at least) and lengths of n_beams hypotheses for each prompt.

    Raises:
        ValueError: as :class:`~tfm_ref.generation.Writer`; if n_beams is not an integer from 1 to
            the number of texts that there are, vocab_size^max_new_tokens; if the length penalty
            is not finite, or lp unknown.

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
    writer = Writer(model, prompt, **terms)
    check_size("n_beams", n_beams)
    check_size("n_beams", n_beams, most=model.config.vocab_size**writer.max_new_tokens)
    check_choice("penalty", penalty, PENALTIES)
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be finite; got {length_penalty}")
    lengths = range(1, writer.max_new_tokens + 1)
    lp = [PENALTIES[penalty](length, length_penalty) for length in lengths]
    b, device = len(prompt), prompt.device
    sums = torch.zeros(b, 1, device=device)
    found = Hypotheses(
        tokens=torch.zeros(b, n_beams, 0, dtype=torch.long, device=device),
        scores=torch.full((b, n_beams), -math.inf, device=device),
        lengths=torch.zeros(b, n_beams, dtype=torch.long, device=device),
    )
    for t in range(writer.max_new_tokens):
        logits, s = writer.logits(), sums.shape[1]
        w, texts = logits.shape[-1], writer.new_tokens.unflatten(0, (b, s))
        all_sums = (logits.log_softmax(-1).unflatten(0, (b, s)) + sums[..., None]).flatten(1)
        best, order = _best(all_sums, n_beams + s * len(writer.stop))
        beams, tokens = order // w, order % w
        longer = torch.cat([_take(texts, beams), tokens[..., None]], -1)
        ends = torch.isin(tokens, writer.stop) | (t + 1 == writer.max_new_tokens)

        ended = best.where(ends, -math.inf)[:, :n_beams] / lp[t]
        scores, kept = _best(torch.cat([found.scores, ended], 1), n_beams)
        known = F.pad(found.tokens, (0, 1), value=writer.pad), longer[:, :n_beams]
        lengths = found.lengths, torch.full_like(ended, t + 1, dtype=torch.long)
        found = Hypotheses(
            _take(torch.cat(known, 1), kept), scores, _take(torch.cat(lengths, 1), kept)
        )

        sums, kept = _best(best.masked_fill(ends, -math.inf), n_beams)
        hope, worst = sums[:, :1] / max(lp[t + 1 :], default=1), scores[:, -1:]
        over = worst > -math.inf if early_stopping else hope <= worst
        sums = sums.masked_fill(over, -math.inf)
        if (sums == -math.inf).all():
            break
        rows = torch.arange(b, device=device)[:, None] * s + _take(beams, kept)
        writer.append(_take(tokens, kept).flatten(), rows.flatten())
    return found._replace(tokens=found.tokens[..., : found.lengths.max()])


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
