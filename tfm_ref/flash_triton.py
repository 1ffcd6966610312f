"""The Triton kernels of ``tfm_ref/flash_kernels.py`` as one more way to compute attention."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tfm_ref.attention_checks import check_qkv
from tfm_ref.launch import addressable, blocks, full_width, kernels_for, room
from tfm_ref.validation import check_dropout


class Configuration(NamedTuple):
    """How a kernel is cut: queries and keys of a block, warps of a program, loads under way."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


CONFIGURATIONS: dict[tuple[str, int], dict[int, list[Configuration]]] = {
    ("forward", 2): {
        64: [Configuration(128, 128, 8, 3), Configuration(128, 64, 8, 3)],
        128: [Configuration(128, 128, 8, 2), Configuration(128, 64, 8, 3)],
        256: [Configuration(128, 64, 8, 2)],
    },
    ("backward_q", 2): {
        64: [Configuration(128, 128, 8, 2), Configuration(128, 64, 8, 3)],
        128: [Configuration(128, 64, 8, 3), Configuration(128, 64, 8, 2)],
        256: [Configuration(128, 32, 8, 2)],
    },
    ("backward_kv", 2): {
        64: [Configuration(64, 128, 8, 2), Configuration(64, 64, 4, 2)],
        128: [Configuration(64, 128, 8, 2), Configuration(32, 128, 8, 2)],
        256: [Configuration(32, 64, 8, 2)],
    },
    ("row_dots", 2): {width: [Configuration(32, 32, 4, 1)] for width in (64, 128, 256)},
    ("forward", 4): {
        64: [Configuration(64, 32, 8, 2)],
        128: [Configuration(32, 32, 8, 2)],
        256: [Configuration(32, 16, 8, 1)],
    },
    ("backward_q", 4): {
        64: [Configuration(64, 32, 8, 2)],
        128: [Configuration(32, 32, 8, 2)],
        256: [Configuration(16, 16, 8, 1)],
    },
    ("backward_kv", 4): {
        64: [Configuration(32, 64, 8, 1)],
        128: [Configuration(32, 32, 8, 2)],
        256: [Configuration(16, 32, 8, 2)],
    },
    ("row_dots", 4): {width: [Configuration(32, 32, 4, 1)] for width in (64, 128, 256)},
}
"""By kernel, bytes of a number and width: what may be picked, the pick first. Chosen so that, in 16
bits, no number leaves the registers of a Hopper GPU (sm_90) when Triton 3.6 or 3.7 compiles it; in
32 bits, where the products need many more, as few as were found."""


def configurations(kernel: str, head_dim: int, dtype: torch.dtype) -> list[Configuration]:
    """List the ways in which a kernel may be cut, the one that is used first.

    Args:
        kernel: "forward", "row_dots", "backward_q" or "backward_kv".
        head_dim: width of one query; it is filled up to a power of two.
        dtype: of queries, keys and values.

    Returns:
        The configurations, at least one.

    Example:
        >>> configurations("forward", 128, torch.bfloat16)[0]
        Configuration(block_m=128, block_n=128, num_warps=8, num_stages=2)
    """
    return CONFIGURATIONS[kernel, dtype.itemsize][max(64, full_width(head_dim))]


def triton_attention(
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b g m k"],
    v: Float[Tensor, "b g m v"],
    *,
    mask: Bool[Tensor, "#b #h #n #m"] | None = None,
    is_causal: bool = False,
    bias: Float[Tensor, "#b #h #n #m"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b h n v"]:
    """Compute :func:`~tfm_ref.attention.scaled_dot_product_attention` with our Triton kernels.

    The n × m weights are never stored, in the backward pass neither: memory grows with n + m.

    Args:
        q: queries, of width up to 256, in float32, bfloat16 or float16.
        k: as of :func:`~tfm_ref.attention.attention_weights`; so are is_causal and scale.
        v: values, as wide as the keys.
        mask: refused; so are bias, softcap, sinks, and a dropout other than 0.

    Returns:
        Output of shape (batch, heads, len_q, v_head_dim), 0 for a query that may attend to
        nothing.

    Raises:
        ValueError: as :func:`~tfm_ref.attention.scaled_dot_product_attention`, and for all that
            the kernels cannot do: mask, bias, softcap, sinks, dropout, values of another width
            than the keys, a width above 256, float64.
        RuntimeError: if Triton is missing, or there is no GPU and ``TRITON_INTERPRET=1``, with
            which Triton runs on the CPU, was not set when it was imported; or if bfloat16 meets
            its interpreter, which multiplies it wrongly.

    Reference:
        Dao 2023, "FlashAttention-2: Faster Attention with Better Parallelism and Work
        Partitioning", algorithms 1 and 2. Where the paper adds to dQ from several programs, here
        a kernel of its own computes dQ, and one program sums dK and dV over the query heads that
        share a key head: the same input gives the same bits.

    Example:
        >>> q, k, v = torch.zeros(3, 1, 2, 5, 8)
        >>> triton_attention(q, k, v, softcap=30.0)
        Traceback (most recent call last):
        ValueError: the Triton kernels have no softcap; use backend "naive"
    """
    check_qkv(q, k, v)
    check_dropout(dropout)
    given = {"mask": mask, "bias": bias, "sinks": sinks, "softcap": softcap}
    given["dropout"] = dropout or None
    for name, term in given.items():
        if term is not None:
            other = "naive" if name == "softcap" else "sdpa"
            raise ValueError(f'the Triton kernels have no {name}; use backend "{other}"')
    width = q.shape[-1]
    if v.shape[-1] != width or width > 256:
        raise ValueError(
            "the Triton kernels need queries, keys and values of one width of at most 256; "
            f'got {width} and {v.shape[-1]}. Use backend "sdpa".'
        )
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            "the Triton kernels compute in float32, bfloat16 or float16; "
            f'got {q.dtype}. Use backend "sdpa".'
        )
    scale = width**-0.5 if scale is None else scale
    if scale <= 0:  # the kernels look for the largest score before they scale it
        q, scale = q * scale, 1.0
    # A row in memory must fill whole units of 16 bytes. Zeros change no product.
    spare = -width % (16 // q.element_size())
    q, k, v = (F.pad(t, (0, spare)) if spare else t for t in (q, k, v))
    return _attention(q, k, v, is_causal, scale)[0][..., :width]


@torch.library.custom_op("tfm_ref::flash_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel: give the output and, for the way back, the log2 of the sums."""
    o, lse = _outcome(q, k, v, is_causal, scale)
    q, k, v = map(addressable, (q, k, v))
    tensors = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "scale": scale}
    _launch("forward", tensors, is_causal)
    return o, lse


@_attention.register_fake
def _outcome(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Make room for the outcome."""
    return room(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("tfm_ref::flash_attention_backward", mutates_args=())
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernels."""
    dq, dk, dv = _gradients(do, q, k, v, o, lse, is_causal, scale)
    q, k, v, do = map(addressable, (q, k, v, do))
    tensors = {"q": q, "k": k, "v": v, "do": do, "lse": lse, "delta": torch.empty_like(lse)}
    _launch("row_dots", tensors | {"o": o}, is_causal)
    _launch("backward_kv", tensors | {"dk": dk, "dv": dv, "scale": scale}, is_causal)
    _launch("backward_q", tensors | {"dq": dq, "scale": scale}, is_causal)
    return dq, dk, dv


@_backward.register_fake
def _gradients(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make room for the gradients."""
    return room(q), room(k), room(v)


def _keep(ctx, inputs, output) -> None:
    """Keep what the way back needs: no weights, but the sum of each row."""
    q, k, v, ctx.is_causal, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx, do: Tensor, _) -> tuple[Tensor | None, ...]:
    """Hand the gradient of the output back to queries, keys and values."""
    return *_backward(do, *ctx.saved_tensors, ctx.is_causal, ctx.scale), None, None


_attention.register_autograd(_differentiate, setup_context=_keep)


def _launch(kernel: str, tensors: dict[str, Tensor | float], is_causal: bool) -> None:
    """Start a kernel: one program for each block of each head of what it makes."""
    q, k = tensors["q"], tensors["k"]
    (batch, n_heads, len_q, width), (_, n_kv_heads, len_k, _) = q.shape, k.shape
    program = getattr(kernels_for(q, "flash_kernels"), kernel)
    cut = configurations(kernel, width, q.dtype)[0]
    sizes = {"n_heads": n_heads, "group": n_heads // n_kv_heads, "len_q": len_q, "len_k": len_k}
    sizes |= {"CAUSAL": is_causal, "BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n}
    arguments = tensors | sizes | {"WIDTH": full_width(width)}
    for name in {"q", "o", "do", "dq"} & tensors.keys():
        arguments[name] = blocks(tensors[name], cut.block_m)
    for name in {"k", "v", "dk", "dv"} & tensors.keys():
        arguments[name] = blocks(tensors[name], cut.block_n)
    arguments = {name: arguments[name] for name in program.arg_names}
    if kernel == "backward_kv":
        n_programs = batch * n_kv_heads * -(-len_k // cut.block_n)
    else:
        n_programs = batch * n_heads * -(-len_q // cut.block_m)
    with torch.cuda.device_of(q):
        program[(n_programs,)](**arguments, num_warps=cut.num_warps, num_stages=cut.num_stages)
