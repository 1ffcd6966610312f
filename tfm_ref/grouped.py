"""A linear layer for each group of rows, in one call where PyTorch has it."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def grouped_linear(
    x: Float[Tensor, "a d"],
    weight: Float[Tensor, "e f d"],
    bias: Float[Tensor, "e f"] | None = None,
    *,
    counts: Int[Tensor, " e"],
) -> Float[Tensor, "a f"]:
    """Give each group of neighbouring rows its own linear layer.

    Where PyTorch's grouped product takes the numbers, it is one call, and nobody has to wait for
    the counts; elsewhere it is one product per group that has rows.

    Args:
        x: rows, those of a group side by side.
        weight: matrix of each group, as ``nn.Linear`` stores it.
        bias: bias of each group.
        counts: number of rows of each group; their sum is that of all rows.

    Returns:
        ``x W + bias``, row by row with the matrix and the bias of its group.

    Reference:
        ``torch.nn.functional.grouped_mm``: of float32, bfloat16 and float16, with rows of a
        multiple of 16 bytes, on the CPU and on CUDA from compute capability 8.0 on. Autocast does
        not know it, and is obeyed here.

    Example:
        >>> x, weight = torch.ones(3, 4), torch.tensor([1.0, 5.0])[:, None, None].expand(2, 1, 4)
        >>> grouped_linear(x, weight, counts=torch.tensor([1, 2]))[:, 0]
        tensor([ 4., 20., 20.])
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    if _can_group(x, weight):
        y = F.grouped_mm(x, weight.mT, offs=counts.cumsum(0, dtype=torch.int32))
        return y if bias is None else y + bias.repeat_interleave(counts, 0, output_size=len(y))
    biases = [None] * len(weight) if bias is None else bias.unbind()
    groups = zip(x.split(counts.tolist()), weight.unbind(), biases, strict=True)
    return torch.cat([F.linear(rows, w, b) for rows, w, b in groups if len(rows)])


def _can_group(x: Tensor, weight: Tensor) -> bool:
    """Say whether PyTorch's grouped product takes these numbers."""
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    aligned = all(width * x.itemsize % 16 == 0 for width in weight.shape[1:])
    if x.device.type == "cuda":
        known = known and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return known and aligned and weight.is_contiguous() and x.device.type in ("cpu", "cuda")
