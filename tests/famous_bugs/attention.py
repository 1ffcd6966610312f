"""Famous bugs of attention: chapters 1 to 4."""

import torch
from famous_bugs.bug import Bug
from torch import nn

from tfm_ref import causal_mask, scaled_dot_product_attention


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


class BatchReadAsTime(Bug):
    """The batch that is read as time

    PyTorch's recurrent layers take (length, batch, width) unless they are told otherwise.
    Given (batch, length, width), they read across the sentences: each word hears of the same
    place in the sentence before.
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
