"""The distribution from which a token is drawn: temperature, top-k and top-p."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tfm_ref.validation import check_size


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
