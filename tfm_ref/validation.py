"""What is refused, and in which words: each message states the rule and the numbers."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def check_size(name: str, size: int, *, least: int = 1, most: int | None = None) -> None:
    """Refuse a size that is not an integer, too small, or too large.

    Args:
        name: what the message calls the size.
        size: the size to check.
        least: the smallest that is allowed.
        most: the largest that is allowed; no bound if not given.

    Raises:
        ValueError: if the size is not an integer from least to most.

    Example:
        >>> check_size("d_model", 0)
        Traceback (most recent call last):
        ValueError: d_model must be an integer of at least 1; got 0
    """
    if isinstance(size, float | bool) or size < least or (most is not None and size > most):
        bound = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be an integer {bound}; got {size}")


def check_choice(name: str, choice: str, choices: Iterable[str]) -> None:
    """Refuse a name that is not among those known.

    Args:
        name: what the message calls the setting.
        choice: the name to check.
        choices: the names that are known.

    Raises:
        ValueError: if the name is unknown.

    Example:
        >>> check_choice("score", "tanh", ["softmax", "sigmoid"])
        Traceback (most recent call last):
        ValueError: score must be one of softmax, sigmoid; got "tanh"
    """
    if choice not in choices:
        raise ValueError(f'{name} must be one of {", ".join(choices)}; got "{choice}"')


def check_same_kind(name: str, wanted: Tensor, other: str, t: Tensor) -> None:
    """Refuse another device, or another dtype where autocast does not bring them together.

    Args:
        name: what the message calls the first tensor.
        wanted: the tensor whose dtype and device are wanted.
        other: what the message calls the second tensor.
        t: the tensor to check.

    Raises:
        ValueError: if the devices or (autocast apart) the dtypes differ.

    Example:
        >>> check_same_kind("q", torch.zeros(2), "k", torch.zeros(2).double())
        Traceback (most recent call last):
        ValueError: q and k must have the same dtype and device; got torch.float32 on cpu and \
torch.float64 on cpu
    """
    mixed = t.dtype != wanted.dtype and not torch.is_autocast_enabled(t.device.type)
    if mixed or t.device != wanted.device:
        raise ValueError(
            f"{name} and {other} must have the same dtype and device; "
            f"got {wanted.dtype} on {wanted.device} and {t.dtype} on {t.device}"
        )


def check_dropout(dropout: float) -> None:
    """Refuse a dropout that is no probability, or that would leave nothing.

    Args:
        dropout: probability with which a number is set to 0.

    Raises:
        ValueError: if it does not lie in 0 ≤ dropout < 1.

    Example:
        >>> check_dropout(1.0)
        Traceback (most recent call last):
        ValueError: dropout must lie in 0 <= dropout < 1; got 1.0
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in 0 <= dropout < 1; got {dropout}")


def check_tokens(name: str, x: Tensor, weight: Tensor, *, axis: int = 1) -> None:
    """Refuse tokens that do not fit the layer.

    Args:
        name: what the message calls the tokens.
        x: the tokens to check.
        weight: a matrix of the layer, as ``nn.Linear`` stores it.
        axis: which of its axes is d_model: 1 if it is multiplied with tokens, 0 if it makes them.

    Raises:
        ValueError: if x has not the shape (batch, length, d_model), is empty, or has not the
            device or (autocast apart) the dtype of the layer.

    Example:
        >>> check_tokens("x", torch.zeros(4, 8), torch.zeros(8, 8))
        Traceback (most recent call last):
        ValueError: x must have shape (batch, length, d_model = 8) and not be empty; got (4, 8)
    """
    d_model = weight.shape[axis]
    if x.ndim != 3 or x.shape[2] != d_model or not x.numel():
        raise ValueError(
            f"{name} must have shape (batch, length, d_model = {d_model}) and not be empty; "
            f"got {tuple(x.shape)}"
        )
    check_same_kind("the layer", weight, name, x)


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


def check_softcap(softcap: float) -> None:
    """Refuse a softcap that is not above 0.

    Args:
        softcap: the bound that scores approach.

    Raises:
        ValueError: if it is not finite and above 0.

    Example:
        >>> check_softcap(0.0)
        Traceback (most recent call last):
        ValueError: softcap must be finite and above 0; got 0.0
    """
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be finite and above 0; got {softcap}")


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


def check_token_ids(name: str, tokens: Tensor, vocab_size: int) -> None:
    """Refuse what are not numbers of tokens.

    The numbers are read only where they are at hand: neither on the meta device nor in a graph
    that is being compiled.

    Args:
        name: what the message calls them.
        tokens: the numbers to check.
        vocab_size: number of tokens in the vocabulary.

    Raises:
        ValueError: if they are not int64 or int32 of shape (batch, length), are empty, or do not
            lie in 0 ≤ number < vocab_size.

    Example:
        >>> check_token_ids("tokens", torch.tensor([[3, 7]]), 5)
        Traceback (most recent call last):
        ValueError: tokens must lie in 0 <= number < vocab_size (5); got 3 to 7
    """
    if tokens.dtype not in (torch.int64, torch.int32) or tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(
            f"{name} must be int64 or int32 of shape (batch, length) and not be empty; "
            f"got {tokens.dtype} of shape {tuple(tokens.shape)}"
        )
    if tokens.is_meta or torch.compiler.is_compiling():
        return
    lowest, highest = (int(number) for number in tokens.aminmax())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"{name} must lie in 0 <= number < vocab_size ({vocab_size}); got {lowest} to {highest}"
        )


def check_positions(
    name: str, positions: Tensor, shape: tuple[int, int | None] | None = None
) -> None:
    """Refuse positions that are not integers, or that do not line up with the tokens.

    Args:
        name: what the message calls the positions.
        positions: the positions to check.
        shape: batch and length (any, if None) of what they are the positions of; any shape of
            two axes will do if not given. A batch of 1 goes with every batch.

    Raises:
        ValueError: if the positions are no integer tensor, have not two axes, are empty, or do
            not fit the shape.

    Example:
        >>> check_positions("positions", torch.arange(5))
        Traceback (most recent call last):
        ValueError: positions must be integers of shape (batch or 1, length); got torch.int64 of \
shape (5,). Write positions[None] for one row that all sequences share.
    """
    if positions.is_floating_point() or positions.dtype == torch.bool or positions.ndim != 2:
        raise ValueError(
            f"{name} must be integers of shape (batch or 1, length); got {positions.dtype} of "
            f"shape {tuple(positions.shape)}. "
            f"Write {name}[None] for one row that all sequences share."
        )
    if 0 in positions.shape:
        raise ValueError(f"{name} must not be empty; got shape {tuple(positions.shape)}")
    if shape is None:
        return
    batch, length = shape
    if positions.shape[0] not in (1, batch) or length not in (None, positions.shape[1]):
        tokens = f"batch {batch}" if length is None else f"batch {batch} and length {length}"
        raise ValueError(f"{name} must fit {tokens}; got shape {tuple(positions.shape)}")
