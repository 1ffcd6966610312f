"""Masks: who may attend to whom.

Every mask of this package is a boolean tensor with the four axes (batch, heads, len_q, len_k).
True in row i and column j means that query i may attend to key j. An axis of size 1 is shared.
With all four axes always there, no mask can line up with the wrong axis by accident; combine
masks with ``&``.
"""

import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from tfm_ref.validation import check_positions, check_size


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
        ValueError: if a length is not an integer of at least 1.

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
    n_first: int = 0,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "1 1 n m"]:
    """Let each query see the last ``window`` positions, its own among them, and maybe the first.

    ``mask[i, j] = (j <= i') and (j > i' - window or j < n_first)`` with ``i' = i + len_k - len_q``.

    Args:
        len_q: number of queries.
        len_k: number of keys; len_q if not given.
        window: number of keys in sight.
        n_first: number of first keys that stay in sight: attention sinks.
        device: where to build the mask.

    Returns:
        Mask of shape (1, 1, len_q, len_k), True = may attend.

    Raises:
        ValueError: if a length or the window is not an integer of at least 1, or n_first of at
            least 0.

    Reference:
        Jiang et al. 2023, "Mistral 7B", section 2. Xiao et al. 2023, "Efficient Streaming
        Language Models with Attention Sinks", Figure 1 (d), whose window excludes the first keys.

    Example:
        >>> sliding_window_mask(3, window=2)[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
    """
    check_size("window", window)
    check_size("n_first", n_first, least=0)
    i, j = _positions(len_q, len_k, device)
    return ((j <= i) & ((j > i - window) | (j < n_first)))[None, None]


def chunked_mask(
    len_q: int,
    len_k: int | None = None,
    *,
    window: int,
    positions: Integer[Tensor, "#b m"] | None = None,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "#b 1 n m"]:
    """Cut the sequence into windows, and let each query see the past of its own window.

    ``mask[i, j] = (j <= i') and (p_j // window == p_i' // window)`` with
    ``i' = i + len_k - len_q``.

    Args:
        len_q: number of queries.
        len_k: number of keys; len_q if not given.
        window: number of positions in one window.
        positions: position p_j of each key in its sequence; j if not given. After padding on the
            left, they begin where the tokens do.
        device: where to build the mask.

    Returns:
        Mask of shape (1 or batch, 1, len_q, len_k), True = may attend.

    Raises:
        ValueError: if a length or the window is not an integer of at least 1, or positions are
            not integers of shape (batch or 1, len_k).

    Reference:
        Llama 4: ``create_chunked_attention_mask`` in ``models/llama4/model.py`` of
        meta-llama/llama-models.

    Example:
        >>> chunked_mask(4, window=2)[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 0, 1, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
    """
    check_size("window", window)
    i, j = _positions(len_q, len_k, device)
    positions = j[None] if positions is None else positions
    check_positions("positions", positions, (len(positions), len(j)))
    chunk = positions // window
    same = chunk[:, i.clamp(min=0)] == chunk[:, None]
    return ((j <= i) & same)[:, None]


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
        ValueError: if a length is not an integer of at least 1, or the prefix not an integer
            from 0 to len_k.

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
    check_size("prefix", prefix, least=0, most=j.numel())
    return ((j < prefix) | (j <= i))[None, None]


def padding_mask(
    lengths: Int[Tensor, " b"], len_k: int, *, side: str = "right"
) -> Bool[Tensor, "b 1 1 m"]:
    """Hide the keys that only pad a sequence to the length of its batch.

    ``mask[b, 0, 0, j] = (j < lengths[b])``, or ``(j >= len_k - lengths[b])`` if the padding
    stands on the left. Queries are never hidden: what a padded position computes is unused.
    The lengths are read to check them, so build this mask outside of a compiled region.

    Args:
        lengths: number of real tokens of each sequence, 0 to len_k.
        len_k: number of keys, padding included.
        side: where the padding stands, "right" or "left".

    Returns:
        Mask of shape (batch, 1, 1, len_k), True = may attend.

    Raises:
        ValueError: if lengths is not a vector of int32 or int64, if len_k is not an integer of at
            least 1, if a length lies outside 0 to len_k, or if side is neither "right" nor
            "left".

    Example:
        >>> padding_mask(torch.tensor([3, 1]), 3)[:, 0, 0].int()
        tensor([[1, 1, 1],
                [1, 0, 0]], dtype=torch.int32)
    """
    if lengths.ndim != 1 or lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            "lengths must be a vector of int32 or int64, one per sequence; "
            f"got {lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    check_size("len_k", len_k)
    if ((lengths < 0) | (lengths > len_k)).any():
        raise ValueError(f"lengths must lie between 0 and len_k ({len_k}); got {lengths.tolist()}")
    if side not in ("right", "left"):
        raise ValueError(f'side must be "right" or "left"; got "{side}"')
    j = torch.arange(len_k, device=lengths.device)
    real = j < lengths[:, None] if side == "right" else j >= len_k - lengths[:, None]
    return real[:, None, None, :]


def _positions(
    len_q: int, len_k: int | None, device: torch.device | str | None
) -> tuple[Int[Tensor, "n 1"], Int[Tensor, " m"]]:
    """Number queries and keys on one ruler on which the last query meets the last key."""
    len_k = len_q if len_k is None else len_k
    check_size("len_q", len_q)
    check_size("len_k", len_k)
    i = torch.arange(len_q, device=device)[:, None] + (len_k - len_q)
    return i, torch.arange(len_k, device=device)
