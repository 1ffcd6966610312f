"""The loss of language models and translation: cross-entropy, smoothed."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

IGNORE = -100
"""Stands for a target that does not count, as in PyTorch."""


def label_smoothed_cross_entropy(
    logits: Float[Tensor, "b n w"],
    targets: Int[Tensor, "b n"],
    *,
    smoothing: float = 0.1,
    ignore_index: int = IGNORE,
) -> tuple[Float[Tensor, ""], int]:
    """Compare what a model expects with what came, and ask it never to be quite sure.

    Of a target t, the loss is the cross-entropy ``-Σ_k q_k log p_k`` to the distribution
    ``q = (1 - ε) onehot(t) + ε / K``, where K is the size of the vocabulary and ε the smoothing.
    The sum and the count are given apart: the mean over several parts of a batch, or over several
    processes, is the sum of the sums over the sum of the counts, and no mean of means.

    Args:
        logits: scores of the tokens, before the softmax.
        targets: number of the right token at each position.
        smoothing: share ε of the distribution that all tokens of the vocabulary have in common.
        ignore_index: the target at positions that do not count, such as padding. Their logits
            are not read, and their gradient is 0.

    Returns:
        The sum over the positions that count, in float32 at least, and their number. If none
        counts, both are 0.

    Raises:
        ValueError: if the shapes do not fit, smoothing does not lie in 0 ≤ smoothing ≤ 1, or a
            target is no number of the vocabulary; or if a logit is -inf: with smoothing, a token
            that is impossible makes the loss infinite.

    Reference:
        Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision", section
        7; Vaswani et al. 2017, "Attention Is All You Need", section 5.4. The same numbers as
        ``torch.nn.functional.cross_entropy(label_smoothing=ε, reduction="sum")``.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [5.0, 5.0]]])
        >>> label_smoothed_cross_entropy(logits, torch.tensor([[0, -100]]), smoothing=0.0)
        (tensor(0.1269), 1)
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            "targets must have the shape of the logits without its last axis, "
            f"{tuple(logits.shape[:-1])}; got {tuple(targets.shape)}"
        )
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must lie in 0 <= smoothing <= 1; got {smoothing}")
    counts = targets != ignore_index
    t, z = targets[counts], logits[counts]
    if ((t < 0) | (t >= z.shape[1])).any():
        raise ValueError(
            f"targets must be {ignore_index} or lie in 0 <= target < vocab_size ({z.shape[1]}); "
            f"got {t.min()} to {t.max()}"
        )
    log_p = z.to(torch.promote_types(z.dtype, torch.float32)).log_softmax(-1)
    total = -(1 - smoothing) * log_p.gather(1, t[:, None]).sum()
    if smoothing:
        total = total - smoothing * log_p.mean(1).sum()
        if not total.isfinite() and (z == -torch.inf).any():
            raise ValueError("logits must be finite where smoothing is above 0; got -inf")
    return total, len(t)
