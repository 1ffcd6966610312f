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
