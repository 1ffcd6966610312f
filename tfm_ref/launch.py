"""What it takes to launch a kernel of ours: its module, and tensors that it can address."""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor


def kernels_for(q: Tensor, module: str) -> ModuleType:
    """Import a module of kernels, or say why they cannot compute with these queries.

    Args:
        q: the queries.
        module: name of the module within the package.

    Returns:
        The module.

    Raises:
        RuntimeError: if Triton is missing, has no GPU and does not interpret, or interprets
            bfloat16.
    """
    try:
        import triton
    except ImportError as error:
        raise RuntimeError(
            'the Triton kernels need Triton: pip install triton (Linux), or use backend "sdpa"'
        ) from error
    if q.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f'the Triton kernels need a GPU; got tensors on {q.device}. Use backend "sdpa", or '
            "set TRITON_INTERPRET=1 before Python starts: then they run on the CPU, slowly."
        )
    if triton.knobs.runtime.interpret and q.dtype == torch.bfloat16:
        raise RuntimeError(
            "Triton's interpreter multiplies bfloat16 wrongly; use float32, float16 or a GPU"
        )
    return import_module(f"tfm_ref.{module}")


def full_width(width: int) -> int:
    """Fill a width up to a power of two, and to the 16 that a product needs at least.

    Args:
        width: numbers in a row.

    Returns:
        Numbers in a row of a block.

    Example:
        >>> full_width(80)
        128
    """
    return max(16, 1 << (width - 1).bit_length())


def room(t: Tensor) -> Tensor:
    """Make room for a tensor of this shape, a token's heads side by side, as projections want."""
    b, h, n, k = t.shape
    return t.new_empty(b, n, h, k).transpose(1, 2)


def addressable(t: Tensor) -> Tensor:
    """Copy a tensor unless a descriptor can address it: steps of 16 bytes, rows without gaps."""
    unit = 16 // t.element_size()
    steps = all(step > 0 and step % unit == 0 for step in t.stride()[:3])
    fits = steps and t.stride(3) == 1 and t.data_ptr() % 16 == 0
    return t if fits else room(t).copy_(t)


def blocks(t: Tensor, rows: int) -> object:
    """Describe a tensor to the kernels, which read and write it in blocks of so many rows."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(
        t, list(t.shape), list(t.stride()), [1, 1, rows, full_width(t.shape[3])]
    )
