"""Famous bugs of depth: chapters 5 to 7."""

import torch
import torch.nn.functional as F
from famous_bugs.bug import Bug
from torch import nn

from tfm_ref import RMSNorm


class AlmostLayerNorm(Bug):
    """A LayerNorm that is almost one

    `Tensor.std` divides by d − 1 unless told otherwise, and ε slips out of the root.
    For ordinary tokens the output is too small by the factor √((d − 1)/d), which nobody sees.
    Tokens near 0 come out several times too large, and trained parameters do not carry over.
    """

    chapter = "07_residuals_and_norms#when-it-goes-wrong"
    seen = ("harvardnlp/annotated-transformer#122", "codertimo/BERT-pytorch#30")

    def wrong(x, eps=1e-5):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.std(-1, keepdim=True) + eps)

    def right(x, eps=1e-5):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()

    def measure(norm):
        """How many times too large a token comes out whose numbers are about 0.001"""
        x = 0.001 * torch.randn(1, 64)
        return norm(x).norm() / F.layer_norm(x, (64,)).norm()

    def test(norm):
        x = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.001, 0.0, 0.0, 0.0]])
        torch.testing.assert_close(norm(x), F.layer_norm(x, (4,)))


class TheOtherNorm(Bug):
    """Post-norm in the text, pre-norm in the code

    A tutorial explains one form of the block and computes the other.
    Both have the same parameters under the same names, and load each other's in silence.
    """

    chapter = "07_residuals_and_norms#when-it-goes-wrong"
    seen = (
        "harvardnlp/annotated-transformer#1",
        "harvardnlp/annotated-transformer#13",
        "harvardnlp/annotated-transformer#92",
    )

    def wrong(x, f, norm):
        return x + f(norm(x))  # said to be post-norm

    def right(x, f, norm):
        return norm(x + f(x))

    def measure(layer):
        """Mean square of the tokens after 48 layers, which post-norm keeps at 1"""
        x, norm = torch.randn(10, 32), nn.LayerNorm(32)
        for _ in range(48):
            x = layer(x, nn.Linear(32, 32), norm).detach()
        return x.square().mean()

    def test(layer):
        x = layer(torch.randn(4, 32), nn.Linear(32, 32), nn.LayerNorm(32))
        size = x.square().mean(-1)
        torch.testing.assert_close(size, torch.ones(4), atol=1e-3, rtol=0)


class SkipFromBehindTheNorm(Bug):
    """The skip that starts behind the norm

    One name for two tensors: x is overwritten by its norm, and the skip carries that on.
    The model trains all the same, and who has trained one must go on running it that way.
    """

    chapter = "07_residuals_and_norms#when-it-goes-wrong"
    seen = (
        "lbcb-sci/RiNALMo#9",
        "shivanandmn/Knowledge-Tracing-SAINT#6",
        "poloclub/transformer-explainer#32",
    )

    def wrong(x, f, norm):
        x = norm(x)
        return x + f(x)

    def right(x, f, norm):
        return x + f(norm(x))

    def measure(layer):
        """Share of a token of length 100 that is lost where the sub-layer returns 0"""
        x = 100 * F.normalize(torch.randn(1, 32), dim=-1)
        y = layer(x, torch.zeros_like, nn.LayerNorm(32)).detach()
        return (y - x).norm() / 100

    def test(layer):
        x = torch.randn(4, 32)
        y = layer(x, torch.zeros_like, nn.LayerNorm(32))
        torch.testing.assert_close(y, x)


class NormInHalfPrecision(Bug):
    """The norm that returns 0

    The square of a number beyond 256 does not fit into float16.
    The mean of the squares is infinite, its inverse root is 0, and so is the token.
    """

    chapter = "07_residuals_and_norms#when-it-goes-wrong"
    seen = (
        "pytorch/pytorch#133085",
        "xlite-dev/LeetCUDA#335",
        "nntrainer/nntrainer#3935",
    )

    def wrong(x, eps=1e-6):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def right(x, eps=1e-6):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        return y.to(x.dtype)

    def ours(x):
        return RMSNorm(x.shape[-1]).to(x.dtype)(x)

    def measure(norm):
        """Length of a normed token of 64 numbers, which should be 8"""
        return norm(1000 * torch.randn(1, 64).half()).float().norm()

    def test(norm):
        x = 1000 * torch.randn(4, 64).half()
        size = norm(x).float().square().mean(-1)
        torch.testing.assert_close(size, torch.ones(4), atol=0.01, rtol=0)
