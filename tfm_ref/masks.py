"""Masks: who may attend to whom.

Every mask of this package is a boolean tensor with the four axes (batch, heads, len_q, len_k).
True in row i and column j means that query i may attend to key j. An axis of size 1 is shared.
With all four axes always there, no mask can line up with the wrong axis by accident; combine
masks with ``&``.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def causal_mask(
    len_q: int, len_k: int | None = None, *, device: torch.device | str | None = None
) -> Bool[Tensor, "1 1 n m"]:
    """Let each query see its own position and what stands before it.

    ``mask[i, j] = (j <= i + len_k - len_q)``: the last query is aligned with the last key
    (bottom right). That is the alignment of decoding, where the queries are the newest tokens
    and the keys include everything remembered. If len_q > len_k, the first len_q - len_k
    queries see nothing.

    Args:
        len_q: number of queries.
        len_k: number of keys; len_q if not given.
        device: where to build the mask.

    Returns:
        Mask of shape (1, 1, len_q, len_k), True = may attend.

    Raises:
        ValueError: if a length is below 1.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.2.3. PyTorch's ``is_causal``
        aligns the first query with the first key (top left) when the lengths differ.

    Example:
        >>> causal_mask(2, 3)[0, 0].int()
        tensor([[1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    i, j = _positions(len_q, len_k, device)
    return (j <= i)[None, None]


def sliding_window_mask(
    len_q: int,
    len_k: int | None = None,
    *,
    window: int,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "1 1 n m"]:
    """Let each query see the last ``window`` positions, its own among them.

    ``mask[i, j] = (i' - window < j <= i')`` with ``i' = i + len_k - len_q``.

    Args:
        len_q: number of queries.
        len_k: number of keys; len_q if not given.
        window: number of keys in sight.
        device: where to build the mask.

    Returns:
        Mask of shape (1, 1, len_q, len_k), True = may attend.

    Raises:
        ValueError: if a length or the window is below 1.

    Reference:
        Jiang et al. 2023, "Mistral 7B", section 2.

    Example:
        >>> sliding_window_mask(3, window=2)[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
    """
    if window < 1:
        raise ValueError(f"window must be at least 1; got {window}")
    i, j = _positions(len_q, len_k, device)
    return ((j <= i) & (j > i - window))[None, None]


def prefix_mask(
    len_q: int,
    len_k: int | None = None,
    *,
    prefix: int,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "1 1 n m"]:
    """Let every query see the first ``prefix`` keys, and beyond them only the past.

    ``mask[i, j] = (j < prefix) or (j <= i + len_k - len_q)``.

    Args:
        len_q: number of queries.
        len_k: number of keys; len_q if not given.
        prefix: number of keys that all queries see, 0 to len_k; 0 is the causal mask.
        device: where to build the mask.

    Returns:
        Mask of shape (1, 1, len_q, len_k), True = may attend.

    Raises:
        ValueError: if a length is below 1, or the prefix below 0 or above len_k.

    Reference:
        Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified
        Text-to-Text Transformer", section 3.2.1.

    Example:
        >>> prefix_mask(3, prefix=2)[0, 0].int()
        tensor([[1, 1, 0],
                [1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    i, j = _positions(len_q, len_k, device)
    if not 0 <= prefix <= j.numel():
        raise ValueError(f"prefix must lie between 0 and len_k ({j.numel()}); got {prefix}")
    return ((j < prefix) | (j <= i))[None, None]


def padding_mask(
    lengths: Int[Tensor, " b"], len_k: int, *, side: str = "right"
) -> Bool[Tensor, "b 1 1 m"]:
    """Hide the keys that only pad a sequence to the length of its batch.

    ``mask[b, 0, 0, j] = (j < lengths[b])``, or ``(j >= len_k - lengths[b])`` if the padding
    stands on the left. Queries are never hidden: what a padded position computes is unused.

    Args:
        lengths: number of real tokens of each sequence, 0 to len_k.
        len_k: number of keys, padding included.
        side: where the padding stands, "right" or "left".

    Returns:
        Mask of shape (batch, 1, 1, len_k), True = may attend.

    Raises:
        ValueError: if lengths is not a vector of integers, if len_k is below 1, if a length
            lies outside 0 to len_k, or if side is neither "right" nor "left".

    Example:
        >>> padding_mask(torch.tensor([3, 1]), 3)[:, 0, 0].int()
        tensor([[1, 1, 1],
                [1, 0, 0]], dtype=torch.int32)
    """
    if lengths.ndim != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            "lengths must be a vector of integers, one per sequence; "
            f"got {lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    if len_k < 1:
        raise ValueError(f"len_k must be at least 1; got {len_k}")
    if ((lengths < 0) | (lengths > len_k)).any():
        raise ValueError(f"lengths must lie between 0 and len_k ({len_k}); got {lengths.tolist()}")
    if side not in ("right", "left"):
        raise ValueError(f'side must be "right" or "left"; got "{side}"')
    j = torch.arange(len_k, device=lengths.device)
    real = j < lengths[:, None] if side == "right" else j >= len_k - lengths[:, None]
    return real[:, None, None, :]


def check_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> None:
    """Refuse a mask that is not boolean or does not line up with the scores axis by axis.

    Args:
        mask: the mask to check.
        shape: the shape (batch, heads, len_q, len_k) of the scores.

    Raises:
        ValueError: if the mask is not boolean, has not four axes, or an axis is neither 1 nor
            the full size.

    Example:
        >>> check_mask(torch.ones(4, 4, dtype=torch.bool), (4, 1, 4, 4))
        Traceback (most recent call last):
        ValueError: mask must have 4 axes (batch, heads, len_q, len_k), each of size 1 or that \
of the scores (4, 1, 4, 4); got (4, 4). Write mask[None, None] for one (len_q, len_k) mask, \
mask[:, None] for a (batch, len_q, len_k) mask, mask[:, None, None] for a (batch, len_k) mask.
    """
    if mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be boolean (True = may attend); got {mask.dtype}. "
            "An additive term goes through bias."
        )
    check_axes("mask", mask, shape)


def check_axes(name: str, term: Tensor, shape: tuple[int, int, int, int]) -> None:
    """Refuse a mask or bias whose axes do not line up one by one with those of the scores.

    Args:
        name: what the message calls the term.
        term: the tensor to check.
        shape: the shape (batch, heads, len_q, len_k) of the scores.

    Raises:
        ValueError: if the term has not four axes, or an axis is neither 1 nor the full size.
    """
    if term.ndim != 4 or any(t not in (1, s) for t, s in zip(term.shape, shape, strict=False)):
        raise ValueError(
            f"{name} must have 4 axes (batch, heads, len_q, len_k), each of size 1 or that of "
            f"the scores {shape}; got {tuple(term.shape)}. "
            f"Write {name}[None, None] for one (len_q, len_k) {name}, "
            f"{name}[:, None] for a (batch, len_q, len_k) {name}, "
            f"{name}[:, None, None] for a (batch, len_k) {name}."
        )


def _positions(
    len_q: int, len_k: int | None, device: torch.device | str | None
) -> tuple[Int[Tensor, "n 1"], Int[Tensor, " m"]]:
    """Number queries and keys on one ruler on which the last query meets the last key."""
    len_k = len_q if len_k is None else len_k
    if len_q < 1 or len_k < 1:
        raise ValueError(f"len_q and len_k must be at least 1; got {len_q} and {len_k}")
    i = torch.arange(len_q, device=device)[:, None] + (len_k - len_q)
    return i, torch.arange(len_k, device=device)
