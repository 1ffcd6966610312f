"""Schedules: the learning rate of each step of a training."""

from tfm_ref.validation import check_size


def noam_lr(step: int, *, d_model: int, warmup: int = 4000, factor: float = 1.0) -> float:
    """Give the learning rate of a step: it rises in a line, then falls as ``1/√step``.

    ``lr = factor · d_model^-0.5 · min(step^-0.5, step · warmup^-1.5)``.

    Args:
        step: number of the step, from 1.
        d_model: width of the tokens.
        warmup: number of the step at the peak.
        factor: multiplies all rates.

    Raises:
        ValueError: if step, d_model or warmup is not an integer of at least 1.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 5.3, equation (3), which
        has no factor. The name is that of tensor2tensor, after Noam Shazeer, one of the authors.

    Example:
        PyTorch counts steps from 0, and multiplies the optimizer's rate.

        >>> noam_lr(4000, d_model=512)
        0.0006987712429686843
        >>> import torch
        >>> optimizer = torch.optim.Adam(torch.nn.Linear(2, 2).parameters(), lr=1.0)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(
        ...     optimizer, lambda i: noam_lr(i + 1, d_model=512)
        ... )
        >>> scheduler.get_last_lr() == [noam_lr(1, d_model=512)]
        True
    """
    for name, size in {"step": step, "d_model": d_model, "warmup": warmup}.items():
        check_size(name, size)
    return factor * d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)
