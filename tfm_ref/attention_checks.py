"""What attention refuses: queries, keys, values, masks and biases that do not fit together."""

import torch
from torch import Tensor

from tfm_ref.validation import check_same_kind


def check_qkv(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """Refuse queries, keys and values that do not fit together.

    Args:
        q: queries (batch, n_heads, len_q, head_dim).
        k: keys (batch, n_kv_heads, len_k, head_dim).
        v: values (batch, n_kv_heads, len_k, v_head_dim), where there are any.

    Raises:
        ValueError: if one has not four axes, is empty or not floating point, if dtype, device,
            batch, the width of q and k, or the heads or length of k and v differ, or if
            n_heads is no multiple of n_kv_heads.

    Example:
        >>> check_qkv(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 3, 5))
        Traceback (most recent call last):
        ValueError: q and k must have the same width; got 8 and 5
    """
    others = {"k": k} if v is None else {"k": k, "v": v}
    for name, t in {"q": q, **others}.items():
        if t.ndim != 4:
            raise ValueError(
                f"{name} must have 4 axes (batch, heads, length, width); got {tuple(t.shape)}"
            )
        if not t.numel():
            raise ValueError(f"{name} must not be empty; got shape {tuple(t.shape)}")
        if not t.is_floating_point():
            raise ValueError(f"{name} must be floating point; got {t.dtype}")
    b, h, _, width = q.shape
    for name, t in others.items():
        check_same_kind("q", q, name, t)
        batch, heads, _, _ = t.shape
        if batch != b:
            raise ValueError(f"q and {name} must have the same batch; got {b} and {batch}")
        if h % heads:
            raise ValueError(
                f"the heads of q ({h}) must be a multiple of the heads of {name} ({heads})"
            )
    _, g, m, k_width = k.shape
    if v is not None and g != heads:
        raise ValueError(f"k and v must have the same heads; got {g} and {heads}")
    if width != k_width:
        raise ValueError(f"q and k must have the same width; got {width} and {k_width}")
    if v is not None and m != v.shape[2]:
        raise ValueError(f"k and v must have the same length; got {m} and {v.shape[2]}")


def check_mask(mask: Tensor, scores: Tensor) -> None:
    """Refuse a mask that is not boolean or does not line up with the scores axis by axis.

    For every function that takes a mask.

    Args:
        mask: the mask to check.
        scores: the scores (batch, heads, len_q, len_k) that it is to act on.

    Raises:
        ValueError: if the mask is no boolean tensor, has not four axes, has an axis that is
            neither 1 nor the full size, or lies on another device.

    Example:
        >>> check_mask(torch.ones(4, 4).bool(), torch.zeros(4, 1, 4, 4))
        Traceback (most recent call last):
        ValueError: mask must have 4 axes (batch, heads, len_q, len_k), each of size 1 or that \
of the scores (4, 1, 4, 4); got (4, 4). Write mask[None, None] for one (len_q, len_k) mask, \
mask[:, None] for a (batch, len_q, len_k) mask, mask[:, None, None] for a (batch, len_k) mask.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ValueError(
            "mask must be a boolean tensor (True = may attend); "
            f"got {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}. "
            "An additive term goes through bias."
        )
    check_axes("mask", mask, scores)


def check_bias(bias: Tensor, scores: Tensor) -> None:
    """Refuse a bias that is no number to add to a score, or does not line up with the scores.

    Args:
        bias: the bias to check.
        scores: the scores (batch, heads, len_q, len_k) that it is to be added to.

    Raises:
        ValueError: if the bias is not floating point, or differs from the scores in device,
            (autocast apart) dtype, or an axis that is neither 1 nor the full size.

    Example:
        >>> check_bias(torch.ones(1, 1, 4, 4).bool(), torch.zeros(2, 8, 4, 4))
        Traceback (most recent call last):
        ValueError: bias must be floating point; got torch.bool. A boolean mask goes through mask.
    """
    if not bias.is_floating_point():
        raise ValueError(
            f"bias must be floating point; got {bias.dtype}. A boolean mask goes through mask."
        )
    check_same_kind("the scores", scores, "bias", bias)
    check_axes("bias", bias, scores)


def check_axes(name: str, term: Tensor, scores: Tensor) -> None:
    """Refuse a mask or bias whose axes do not line up one by one with those of the scores.

    Args:
        name: what the message calls the term.
        term: the tensor to check.
        scores: the scores (batch, heads, len_q, len_k) that it is to act on.

    Raises:
        ValueError: if the term has not four axes, has an axis that is neither 1 nor the full
            size, or lies on another device.

    Example:
        >>> check_axes("bias", torch.zeros(1, 1, 4, 4), torch.zeros(2, 8, 4, 4))
    """
    shape = tuple(scores.shape)
    if term.ndim != 4 or any(t not in (1, s) for t, s in zip(term.shape, shape, strict=False)):
        raise ValueError(
            f"{name} must have 4 axes (batch, heads, len_q, len_k), each of size 1 or that of "
            f"the scores {shape}; got {tuple(term.shape)}. "
            f"Write {name}[None, None] for one (len_q, len_k) {name}, "
            f"{name}[:, None] for a (batch, len_q, len_k) {name}, "
            f"{name}[:, None, None] for a (batch, len_k) {name}."
        )
    if term.device != scores.device:
        raise ValueError(
            f"{name} must be on the device of the scores ({scores.device}); got {term.device}"
        )


def check_sinks(sinks: Tensor, scores: Tensor) -> None:
    """Refuse sinks that are not one number per head.

    Args:
        sinks: the sinks to check.
        scores: the scores (batch, heads, len_q, len_k) that they stand beside.

    Raises:
        ValueError: if the sinks are no vector with one number per head, or differ from the
            scores in device or (autocast apart) dtype.

    Example:
        >>> check_sinks(torch.zeros(3), torch.zeros(2, 8, 4, 4))
        Traceback (most recent call last):
        ValueError: sinks must have shape (heads,) = (8,); got (3,)
    """
    if sinks.shape != scores.shape[1:2]:
        raise ValueError(
            f"sinks must have shape (heads,) = ({scores.shape[1]},); got {tuple(sinks.shape)}"
        )
    check_same_kind("the scores", scores, "sinks", sinks)


def check_terms(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Refuse what does not fit the scores of queries and keys, without computing any.

    Args:
        q: queries (batch, n_heads, len_q, head_dim).
        k: keys (batch, n_kv_heads, len_k, head_dim).
        mask: as of :func:`check_mask`.
        bias: as of :func:`check_bias`.
        sinks: as of :func:`check_sinks`.

    Raises:
        ValueError: as these.

    Example:
        >>> check_terms(torch.zeros(2, 8, 4, 16), torch.zeros(2, 8, 5, 16), sinks=torch.zeros(3))
        Traceback (most recent call last):
        ValueError: sinks must have shape (heads,) = (8,); got (3,)
    """
    scores = q.new_empty(()).expand(*q.shape[:3], k.shape[2])  # takes no memory
    for check, term in ((check_bias, bias), (check_mask, mask), (check_sinks, sinks)):
        if term is not None:
            check(term, scores)


def check_query_scale(query_scale: Tensor, q: Tensor) -> None:
    """Refuse what is not one factor for each query.

    Args:
        query_scale: the factors to check.
        q: queries (batch, n_heads, len_q, head_dim).

    Raises:
        ValueError: if the factors are not floating point of shape (batch or 1, len_q), or lie on
            another device than the queries.

    Example:
        >>> check_query_scale(torch.ones(4), torch.zeros(2, 8, 4, 16))
        Traceback (most recent call last):
        ValueError: query_scale must be floating point of shape (batch or 1, len_q) = (2 or 1, 4), \
on cpu; got torch.float32 of shape (4,) on cpu
    """
    b, _, n, _ = q.shape
    fits = query_scale.shape in ((1, n), (b, n)) and query_scale.device == q.device
    if not (fits and query_scale.is_floating_point()):
        raise ValueError(
            f"query_scale must be floating point of shape (batch or 1, len_q) = ({b} or 1, {n}), "
            f"on {q.device}; got {query_scale.dtype} of shape {tuple(query_scale.shape)} "
            f"on {query_scale.device}"
        )
