"""Famous bugs of attention: chapters 1 to 4."""

import torch
import torch.nn.functional as F
from einops import rearrange
from famous_bugs.bug import Bug
from torch import nn

from tfm_ref import (
    MultiHeadAttention,
    attention_weights,
    causal_mask,
    padding_mask,
    scaled_dot_product_attention,
)


class InvertedMask(Bug):
    """The mask that means the opposite

    In one library `True` means "may attend", in the next "must not".
    Where both meet, each token sees only the future.
    All shapes are right, and the training loss is excellent: the answer is in the input.
    """

    chapter = "01_self_attention#when-it-goes-wrong"
    seen = ("rasbt/LLMs-from-scratch#1061", "tensorflow/text#894", "pytorch/pytorch#170415")

    def wrong(q, k, v):
        n = q.shape[2]
        mask = torch.ones(n, n).triu(1).bool()  # True: must not attend
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v

    def right(q, k, v):
        n = q.shape[2]
        mask = torch.ones(n, n).tril().bool()  # True: may attend
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v

    def ours(q, k, v):
        mask = causal_mask(q.shape[2], k.shape[2])
        return scaled_dot_product_attention(q, k, v, mask=mask)

    def measure(attention):
        """How far the output of token 0 moves when the last token changes"""
        q, k, v = torch.randn(3, 1, 1, 6, 8)
        before = attention(q, k, v)
        k[..., -1, :], v[..., -1, :] = 1.0, 1.0
        return (attention(q, k, v) - before)[0, 0, 0].abs().max()

    def test(attention):
        q, k, v = torch.randn(3, 1, 1, 6, 8, requires_grad=True)
        early = attention(q, k, v)[0, 0, 2].sum()
        (slopes,) = torch.autograd.grad(early, v)
        assert (slopes[0, 0, :3] > 0).all()
        assert (slopes[0, 0, 3:] == 0).all()


class EmptyRow(Bug):
    """The row that may look at nothing

    Left padding and a causal mask leave the first query no key.
    A softmax over nothing but −∞ is NaN, and the gradient carries it to all values, even if the
    loss leaves that row out.
    To fill with the lowest finite number is quiet, and averages all that was forbidden.
    """

    chapter = "01_self_attention#a-query-that-may-look-at-nothing"
    seen = ("pytorch/pytorch#103963", "Dao-AILab/flash-attention#1778", "onnx/onnx#8068")

    def wrong(q, k, v, mask):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v

    def right(q, k, v, mask):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask, -torch.inf)
        empty = ~mask.any(-1, keepdim=True)
        return scores.softmax(-1).masked_fill(empty, 0.0) @ v

    def ours(q, k, v, mask):
        return scaled_dot_product_attention(q, k, v, mask=mask)

    def measure(attention):
        """The share of the values' gradient that is NaN, the empty row left out of the loss"""
        q, k, v = torch.randn(3, 1, 1, 6, 8, requires_grad=True)
        mask = causal_mask(6) & padding_mask(torch.tensor([5]), 6, side="left")
        loss = attention(q, k, v, mask)[:, :, 1:].sum()
        return torch.autograd.grad(loss, v)[0].isnan().float().mean()

    def test(attention):
        q, k, v = torch.randn(3, 1, 1, 6, 8, requires_grad=True)
        mask = causal_mask(6) & padding_mask(torch.tensor([5]), 6, side="left")
        output = attention(q, k, v, mask)
        assert (output[:, :, 0] == 0).all()
        for slopes in torch.autograd.grad(output.sum(), (q, k, v)):
            assert slopes.isfinite().all()


class AddedMask(Bug):
    """The boolean mask that is added

    Some layers add the mask to the scores, and expect 0 and −∞.
    Given `True` and `False` they add 1 and 0, and mask nothing.
    """

    chapter = "01_self_attention#when-it-goes-wrong"
    seen = ("huggingface/transformers#41443", "huggingface/diffusers#14342")

    def wrong(q, k, v, mask):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return (scores + mask).softmax(-1) @ v

    def right(q, k, v, mask):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        return (scores + bias).softmax(-1) @ v

    def ours(q, k, v, mask):
        return scaled_dot_product_attention(q, k, v, mask=mask)

    def measure(attention):
        """The share of its weight that the first of ten tokens gives to the future"""
        q, k = torch.randn(2, 1, 1, 10, 8)
        identity = torch.eye(10)[None, None]  # so the output is the weights
        weights = attention(q, k, identity, causal_mask(10))
        return weights[0, 0, 0, 1:].sum()

    def test(attention):
        q, k = torch.randn(2, 1, 1, 10, 8)
        identity = torch.eye(10)[None, None]
        weights = attention(q, k, identity, causal_mask(10))
        assert (weights.triu(1) == 0).all()


class PaddingWithoutAxes(Bug):
    """The padding mask that lacks an axis

    A mask of shape (batch, keys) lines up with the scores from the right: its batch axis falls
    on the queries.
    With as many sentences as tokens nothing fails; each query then obeys the padding of another
    sentence.
    """

    chapter = "01_self_attention#when-it-goes-wrong"

    def wrong(q, k, v, padding):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~padding, -torch.inf)
        return scores.softmax(-1) @ v

    def right(q, k, v, padding):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~padding[:, None, :], -torch.inf)
        return scores.softmax(-1) @ v

    def ours(q, k, v, padding):
        q, k, v = (t[:, None] for t in (q, k, v))
        mask = padding[:, None, None]
        return scaled_dot_product_attention(q, k, v, mask=mask)[:, 0]

    def measure(attention):
        """The share of weight that a sentence of one token and seven of padding gives to these"""
        q, k = torch.randn(2, 8, 8, 8)
        identity = torch.eye(8).expand(8, 8, 8)  # so the output is the weights
        padding = torch.ones(8, 8).bool()
        padding[0, 1:] = False
        weights = attention(q, k, identity, padding)
        return weights[0, :, 1:].sum() / weights[0].sum()

    def test(attention):
        q, k, v = torch.randn(3, 4, 4, 8)
        padding = torch.arange(4) < torch.tensor([4, 3, 2, 2])[:, None]
        before = attention(q, k, v, padding)
        v[~padding] = 100.0
        assert torch.equal(attention(q, k, v, padding), before)


class OnlyTheScale(Bug):
    """The number of heads that only changes the scale

    A class of one head takes `num_heads`, works out the width of a head, and uses it in the
    scale alone.
    There is still one head, and with 8 "heads" its scores are $\\sqrt 8$ times too large.
    """

    chapter = "01_self_attention#claims-checked"

    def wrong(q, k, n_heads):
        scores = q @ k.mT * (q.shape[-1] // n_heads) ** -0.5
        return scores.softmax(-1)

    def right(q, k, n_heads):
        q, k = (rearrange(t, "n (h k) -> h n k", h=n_heads) for t in (q, k))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores.softmax(-1)

    def ours(q, k, n_heads):
        q, k = (rearrange(t, "n (h k) -> 1 h n k", h=n_heads) for t in (q, k))
        return attention_weights(q, k)[0]

    def measure(weights):
        """How many maps of weights 8 heads make for a sentence"""
        q, k = torch.randn(2, 10, 512)
        return weights(q, k, 8).numel() / 10**2

    def test(weights):
        q, k = torch.randn(2, 10, 512)
        before = weights(q, k, 8)
        q[:, :64] = 0.0  # all that the first head asks
        moved = (weights(q, k, 8) != before).flatten(1).any(-1)
        assert moved.tolist() == [True] + 7 * [False]


class SlicedEmbedding(Bug):
    """The embedding that is cut into heads

    "Split the embedding into heads" is said of the projected vector.
    Taken at its word, each head sees its own slice of the token and nothing of the rest.
    All shapes are right, and the projection has only a fraction of its parameters.
    """

    chapter = "02_multi_head_attention#each-head-projects-the-whole-vector"
    seen = ("MarcoMeter/episodic-transformer-memory-ppo#22",)

    def wrong(x, n_heads):
        width = x.shape[-1] // n_heads
        project = nn.Linear(width, width, bias=False)
        return project(rearrange(x, "n (h k) -> h n k", h=n_heads))

    def right(x, n_heads):
        width = x.shape[-1]
        project = nn.Linear(width, width, bias=False)
        return rearrange(project(x), "n (h k) -> h n k", h=n_heads)

    def ours(x, n_heads):
        layer = MultiHeadAttention(d_model=x.shape[-1], n_heads=n_heads)
        return rearrange(layer.q_proj(x), "n (h k) -> h n k", h=n_heads)

    def measure(queries):
        """How many of the 512 numbers of a token its query in one head depends on"""
        x = torch.randn(1, 512, requires_grad=True)
        (slopes,) = torch.autograd.grad(queries(x, 8)[0].sum(), x)
        return (slopes != 0).sum()

    def test(queries):
        x = torch.randn(5, 24, requires_grad=True)
        for head in queries(x, 4):
            (slopes,) = torch.autograd.grad(head.sum(), x, retain_graph=True)
            assert (slopes != 0).all()


class SplitWithoutTranspose(Bug):
    """The split into heads that cuts the sequence

    The head axis stands before the length, so `view` to the wanted shape cuts the sequence into
    parts and not the vectors.
    Every shape is right; a "token" of a head is made of pieces of others.
    To merge the heads by `reshape` alone is the mirror image of it.
    """

    chapter = "02_multi_head_attention#when-it-goes-wrong"
    seen = ("reczoo/FuxiCTR#30", "jsbaan/transformer-from-scratch#6")

    def wrong(x, n_heads):
        b, n, d = x.shape
        return x.view(b, n_heads, n, d // n_heads)

    def right(x, n_heads):
        b, n, d = x.shape
        return x.view(b, n, n_heads, d // n_heads).transpose(1, 2)

    def measure(split):
        """The share of numbers that stand in the place of another token"""
        tokens = torch.arange(10)[:, None]
        heads = split(tokens.expand(1, 10, 512).contiguous(), 8)
        return (heads != tokens).float().mean()

    def test(split):
        x = torch.randn(2, 10, 24)
        changed = x.clone()
        changed[:, -1] += 1.0
        moved = (split(changed, 4) != split(x, 4)).any(-1)
        assert moved[..., -1].all()
        assert not moved[..., :-1].any()


class MaskPerHead(Bug):
    """The mask of each sentence that falls on the heads

    A mask of shape (batch, queries, keys) lines up with the scores from the right: its batch
    axis falls on the heads.
    Where there are as many sentences as heads nothing fails, and head $i$ of every sentence
    obeys the mask of sentence $i$.
    """

    chapter = "02_multi_head_attention#when-it-goes-wrong"
    seen = ("phlippe/uvadlc_notebooks#67", "phlippe/uvadlc_notebooks#143")

    def wrong(q, k, v, mask):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v

    def right(q, k, v, mask):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
        return scores.softmax(-1) @ v

    def ours(q, k, v, mask):
        return scaled_dot_product_attention(q, k, v, mask=mask[:, None])

    def measure(attention):
        """The share of weight that a sentence gives to its padding"""
        q, k = torch.randn(2, 4, 4, 6, 8)
        mask = torch.ones(4, 6, 6).bool()
        mask[0, :, 2:] = False  # sentence 0 has two tokens
        weights = attention(q, k, torch.eye(6).expand(4, 4, 6, 6), mask)
        return weights[0, :, :, 2:].sum() / weights[0].sum()

    def test(attention):
        q, k, v = torch.randn(3, 4, 4, 6, 8)
        mask = torch.ones(4, 6, 6).bool()
        mask[0, :, 2:] = False
        before = attention(q, k, v, mask)
        v[0, :, 2:] = 100.0
        assert torch.equal(attention(q, k, v, mask), before)


class TiledMask(Bug):
    """The mask that is tiled where it should be repeated

    Batch and heads lie on one axis, on which the head counts fast.
    `repeat` lays the masks out with the sentence counting fast: the shape is the same, and
    sentences get the masks of others.
    """

    chapter = "02_multi_head_attention#when-it-goes-wrong"
    seen = ("lsdefine/attention-is-all-you-need-keras#36",)

    def wrong(q, k, v, mask):
        mask = mask.repeat(q.shape[1], 1, 1)
        merged = [t.flatten(0, 1) for t in (q, k, v)]
        output = F.scaled_dot_product_attention(*merged, attn_mask=mask)
        return output.view_as(q)

    def right(q, k, v, mask):
        mask = mask.repeat_interleave(q.shape[1], 0)
        merged = [t.flatten(0, 1) for t in (q, k, v)]
        output = F.scaled_dot_product_attention(*merged, attn_mask=mask)
        return output.view_as(q)

    def ours(q, k, v, mask):
        return scaled_dot_product_attention(q, k, v, mask=mask[:, None])

    def measure(attention):
        """The share of weight that a sentence gives to its padding"""
        q, k = torch.randn(2, 4, 8, 6, 6)
        mask = torch.ones(4, 6, 6).bool()
        mask[0, :, 2:] = False  # sentence 0 has two tokens
        weights = attention(q, k, torch.eye(6).expand(4, 8, 6, 6), mask)
        return weights[0, :, :, 2:].sum() / weights[0].sum()

    def test(attention):
        q, k, v = torch.randn(3, 4, 8, 6, 6)
        mask = torch.ones(4, 6, 6).bool()
        mask[0, :, 2:] = False
        before = attention(q, k, v, mask)
        v[0, :, 2:] = 100.0
        assert torch.equal(attention(q, k, v, mask), before)


class WeightsAfterDropout(Bug):
    """The weights that are returned after dropout

    A layer drops some weights, averages with what is left, and returns that as its weights.
    In training the rows do not sum to 1, and a picture of them shows holes that are not there.
    """

    chapter = "02_multi_head_attention#when-it-goes-wrong"
    seen = ("pytorch/pytorch#42929", "facebookresearch/fairseq#351")

    def wrong(q, k, v):
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        weights = F.dropout(weights, p=0.5)
        return weights @ v, weights

    def right(q, k, v):
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        dropped = F.dropout(weights, p=0.5)
        return dropped @ v, weights

    def measure(attention):
        """The share of returned weights that are exactly 0, without any mask"""
        _, weights = attention(*torch.randn(3, 8, 20, 16))
        return (weights == 0).float().mean()

    def test(attention):
        _, weights = attention(*torch.randn(3, 8, 20, 16))
        assert torch.allclose(weights.sum(-1), torch.ones(8, 20))


class KeyHeadsInTurn(Bug):
    """The key heads that are shared in turn

    With 2 key heads for 8 query heads, the first four query heads share the first.
    `repeat` gives them to the query heads in turn.
    Trained so from the start, it only has its heads in another order; with parameters trained
    elsewhere, half of the heads meet the keys of others.
    """

    chapter = "02_multi_head_attention#when-it-goes-wrong"
    seen = ("onnx/onnx#7274", "ekzhang/jax-js#180")

    def wrong(q, k, v):
        times = q.shape[1] // k.shape[1]
        k, v = (t.repeat(1, times, 1, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    def right(q, k, v):
        times = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(times, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    def ours(q, k, v):
        return scaled_dot_product_attention(q, k, v)

    def measure(attention):
        """How many of 8 heads read values that are not theirs"""
        q, k = torch.randn(1, 8, 6, 4), torch.randn(1, 2, 6, 4)
        v = torch.arange(2.0)[:, None, None].expand(1, 2, 6, 4)
        read = attention(q, k, v)[0, :, 0, 0].round()
        return (read != torch.arange(2).repeat_interleave(4)).sum()

    def test(attention):
        q, k = torch.randn(1, 8, 6, 4), torch.randn(1, 2, 6, 4)
        v = torch.randn(1, 2, 6, 4)
        shared = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        assert torch.allclose(attention(q, k, v), shared, atol=1e-6)


class CausalPairs(Bug):
    """The operations that nobody does

    The formula counts all $n^2$ pairs of a query and a key; a causal kernel skips almost half.
    Divided by the time, the count can give a speed beyond what the machine is able to do.
    The other factor of 2 is that a multiplication with its addition is 2 FLOPs and 1 MAC.
    """

    chapter = "03_how_many_heads#when-it-goes-wrong"
    seen = ("NVIDIA/Megatron-LM#831", "pytorch/torchtitan#341")

    def wrong(n, d):
        pairs = n * n
        return 2 * 2 * pairs * d  # scores and average, 2 FLOPs each

    def right(n, d):
        pairs = n * (n + 1) // 2
        return 2 * 2 * pairs * d  # scores and average, 2 FLOPs each

    def measure(flops):
        """FLOPs counted for each one that 1,024 causal tokens need"""
        return flops(1024, 64) / (4 * 64 * causal_mask(1024).sum())

    def test(flops):
        for n in 1, 2, 5:
            assert flops(n, 8) == 4 * 8 * causal_mask(n).sum()


class AblatedRows(Bug):
    """The ablation that takes out something else

    To take a head out, set its rows of $W_O$ to 0; `nn.Linear` stores $W_O$ transposed, and they
    are columns there.
    Zeroed rows, or zeroed numbers of the output, raise no error: all heads lose a part of what
    they write, and no head is gone.
    """

    chapter = "03_how_many_heads#when-it-goes-wrong"
    seen = ("ndif-team/nnsight#525", "interp-reasoning/thought-anchors#7")

    def wrong(layer, head):
        width = layer.v_head_dim
        part = slice(head * width, (head + 1) * width)
        layer.o_proj.weight.data[part] = 0.0

    def right(layer, head):
        width = layer.v_head_dim
        part = slice(head * width, (head + 1) * width)
        layer.o_proj.weight.data[:, part] = 0.0

    def measure(take_out):
        """How many of 8 heads still reach the output when one is taken out"""
        layer = MultiHeadAttention(d_model=64, n_heads=8)
        take_out(layer, 3)
        layer(torch.randn(1, 5, 64)).sum().backward()
        parts = layer.v_proj.weight.grad.chunk(8)
        return sum(bool(part.any()) for part in parts)

    def test(take_out):
        layer = MultiHeadAttention(d_model=64, n_heads=8)
        take_out(layer, 3)
        layer(torch.randn(1, 5, 64)).sum().backward()
        for i, part in enumerate(layer.v_proj.weight.grad.chunk(8)):
            assert bool(part.any()) == (i != 3)


class BatchReadAsTime(Bug):
    """The batch that is read as time

    PyTorch's recurrent layers take (length, batch, width) unless they are told otherwise.
    Given (batch, length, width), they read across the sentences: each word hears of the same
    place in the sentences before.
    The shape that comes out is right.
    """

    chapter = "04_why_self_attention#when-it-goes-wrong"

    def wrong(d):
        return nn.LSTM(d, d)

    def right(d):
        return nn.LSTM(d, d, batch_first=True)

    def measure(build):
        """Sentences of 32 whose output changes when a word of the first one does"""
        x, lstm = torch.randn(32, 6, 8), build(8)
        before = lstm(x)[0]
        x[0, 2] += 1
        return (lstm(x)[0] != before).any(2).any(1).sum()

    def test(build):
        x, lstm = torch.randn(4, 6, 8), build(8)
        before = lstm(x)[0]
        x[0, 2] += 1
        assert torch.equal(lstm(x)[0][1:], before[1:])
