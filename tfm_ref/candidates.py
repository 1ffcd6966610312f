"""What is compared: ways to compute attention, and the sizes that they are given."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tfm_ref.attention import scaled_dot_product_attention
from tfm_ref.decode_triton import decode_attention
from tfm_ref.flash import tiled_attention
from tfm_ref.flash_triton import triton_attention
from tfm_ref.validation import check_choice

Attend = Callable[..., Tensor]


def pinned(*backends: SDPBackend) -> Attend:
    """Give PyTorch's attention, with its choice of a kernel narrowed down to these."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
        with sdpa_kernel(list(backends)):
            shared = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=shared)

    return attend


def flex(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
    """Give PyTorch's FlexAttention, compiled."""
    block_mask = _flex_causal(q.shape[2], k.shape[2], q.device) if is_causal else None
    shared = q.shape[1] != k.shape[1]
    return _flex_compiled()(q, k, v, block_mask=block_mask, enable_gqa=shared)


@cache
def _flex_compiled() -> Attend:
    return torch.compile(flex_attention, dynamic=False)


@cache
def _flex_causal(n: int, m: int, device: torch.device) -> BlockMask:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, n, m, device=device)


ATTENTIONS: dict[str, Attend] = {
    "naive": scaled_dot_product_attention,
    "math": pinned(SDPBackend.MATH),
    "efficient": pinned(SDPBackend.EFFICIENT_ATTENTION),
    "flash": pinned(SDPBackend.FLASH_ATTENTION),
    "cudnn": pinned(SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
    "tiled": tiled_attention,
    "triton": triton_attention,
}
"""What computes attention: the book's equation, PyTorch's kernels, the book's tiles and kernel."""


class Setting(NamedTuple):
    """Sizes of one attention; with ``latent``, so many first numbers of a key are its value, too.

    That is what the absorbed form of MLA attends to; else a value is as wide as a key.
    """

    batch: int
    n_heads: int
    n_kv_heads: int
    len_q: int
    len_k: int
    head_dim: int
    is_causal: bool
    dtype: str
    latent: int = 0

    def draw(self, device: torch.device | str) -> list[Tensor]:
        """Draw queries, keys and values, which want gradients; their errors need 32 bits or less.

        Raises:
            ValueError: if the dtype is another.
        """
        check_choice("dtype", self.dtype, ("float32", "float16", "bfloat16"))
        form = {"device": device, "dtype": getattr(torch, self.dtype), "requires_grad": True}
        width = self.head_dim
        q = torch.randn(self.batch, self.n_heads, self.len_q, width, **form)
        k, v = (torch.randn(self.batch, self.n_kv_heads, self.len_k, width, **form) for _ in "kv")
        return [q, k, k[..., : self.latent] if self.latent else v]

    def suits(self, candidate: str) -> bool:
        """Say whether a candidate is worth its time: FlexAttention is compiled for each size."""
        return candidate != "flex" or (
            (self.n_kv_heads, self.is_causal) == (8, True) and (self.len_q in (4096, 16384))
        )

    @property
    def flops(self) -> float:
        """Count the operations of the two products forward; backward takes 2.5 times as many."""
        pairs = self.len_q * self.len_k / (2 if self.is_causal else 1)
        widths = self.head_dim + (self.latent or self.head_dim)
        return 2 * self.batch * self.n_heads * pairs * widths

    @property
    def kv_bytes(self) -> int:
        """Count the bytes of keys and values: what decoding has to read."""
        numbers = self.head_dim if self.latent else 2 * self.head_dim
        size = getattr(torch, self.dtype).itemsize
        return self.batch * self.n_kv_heads * self.len_k * numbers * size


DECODERS: dict[str, Attend] = {
    name: ATTENTIONS[name] for name in ("math", "efficient", "flash", "cudnn")
} | {"triton": decode_attention}
"""What computes attention for a few new queries against many keys."""
