"""Famous bugs of scale: chapters 11 to 13."""

import logging
import warnings

import torch
import torch.nn.functional as F
from famous_bugs.bug import Bug
from torch.nn.attention import SDPBackend, sdpa_kernel

from tfm_ref import (
    Experts,
    KVCache,
    LatentAttention,
    MultiHeadAttention,
    RollingCache,
    Router,
    Routing,
    TransformerConfig,
    build,
    count_parameters,
    full_size,
    online_softmax,
    scaled_dot_product_attention,
)
from tfm_ref.balance import switch_loss


class RouterWithoutGradient(Bug):
    """One expert, and a weight of 1

    Mixtral divides the weights of the chosen experts by their sum.
    With one expert that is a number divided by itself: 1, whatever the router said.
    The experts learn, the loss falls, and the router stays as it was drawn.
    """

    chapter = "11_mixture_of_experts#one-expert-and-a-weight-of-1"

    def wrong(logits):
        weights, chosen = logits.softmax(-1).topk(1)
        weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen

    def right(logits):
        weights, chosen = logits.softmax(-1).topk(1)
        return weights, chosen

    def ours(logits):
        sizes = {"d_model": logits.shape[-1], "n_experts": logits.shape[-1]}
        router = Router(**sizes, top_k=1, normalise=False)
        router.proj.weight.data = torch.eye(logits.shape[-1])
        routing = router(logits[None])
        return routing.weights[0], routing.indices[0]

    def measure(route):
        """Largest gradient that reaches the router"""
        logits = torch.randn(10, 8, requires_grad=True)
        weights, _ = route(logits)
        loss = (weights * torch.randn(10, 1)).sum()
        (slopes,) = torch.autograd.grad(loss, logits)
        return round(slopes.abs().max().item(), 6)

    def test(route):
        logits = torch.randn(10, 8, requires_grad=True)
        weights, chosen = route(logits)
        (slopes,) = torch.autograd.grad(weights.sum(), logits)
        assert torch.equal(chosen[:, 0], logits.argmax(-1))
        assert slopes.abs().max() > 1e-3


class ConstantBalance(Bug):
    """The balance loss that is constant

    The mean score of each expert is taken over the tokens.
    Taken over the experts it is 1/E, since scores sum to 1: the loss is 1 and has no gradient.
    It is there in every log, and looks like perfect balance.
    """

    chapter = "11_mixture_of_experts#when-it-goes-wrong"
    seen = (
        "huggingface/transformers#28021",
        "huggingface/transformers#28093",
    )

    def wrong(p):  # scores of shape (tokens, experts), one expert per token
        n_experts = p.shape[1]
        load = F.one_hot(p.argmax(1), n_experts).float().mean(0)
        return n_experts * (load * p.mean(1).mean()).sum()

    def right(p):
        n_experts = p.shape[1]
        load = F.one_hot(p.argmax(1), n_experts).float().mean(0)
        return n_experts * (load * p.mean(0)).sum()

    def ours(p):
        weights, indices = p[None].topk(1)
        return switch_loss(Routing(indices, weights, p[None], p[None].log()))

    def measure(loss):
        """The loss if all tokens go to one of 8 experts, 1 being perfect balance"""
        logits = torch.randn(100, 8)
        logits[:, 0] += 20
        return loss(logits.softmax(1))

    def test(loss):
        logits = 0.001 * torch.randn(100, 8)
        logits[:, 0] += 0.02  # all tokens to expert 0, by a hair
        logits.requires_grad_()
        (slopes,) = torch.autograd.grad(loss(logits.softmax(1)), logits)
        assert slopes.abs().sum() > 0.1


class PooledBalance(Bug):
    """The balance loss that pools all layers

    The tokens of all layers are put into one heap before anything is counted.
    Layers that collapse to different experts then make up for each other.
    Each layer has experts of its own, so each needs a loss of its own.
    """

    chapter = "11_mixture_of_experts#when-it-goes-wrong"
    seen = (
        "huggingface/transformers#28255",
        "huggingface/transformers#31464",
    )

    def wrong(layers):  # of each layer, scores of shape (tokens, experts)
        p = torch.cat(layers)
        load = F.one_hot(p.argmax(1), p.shape[1]).float().mean(0)
        return p.shape[1] * (load * p.mean(0)).sum()

    def right(layers):
        losses = []
        for p in layers:
            load = F.one_hot(p.argmax(1), p.shape[1]).float().mean(0)
            losses.append(p.shape[1] * (load * p.mean(0)).sum())
        return torch.stack(losses).mean()

    def ours(layers):
        # ours, of the bug before this one, is switch_loss for one layer
        return torch.stack([ConstantBalance.ours(p) for p in layers]).mean()

    def measure(loss):
        """The loss of 8 layers that each use one expert of 8, 1 being perfect balance"""
        return loss([F.one_hot(torch.full((9,), i), 8).float() for i in range(8)])

    def test(loss):
        tokens = torch.arange(8) % 4
        halves = [F.one_hot(tokens + first, 8).float() for first in (0, 4)]
        assert loss(halves) > 1.99  # each layer leaves half of its experts idle


class ForgottenBalance(Bug):
    """The balance loss that is never added

    It is computed if a flag asks for what the router said, and the flag is off by default.
    Nothing fails, and the loss of the task looks as it should.
    The load drifts, and experts that were paid for stay idle.
    """

    chapter = "11_mixture_of_experts#when-it-goes-wrong"
    seen = (
        "huggingface/transformers#44242",
        "huggingface/transformers#44284",
    )

    def wrong(task, balance, factor, output_router_logits=False):
        if output_router_logits:
            task = task + factor * balance
        return task

    def right(task, balance, factor):
        return task + factor * balance

    def measure(total):
        """Share of the tokens at the busiest of 8 experts, 60 steps after a collapse"""
        x = torch.cat([torch.randn(64, 8), torch.ones(64, 1)], 1)
        W = torch.zeros(9, 8)
        W[-1, 0] = 3.0  # all tokens go to expert 0
        W.requires_grad_()
        adam = torch.optim.Adam([W], lr=0.1)
        for _ in range(60):
            adam.zero_grad()
            balance = ConstantBalance.right((x @ W).softmax(1))
            total(0.0 * W.sum(), balance, 0.01).backward()
            adam.step()
        return (x @ W).argmax(1).bincount().max() / 64

    def test(total):
        router = torch.randn(8, requires_grad=True)
        task, balance = router.sum(), router.square().sum()
        change = total(task, balance, 0.01) - total(task, balance, 0.0)
        (slopes,) = torch.autograd.grad(change, router)
        assert slopes.abs().max() > 0


class MemoryOfTheActive(Bug):
    """Memory by active parameters

    "22 billion active" says what a token is computed with.
    The next token asks for other experts, so all of them must be there.
    A tool that counted the active ones recommended models that do not load.
    """

    chapter = "11_mixture_of_experts#when-it-goes-wrong"
    seen = ("AlexsJones/llmfit#230",)

    def wrong(model):
        return 2 * count_parameters(model).active  # 16 bits a number

    def right(model):
        return 2 * count_parameters(model).total  # 16 bits a number

    def measure(memory):
        """Gigabytes that Qwen3 235B is said to need"""
        return memory(full_size("Qwen3-235B-A22B")) / 1e9

    def test(memory):
        experts = Experts(d_ff=16, n_experts=8, top_k=2)
        shape = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": None}
        config = TransformerConfig(vocab_size=11, **shape, experts=experts)
        model = build(config).to(torch.bfloat16)
        assert memory(model) >= sum(p.nbytes for p in model.parameters())


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

    In a model `n_kv_groups` says how many groups there are, in the plan of its memory how large
    one is.
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
