"""Famous bugs of scale: chapters 11 to 13."""

import math

import torch
import torch.nn.functional as F
from famous_bugs.bug import Bug
from torch.nn.attention import SDPBackend, sdpa_kernel

from tfm_ref import (
    KVCache,
    LatentAttention,
    MultiHeadAttention,
    RollingCache,
    scaled_dot_product_attention,
)
from tfm_ref.flash import online_softmax


class MaskedTile(Bug):
    """A tile in which everything is masked

    The online softmax begins with the maximum −∞.
    Where a row may see nothing in its first tile, −∞ is subtracted from −∞, and one NaN stays for good.
    A finite number in place of −∞ is no cure: it wins against true scores that are lower still.
    Tests with one tile, or with padding on the right, see nothing.
    """

    chapter = "12_flash_attention#when-it-goes-wrong"
    seen = ("flashinfer-ai/flashinfer#4401", "ohdearquant/lattice#373")

    def wrong(scores, values, block):
        top, total, out = -torch.inf * torch.ones(len(scores), 1), 0, 0
        tiles = zip(scores.split(block, 1), values.split(block), strict=True)
        for s, v in tiles:
            new = torch.maximum(top, s.amax(1, keepdim=True))
            old, weights = (top - new).exp(), (s - new).exp()
            total = old * total + weights.sum(1, keepdim=True)
            out, top = old * out + weights @ v, new
        return out / total

    def right(scores, values, block):
        top, total, out = -torch.inf * torch.ones(len(scores), 1), 0, 0
        tiles = zip(scores.split(block, 1), values.split(block), strict=True)
        for s, v in tiles:
            new = torch.maximum(top, s.amax(1, keepdim=True))
            safe = new.where(new > -torch.inf, 0)
            old, weights = (top - safe).exp(), (s - safe).exp()
            total = old * total + weights.sum(1, keepdim=True)
            out, top = old * out + weights @ v, new
        return out / total

    def ours(scores, values, block):
        return [*online_softmax(scores, values, block=block)][-1].output

    def measure(attention):
        """Share of NaN in the output of 16 queries with four columns of padding on the left"""
        scores = torch.randn(16, 16)
        scores[:, :4] = -torch.inf
        return attention(scores, torch.randn(16, 8), 4).isnan().double().mean()

    def test(attention):
        scores, values = torch.randn(6, 16), torch.randn(16, 8)
        scores[:, :5] = -torch.inf
        wanted = scores.softmax(1) @ values
        for block in (16, 4, 1):
            assert torch.allclose(attention(scores, values, block), wanted)


class UnpinnedBenchmark(Bug):
    """The benchmark that never times what it names

    The benchmark of "FlashAttention" draws its tensors with `torch.randn`, in float32, and calls PyTorch's function.
    On CUDA the flash kernel takes 16 bits only, and PyTorch goes to another kernel without a word.
    On a CPU its namesake takes float32, but no values wider than the keys, and no queries laid out by columns.
    Pinned to a kernel, PyTorch refuses instead.
    """

    chapter = "12_flash_attention#a-benchmark-read-with-care"

    def wrong(q, k, v):  # to be timed as "flash"
        return F.scaled_dot_product_attention(q, k, v)

    def right(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    def score_matrices(attention, q, k, v):
        with torch.profiler.profile(record_shapes=True) as profile:
            try:
                attention(q, k, v)
            except RuntimeError:
                print("refused, and so not timed")
        events = profile.key_averages()
        return sum(e.count for e in events if e.key == "aten::_softmax")

    def measure(attention):
        """Tables of all scores, which flash never makes, in two runs timed as flash"""
        q, k, v = torch.randn(3, 1, 1, 64, 16)
        wide, columns = torch.randn(1, 1, 64, 32), q.mT.contiguous().mT
        inputs = (q, k, wide), (columns, k, v)
        return sum(
            UnpinnedBenchmark.score_matrices(attention, *qkv) for qkv in inputs
        )

    def test(attention):
        q, k, v = torch.randn(3, 1, 1, 64, 16)
        assert attention(q, k, v).shape == v.shape
        assert UnpinnedBenchmark.measure(attention) == 0
