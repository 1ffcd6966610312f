"""Famous bugs of scale: chapters 11 to 13."""

import logging
import warnings

import torch
import torch.nn.functional as F
from famous_bugs.bug import Bug
from torch.nn.attention import SDPBackend, sdpa_kernel

from tfm_ref import (
    KVCache,
    LatentAttention,
    MultiHeadAttention,
    RollingCache,
    online_softmax,
    scaled_dot_product_attention,
)


class MaskedTile(Bug):
    """A tile in which everything is masked

    The online softmax begins with the maximum −∞.
    Where a row may see nothing in its first tile, −∞ is subtracted from −∞, and the NaN stays.
    A finite number in place of −∞ is no cure: it wins against true scores that are lower still.
    Tests with one tile, or with padding on the right only, do not see it.
    """

    chapter = "12_flash_attention#when-it-goes-wrong"
    seen = ("flashinfer-ai/flashinfer#4401", "ohdearquant/lattice#373")

    def wrong(scores, values, block):
        top, total, out = torch.tensor(-torch.inf), 0.0, 0.0
        tiles = zip(scores.split(block, 1), values.split(block), strict=True)
        for s, v in tiles:
            new = torch.maximum(top, s.amax(1, keepdim=True))
            old, weights = (top - new).exp(), (s - new).exp()
            total = old * total + weights.sum(1, keepdim=True)
            out, top = old * out + weights @ v, new
        return out / total

    def right(scores, values, block):
        top, total, out = torch.tensor(-torch.inf), 0.0, 0.0
        tiles = zip(scores.split(block, 1), values.split(block), strict=True)
        for s, v in tiles:
            new = torch.maximum(top, s.amax(1, keepdim=True))
            base = new.clamp(min=torch.finfo(new.dtype).min)  # −∞ − base is −∞
            old, weights = (top - base).exp(), (s - base).exp()
            total = old * total + weights.sum(1, keepdim=True)
            out, top = old * out + weights @ v, new
        return out / total

    def ours(scores, values, block):
        return [*online_softmax(scores, values, block=block)][-1].output

    def measure(attention):
        """The share of NaN in the output, where the first of four tiles is padding"""
        scores, values = torch.randn(16, 16), torch.randn(16, 8)
        scores[:, :4] = -torch.inf
        return attention(scores, values, 4).isnan().double().mean()

    def test(attention):
        scores, values = torch.randn(6, 16), torch.randn(16, 8)
        scores[:, :5] = -torch.inf
        wanted = scores.softmax(1) @ values
        for block in (16, 4, 1):
            found = attention(scores, values, block)
            assert torch.allclose(found, wanted, atol=1e-5)


class LoggedFailure(Bug):
    """The test that writes "failed" and passes

    A test of a kernel compares the outputs, writes the word "FAILED" to a log, and returns.
    Nothing raises, so that the run is green, whatever the kernel gives.
    Break the code on purpose once, and see the test fail.
    """

    chapter = "12_flash_attention#when-it-goes-wrong"

    def wrong(attention):
        q, k, v = torch.randn(3, 1, 1, 8, 4)
        gap = attention(q, k, v) - F.scaled_dot_product_attention(q, k, v)
        if gap.abs().max() > 1e-5:
            logging.info("[FAILED] outputs differ")

    def right(attention):
        q, k, v = torch.randn(3, 1, 1, 8, 4)
        gap = attention(q, k, v) - F.scaled_dot_product_attention(q, k, v)
        assert gap.abs().max() <= 1e-5, "outputs differ"

    def measure(kernel_test):
        """Wrong kernels that pass, of two"""
        passed = 0
        for kernel in (lambda q, k, v: v, lambda q, k, v: (q @ k.mT) @ v):
            try:
                kernel_test(kernel)
                passed += 1
            except AssertionError:
                pass
        return passed

    def test(kernel_test):
        kernel_test(F.scaled_dot_product_attention)
        try:
            kernel_test(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)  # no scale
        except AssertionError:
            return
        raise AssertionError("a wrong kernel passes")


class EmptyLoop(Bug):
    """The test over no cases

    A test goes through a list of cases, and the list is empty: a filter is the wrong way round.
    All of nothing holds, so it passes, in no time.
    Count what was tested.
    """

    chapter = "12_flash_attention#when-it-goes-wrong"
    seen = ("srush/Transformer-Puzzles#1",)

    def wrong(attention):
        cases = [n for n in (16, 64) if n % 3 == 0]  # meant: ragged tiles
        for n in cases:
            q, k, v = torch.randn(3, 1, 1, n, 4)
            gap = attention(q, k, v) - F.scaled_dot_product_attention(q, k, v)
            assert gap.abs().max() <= 1e-5, n

    def right(attention):
        cases = [n for n in (16, 64) if n % 3 != 0]
        for n in cases:
            q, k, v = torch.randn(3, 1, 1, n, 4)
            gap = attention(q, k, v) - F.scaled_dot_product_attention(q, k, v)
            assert gap.abs().max() <= 1e-5, n
        assert cases, "nothing was tested"

    def measure(kernel_test):
        """How often the test calls the kernel that it is named after"""
        calls = []

        def kernel(q, k, v):
            calls.append(q.shape)
            return F.scaled_dot_product_attention(q, k, v)

        kernel_test(kernel)
        return len(calls)

    def test(kernel_test):
        try:
            kernel_test(lambda q, k, v: v)  # attends to nothing
        except AssertionError:
            return
        raise AssertionError("a wrong kernel passes")


class UnpinnedBenchmark(Bug):
    """The benchmark that does not run what it names

    A benchmark of FlashAttention draws its tensors with `torch.randn`, in float32.
    On CUDA the flash kernel takes 16 bits only, and PyTorch takes another without a word.
    Its namesake on the CPU takes float32, but no values wider than the keys, as they are here.
    A choice that is pinned refuses instead.
    """

    chapter = "12_flash_attention#a-benchmark-read-with-care"

    def wrong(q, k, v):  # to be timed as "flash"
        return F.scaled_dot_product_attention(q, k, v)

    def right(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    def measure(attention):
        """Runs timed as flash, of two that flash does not serve"""
        q, k, v = torch.randn(3, 1, 1, 64, 16)
        timed, columns = 0, q.mT.contiguous().mT
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says why, then refuses
            for qkv in ((q, k, torch.cat([v, v], -1)), (columns, k, v)):
                try:
                    attention(*qkv)
                    timed += 1
                except RuntimeError:
                    pass
        return timed

    def test(attention):
        q, k, v = torch.randn(3, 1, 1, 64, 16)
        assert attention(q, k, v).shape == v.shape
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                attention(q, k, torch.cat([v, v], -1))
            except RuntimeError:
                return
        raise AssertionError("not flash, but timed as such")


class UnmaskedPiece(Bug):
    """The second piece of a prompt without a mask

    A mask is made for the first piece of a prompt, when the cache is empty.
    After that the code expects one token at a time, which needs none.
    A prompt in several pieces then sees its own future, and all shapes are right.
    """

    chapter = "13_kv_cache_and_gqa#a-prompt-in-pieces"

    def wrong(q, k, v):
        n, t = q.shape[2], k.shape[2]
        mask = torch.ones(n, t).tril().bool() if n == t else None
        return F.scaled_dot_product_attention(q, k, v, mask)

    def right(q, k, v):
        n, t = q.shape[2], k.shape[2]
        mask = torch.ones(n, t).tril(t - n).bool()
        return F.scaled_dot_product_attention(q, k, v, mask)

    def ours(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def measure(attention):
        """The weight that the first of 4 new tokens gives to those after it, 8 being cached"""
        q, k = torch.zeros(1, 1, 4, 8), torch.randn(1, 1, 12, 8)
        weights = attention(q, k, torch.eye(12)[None, None])
        return weights[0, 0, 0, 9:].sum()

    def test(attention):
        q, k, v = torch.randn(3, 1, 1, 12, 8)
        whole = attention(q, k, v)
        for n in (1, 4, 12):  # how many are new
            piece = attention(q[:, :, -n:], k, v)
            assert torch.allclose(piece, whole[:, :, -n:], atol=1e-5)


class StalePosition(Bug):
    """The position that outlives its text

    A model counts its position beside its cache, and forgets to reset the one with the other.
    The next text then begins where the last one ended.
    RoPE sees distances only and hides it, until positions are larger than any in training.
    Do not count what the cache itself can tell.
    """

    chapter = "13_kv_cache_and_gqa#when-it-goes-wrong"
    seen = ("rasbt/LLMs-from-scratch#925",)

    class wrong:
        def __init__(self):
            self.kept, self.position = [], 0

        def read(self, tokens):
            start = self.position
            self.kept += tokens
            self.position += len(tokens)
            return range(start, self.position)

        def reset(self):
            self.kept = []

    class right:
        def __init__(self):
            self.kept = []

        def read(self, tokens):
            start = len(self.kept)
            self.kept += tokens
            return range(start, len(self.kept))

        def reset(self):
            self.kept = []

    def measure(reader):
        """Where the third text of 300 tokens begins"""
        reader = reader()
        for _ in range(3):
            reader.reset()
            positions = reader.read([0] * 300)
        return positions[0]

    def test(reader):
        reader = reader()
        first = reader.read([3, 1, 4])
        assert reader.read([1]) == range(3, 4)
        reader.reset()
        assert reader.read([3, 1, 4]) == first


class WindowOffByOne(Bug):
    """A window that is off by one

    A window of 128 is 128 tokens in all, the newest among them.
    Where the cache keeps one fewer, or the mask one more, both are right until the window is full.
    A test that is shorter than the window sees nothing.
    """

    chapter = "13_kv_cache_and_gqa#when-it-goes-wrong"
    seen = ("ml-explore/mlx-lm#390", "huggingface/transformers#37574")

    def wrong(q, k, v, window):
        outputs, kept = [], []
        for i, token in enumerate(q.split(1, 2)):
            kept = [*kept[1:], i] if i >= window - 1 else [*kept, i]
            qkv = token, k[:, :, kept], v[:, :, kept]
            outputs.append(F.scaled_dot_product_attention(*qkv))
        return torch.cat(outputs, 2)

    def right(q, k, v, window):
        outputs, kept = [], []
        for i, token in enumerate(q.split(1, 2)):
            kept = [*kept[1:], i] if i >= window else [*kept, i]
            qkv = token, k[:, :, kept], v[:, :, kept]
            outputs.append(F.scaled_dot_product_attention(*qkv))
        return torch.cat(outputs, 2)

    def ours(q, k, v, window):
        outputs, cache = [], RollingCache(window)
        for i, token in enumerate(q.split(1, 2)):
            kv = cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
            outputs.append(F.scaled_dot_product_attention(token, *kv))
        return torch.cat(outputs, 2)

    def measure(attention):
        """Tokens with a wrong output, of 20, with a window of 4"""
        q, k, v = torch.randn(3, 1, 1, 20, 8)
        mask = torch.ones(20, 20).tril().triu(-3).bool()
        gaps = attention(q, k, v, 4) - F.scaled_dot_product_attention(q, k, v, mask)
        return (gaps.abs().amax((0, 1, 3)) > 1e-4).sum()

    def test(attention):
        q, k, v = torch.randn(3, 1, 1, 20, 8)
        for window in (1, 4, 19):  # all shorter than the text
            mask = torch.ones(20, 20).tril().triu(1 - window).bool()
            wanted = F.scaled_dot_product_attention(q, k, v, mask)
            assert torch.allclose(attention(q, k, v, window), wanted, atol=1e-5)


class GroupsOrTheirSize(Bug):
    """Groups: how many, or how large?

    `n_kv_groups` is how many groups the model has, and how large one is in the plan of its memory.
    With 16 heads and 4 groups both are 4, and nothing is seen.
    """

    chapter = "13_kv_cache_and_gqa#when-it-goes-wrong"

    def wrong(n_heads, n_kv_groups):  # how many key heads are there?
        return n_heads // n_kv_groups

    def right(n_heads, n_kv_groups):
        return n_kv_groups

    def ours(n_heads, n_kv_groups):
        heads = {"n_heads": n_heads, "n_kv_heads": n_kv_groups}
        layer = MultiHeadAttention(d_model=8 * n_heads, **heads)
        return layer.k_proj.out_features // 8

    def measure(key_heads):
        """The cache planned for, over that which 24 heads in 4 groups take"""
        return key_heads(24, 4) / 4

    def test(key_heads):
        assert key_heads(24, 24) == 24  # MHA
        assert key_heads(24, 1) == 1  # MQA
        assert key_heads(24, 4) == 4


class LatentAlone(Bug):
    """MLA planned without its second key

    The cache of MLA is counted as one latent per token.
    With RoPE there is a second part, the key that turns and that all heads share.
    In DeepSeek-V3 that is 64 numbers beside 512.
    """

    chapter = "13_kv_cache_and_gqa#when-it-goes-wrong"

    def wrong(d_c, d_r):  # bytes per token and layer, in 16 bits
        return 2 * d_c

    def right(d_c, d_r):
        return 2 * (d_c + d_r)

    def ours(d_c, d_r):
        widths = {"kv_lora_rank": d_c, "rope_head_dim": d_r, "head_dim": 8}
        layer = LatentAttention(d_model=16, n_heads=2, v_head_dim=8, **widths)
        return 2 * layer.cache_width

    def measure(per_token):
        """GiB for a million (2^20) tokens of DeepSeek-V3, 61 layers"""
        return per_token(512, 64) * 61 * 2**20 / 2**30

    def test(per_token):
        widths = {"kv_lora_rank": 6, "rope_head_dim": 4, "head_dim": 8}
        layer = LatentAttention(d_model=8, n_heads=2, v_head_dim=8, **widths)
        cache = KVCache(max_len=3)
        with torch.no_grad():
            layer.bfloat16()(torch.ones(1, 3, 8).bfloat16(), cache=cache)
        assert cache.n_bytes == 3 * per_token(6, 4)


class FalseAlarm(Bug):
    """A bug that is none: other logits in 16 bits

    With a cache, or with padding, products have other shapes, and add up in another order.
    In bfloat16 the result differs, and it has been reported as a bug again and again.
    Neither is right: hold both against the truth, and in double precision against one another.
    """

    chapter = "13_kv_cache_and_gqa#when-it-goes-wrong"
    seen = ("huggingface/transformers#25420",)

    def wrong(cached, whole, true):  # is the cache wrong?
        return not torch.allclose(cached, whole)

    def right(cached, whole, true):
        errors = [(y.double() - true).abs().mean() for y in (cached, whole)]
        return errors[0] > 3 * errors[1]

    def measure(alarm):
        """Alarms over 8 caches that are right"""
        alarms = 0
        for a, v in zip(*torch.randn(2, 8, 64, 64), strict=True):
            a, v = a.softmax(1).bfloat16(), v.bfloat16()
            cached = a[:, :32] @ v[:32] + a[:, 32:] @ v[32:]
            alarms += bool(alarm(cached, a @ v, a.double() @ v.double()))
        return alarms

    def test(alarm):
        a, v = torch.randn(2, 64, 64)
        a, v = a.softmax(1).bfloat16(), v.bfloat16()
        whole, true = a @ v, a.double() @ v.double()
        assert not alarm(a[:, :32] @ v[:32] + a[:, 32:] @ v[32:], whole, true)
        assert alarm(a[:, :63] @ v[:63], whole, true)  # a token is lost
