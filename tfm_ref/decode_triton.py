"""Attention for decoding, by the Triton kernels of ``tfm_ref/decode_kernels.py``."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tfm_ref.attention_checks import check_qkv
from tfm_ref.launch import full_width, kernels_for
from tfm_ref.validation import check_size


class DecodeConfiguration(NamedTuple):
    """How the kernel is cut: rows of a tile, keys of a block, warps of a program, loads ahead."""

    rows: int
    block_n: int
    num_warps: int
    num_stages: int


DECODE_CONFIGURATIONS = {
    (2, 128): [DecodeConfiguration(rows, 64, 4, 3) for rows in (16, 32, 64)],
    (2, 256): [
        DecodeConfiguration(16, 32, 4, 3),
        DecodeConfiguration(64, 32, 8, 2),
    ],
    (2, 512): [DecodeConfiguration(rows, 32, 8, 2) for rows in (32, 64)],
    (4, 128): [DecodeConfiguration(16, 32, 4, 2)],
    (4, 256): [DecodeConfiguration(16, 16, 4, 2)],
    (4, 512): [DecodeConfiguration(16, 16, 8, 1)],
}
"""By bytes of a number and width of a value: what may be picked, by the rows of a tile, fewest
first. In 16 bits no number leaves the registers of a Hopper GPU (Triton 3.6 and 3.7)."""


def decode_attention(
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b g m k"],
    v: Float[Tensor, "b g m v"],
    *,
    lengths: Int[Tensor, " b"] | None = None,
    is_causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    n_splits: int | None = None,
) -> Float[Tensor, "b h n v"]:
    """Let a few new queries attend to all keys so far, reading each key and value once.

    ``output = softmax(scale * q kᵀ) v`` over the keys that each query sees. The keys of each
    head are cut into slices, for one program each, and their outputs joined by the sums of their
    softmax: ``output = Σ_s e^(lse_s - lse) output_s`` with ``lse = log Σ_s e^(lse_s)``. There is
    no backward pass.

    Args:
        q: queries of the newest tokens: 1 to 16 for each head, in float32, bfloat16 or float16.
        k: keys; with fewer heads than q, each key head serves as many query heads as it takes.
        v: values, of width up to 512. Where they are the beginning of the keys in memory,
            ``k[..., :v_head_dim]``, as the latents of MLA in its absorbed form, they are read
            with the keys.
        lengths: number of keys of each sequence, at most len_k: those that follow are not read.
            All of them if not given.
        is_causal: let a query see no later key; the last query sees the last key of its sequence.
        window: number of keys that a query sees: its own, if causal, or else the last, and those
            before it. All of them if not given.
        scale: factor of the dot products; 1/√head_dim if not given.
        n_splits: slices per key head; if not given, as many as keep the GPU busy.

    Returns:
        Output of shape (batch, heads, len_q, v_head_dim), 0 for a query that sees nothing.

    Raises:
        ValueError: if q, k and v do not fit together, if len_q, v_head_dim, head_dim, window or
            n_splits is out of range, the dtype is another, or lengths is not one integer for each
            sequence on the device of q.
        RuntimeError: as :func:`~tfm_ref.flash_triton.triton_attention`, or if a tensor asks for a
            gradient.

    Reference:
        Dao, Haziza, Massa, Sizov 2023, "Flash-Decoding for long-context inference" (slices of the
        keys). Shazeer 2019, "Fast Transformer Decoding: One Write-Head is All You Need" (why
        reading is what takes the time). DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.2 (the
        absorbed form).

    Example:
        >>> q, (k, v) = torch.zeros(1, 8, 17, 64), torch.zeros(2, 1, 2, 99, 64)
        >>> decode_attention(q, k, v)
        Traceback (most recent call last):
        ValueError: len_q must be an integer from 1 to 16; got 17
    """
    check_qkv(q, k, v)
    (batch, n_heads, len_q, head_dim), (n_kv_heads, len_k, v_head_dim) = q.shape, v.shape[1:]
    check_size("len_q", len_q, most=16)
    check_size("v_head_dim", v_head_dim, most=512)
    check_size("head_dim", head_dim, most=v_head_dim + 64)
    check_size("window", len_k if window is None else window)
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"the Triton kernels compute in float32, bfloat16 or float16; got {q.dtype}"
        )
    if lengths is not None and (lengths.shape != (batch,) or lengths.device != q.device):
        raise ValueError(
            f"lengths must have shape (batch,) = ({batch},) on {q.device}; "
            f"got {tuple(lengths.shape)} on {lengths.device}"
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise RuntimeError("decode_attention has no backward pass; call it under torch.no_grad()")
    cut = decode_configuration(v_head_dim, n_heads // n_kv_heads * len_q, q.dtype)
    if n_splits is None:
        n_splits = _enough(q, batch * n_kv_heads, -(-len_k // cut.block_n))
    check_size("n_splits", n_splits)
    scale = head_dim**-0.5 if scale is None else scale
    window = len_k if window is None else window
    return _decode(q, k, v, lengths, is_causal, window, scale, n_splits)


def decode_configuration(v_head_dim: int, n_rows: int, dtype: torch.dtype) -> DecodeConfiguration:
    """Pick how the kernel is cut.

    Args:
        v_head_dim: width of one value.
        n_rows: queries that share a key head, those of all tokens and heads.
        dtype: of queries, keys and values.

    Returns:
        The configuration with the smallest tile that has room for all rows, or else the largest.

    Example:
        >>> decode_configuration(128, 20, torch.bfloat16)
        DecodeConfiguration(rows=32, block_n=64, num_warps=4, num_stages=3)
    """
    width = max(128, full_width(v_head_dim))
    cuts = DECODE_CONFIGURATIONS[dtype.itemsize, width]
    return next((cut for cut in cuts if cut.rows >= n_rows), cuts[-1])


@torch.library.custom_op("tfm_ref::decode_attention", mutates_args=())
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    is_causal: bool,
    window: int,
    scale: float,
    n_splits: int,
) -> Tensor:
    """Run both kernels."""
    kernels = kernels_for(q, "decode_kernels")
    (batch, n_heads, len_q, head_dim), (n_kv_heads, len_k, v_head_dim) = q.shape, v.shape[1:]
    group = n_heads // n_kv_heads
    cut = decode_configuration(v_head_dim, group * len_q, q.dtype)
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    o = q.new_empty(batch, n_heads, len_q, v_head_dim)
    lse = q.new_empty(batch, n_heads, len_q, n_splits, dtype=torch.float32)
    part = q.new_empty(*lse.shape, v_head_dim, dtype=torch.float32)
    n_programs = n_splits * -(-group * len_q // cut.rows)
    with torch.cuda.device_of(q):
        kernels.attend_slice[(n_programs, n_kv_heads, batch)](
            *(q, k, v, lengths, part, lse, scale, len_q, len_k, n_splits, window, group * len_q),
            *(step for t in (q, k, v) for step in t.stride()[:3]),
            GROUP=group,
            CAUSAL=is_causal,
            SHARED=v.data_ptr() == k.data_ptr() and v.stride() == k.stride(),
            K=head_dim,
            V=v_head_dim,
            ROWS=cut.rows,
            BLOCK_N=cut.block_n,
            MAIN=full_width(v_head_dim),
            REST=full_width(max(head_dim - v_head_dim, 1)),
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
        )
        kernels.join_slices[(batch * n_heads * len_q,)](
            *(part, lse, o, n_splits), V=v_head_dim, WIDTH=full_width(v_head_dim), num_warps=4
        )
    return o


@_decode.register_fake
def _(q, k, v, lengths, is_causal, window, scale, n_splits):
    return q.new_empty(*q.shape[:3], v.shape[3])


def _enough(q: Tensor, n_kv_heads: int, n_blocks: int) -> int:
    """Give two programs to each processor of the GPU, but to each program a block at least."""
    on_gpu = q.device.type == "cuda"
    n = torch.cuda.get_device_properties(q.device).multi_processor_count if on_gpu else 4
    return max(1, min(-(-2 * n // n_kv_heads), n_blocks))
