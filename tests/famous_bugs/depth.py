"""Famous bugs of depth: chapters 5 to 7."""

import codecs
import math

import torch
import torch.nn.functional as F
from famous_bugs.bug import Bug
from torch import nn

from tfm_ref import RMSNorm, RotaryPositions, YaRNScaling, alibi_slopes


class CopiedNotTied(Bug):
    """The weights that are shared once

    The text says that embedding and output share one matrix, and the code copies the numbers.
    All is equal until the first step of training, and from then on there are two matrices.
    In one notebook a model of 1.24 billion parameters had 1.50 billion; in another the two lines
    that would tie them stand under `if False:`.
    """

    chapter = "05_tokens_and_embeddings#when-it-goes-wrong"
    seen = ("rasbt/LLMs-from-scratch#822", "harvardnlp/annotated-transformer#93")

    def wrong(vocab_size, d):
        embedding = nn.Embedding(vocab_size, d)
        head = nn.Linear(d, vocab_size, bias=False)
        head.weight.data.copy_(embedding.weight)
        return embedding, head

    def right(vocab_size, d):
        embedding = nn.Embedding(vocab_size, d)
        head = nn.Linear(d, vocab_size, bias=False)
        head.weight = embedding.weight
        return embedding, head

    def measure(build):
        """Matrices that training sets, at both ends"""
        ends = nn.ModuleList(build(10, 4))
        return len(list(ends.parameters()))

    def test(build):
        embedding, head = build(10, 4)
        head(embedding(torch.tensor([3]))).sum().backward()
        embedding.weight.data -= 0.1 * embedding.weight.grad
        assert torch.equal(embedding.weight, head.weight)


class HalfACharacter(Bug):
    """The character cut in two

    A server decodes token by token and sends what it has.
    A token may end in the middle of a character, and each half becomes a "�".
    In plain English nobody will ever see it.
    """

    chapter = "05_tokens_and_embeddings#when-it-goes-wrong"

    def wrong(tokens):
        for token in tokens:
            yield token.decode("utf-8", "replace")

    def right(tokens):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield decoder.decode(token)
        yield decoder.decode(b"", final=True)

    def measure(stream):
        """Signs "�" in "猫は疲れている", sent byte by byte"""
        text = "猫は疲れている".encode()
        return "".join(stream(bytes([byte]) for byte in text)).count("\ufffd")

    def test(stream):
        for text in ("The cat is tired.", "猫は疲れている"):
            tokens = [bytes([byte]) for byte in text.encode()]
            assert "".join(stream(tokens)) == text


class MixedPairings(Bug):
    """RoPE's two pairings, mixed

    Some code turns neighbours, (0, 1), (2, 3), other code number `i` with number `i + d/2`, and
    parameters trained in one must be reordered to run in the other.
    Position 0 turns nothing: the text begins well and then falls apart.
    """

    chapter = "06_positional_encodings#two-pairings"
    seen = (
        "rasbt/LLMs-from-scratch#751",
        "rasbt/LLMs-from-scratch#838",
        "karpathy/nanochat#264",
        "huggingface/transformers#34741",
        "labmlai/annotated_deep_learning_paper_implementations#215",
        "labmlai/annotated_deep_learning_paper_implementations#265",
        "jzhang38/TinyLlama#24",
        "NeuraLegion/shainet#111",
    )

    def wrong(t, positions):  # t of a model that was trained on neighbours
        omega = 10_000 ** (-torch.arange(0, t.shape[-1], 2) / t.shape[-1])
        angles = positions[:, None] * omega
        x, y = t.chunk(2, -1)
        z = torch.complex(x, y) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag], -1)

    def right(t, positions):
        omega = 10_000 ** (-torch.arange(0, t.shape[-1], 2) / t.shape[-1])
        angles = positions[:, None] * omega
        x, y = t[..., 0::2], t[..., 1::2]
        z = torch.complex(x, y) * torch.polar(torch.ones_like(angles), angles)
        return torch.stack([z.real, z.imag], -1).flatten(-2)

    def ours(t, positions):
        scheme = RotaryPositions(head_dim=t.shape[-1], interleaved=True)
        return scheme.rotation(positions[None])(t)

    def measure(rope):
        """Error of a score between a query at 500 and a key at 400, in standard deviations"""
        q, k = torch.randn(2, 1000, 1, 1, 64)
        m, n = torch.tensor([500]), torch.tensor([400])
        score, wanted = ((f(q, m) * f(k, n)).sum(-1) for f in (rope, MixedPairings.right))
        return (score - wanted).std() / wanted.std()

    def test(rope):
        e = torch.eye(4)[0].view(1, 1, 1, 4)
        late = rope(e, torch.tensor([100])).flatten()
        wanted = torch.tensor([math.cos(100), math.sin(100), 0, 0])
        assert torch.allclose(late, wanted, atol=1e-5)


class UnturnedKeys(Bug):
    """One query, many keys, none turned

    The table of cosines is cut to the length of the queries.
    A model that writes has one new query and all keys: the table has one row, that of position
    0, and broadcasting hands it to every key.
    Position 0 turns nothing, so the model writes without any positions, and no error is raised.
    """

    chapter = "06_positional_encodings#when-it-goes-wrong"

    def wrong(q, k):
        n, half = q.shape[2], q.shape[3] // 2
        omega = 10_000 ** (-torch.arange(half) / half)
        angles = torch.arange(n)[:, None] * omega
        turn = torch.polar(torch.ones_like(angles), angles)
        q, k = (torch.complex(*t.chunk(2, -1)) * turn for t in (q, k))
        return (q @ k.mH).real

    def right(q, k):
        n, half = k.shape[2], q.shape[3] // 2
        omega = 10_000 ** (-torch.arange(half) / half)
        angles = torch.arange(n)[:, None] * omega
        turn = torch.polar(torch.ones_like(angles), angles)
        q = torch.complex(*q.chunk(2, -1)) * turn[-q.shape[2] :]
        k = torch.complex(*k.chunk(2, -1)) * turn
        return (q @ k.mH).real

    def ours(q, k):
        scheme = RotaryPositions(head_dim=q.shape[3])
        turn = scheme.rotation(torch.arange(k.shape[2])[None])
        return turn(q) @ turn(k).mT

    def measure(scores):
        """Largest error of a score of the last of 100 queries, asked alone"""
        q, k = torch.randn(2, 1, 1, 100, 64)
        alone, together = scores(q[:, :, -1:], k), scores(q, k)[:, :, -1:]
        return (alone - together).abs().max().round(decimals=3)

    def test(scores):
        q, k = torch.randn(2, 1, 2, 6, 8)
        alone, together = scores(q[:, :, -1:], k), scores(q, k)[:, :, -1:]
        assert torch.allclose(alone, together, atol=1e-4)


class PositionsOnHeads(Bug):
    """The positions that fall on the heads

    Sentences padded on the left begin at different positions, so positions are (batch, length)
    and their cosines (batch, length, width).
    Multiplied with queries of (batch, heads, length, width), the batch of the one falls on the
    heads of the other.
    Where there are as many sentences as heads, no error is raised.
    """

    chapter = "06_positional_encodings#when-it-goes-wrong"
    seen = ("vukrosic/leo-optimizer#2",)

    def wrong(t, positions):
        half = t.shape[-1] // 2
        omega = 10_000 ** (-torch.arange(half) / half)
        angles = positions[..., None] * omega
        cos, sin = angles.cos(), angles.sin()
        x, y = t.chunk(2, -1)
        return torch.cat([x * cos - y * sin, x * sin + y * cos], -1)

    def right(t, positions):
        half = t.shape[-1] // 2
        omega = 10_000 ** (-torch.arange(half) / half)
        angles = positions[..., None] * omega
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        x, y = t.chunk(2, -1)
        return torch.cat([x * cos - y * sin, x * sin + y * cos], -1)

    def ours(t, positions):
        return RotaryPositions(head_dim=t.shape[-1]).rotation(positions)(t)

    def measure(rope):
        """Share of 4 heads in 4 sentences that are turned to a wrong place"""
        positions = torch.tensor([[0], [5], [10], [15]]) + torch.arange(3)
        t = torch.randn(1, 1, 3, 8).expand(4, 4, 3, 8)
        error = rope(t, positions) - PositionsOnHeads.right(t, positions)
        return (error.abs().amax((2, 3)) > 1e-3).double().mean()

    def test(rope):
        t = torch.randn(4, 4, 3, 8)
        positions = torch.tensor([[0], [5], [10], [15]]) + torch.arange(3)
        for i in range(4):
            alone = rope(t[i : i + 1], positions[i : i + 1])
            together = rope(t, positions)[i : i + 1]
            assert torch.allclose(alone, together, atol=1e-5)


class ClampedPositions(Bug):
    """The table that ends

    A table of cosines has `max_seq_len` rows.
    To spare the user an error, a position beyond the table is given the last row: then all late
    tokens stand at one place.
    """

    chapter = "06_positional_encodings#when-it-goes-wrong"

    def wrong(t, positions, max_seq_len=64):
        half = t.shape[-1] // 2
        positions = positions.clamp(max=max_seq_len - 1)
        omega = 10_000 ** (-torch.arange(half) / half)
        angles = positions[:, None] * omega
        turn = torch.polar(torch.ones_like(angles), angles)
        z = torch.complex(*t.chunk(2, -1)) * turn
        return torch.cat([z.real, z.imag], -1)

    def right(t, positions):
        half = t.shape[-1] // 2
        omega = 10_000 ** (-torch.arange(half) / half)
        angles = positions[:, None] * omega
        turn = torch.polar(torch.ones_like(angles), angles)
        z = torch.complex(*t.chunk(2, -1)) * turn
        return torch.cat([z.real, z.imag], -1)

    def ours(t, positions):
        scheme = RotaryPositions(head_dim=t.shape[-1])
        return scheme.rotation(positions[None])(t)

    def measure(rope):
        """Different places among the positions 0 to 499"""
        t = torch.ones(1, 1, 500, 8)
        turned = rope(t, torch.arange(500))[0, 0]
        return len(turned.unique(dim=0))

    def test(rope):
        scores, t = [], torch.ones(1, 1, 1, 8)
        for p in (10, 1000):
            q, k = rope(t, torch.tensor([p + 7])), rope(t, torch.tensor([p]))
            scores.append((q * k).sum())
        assert torch.allclose(*scores, atol=1e-3)


class UnevenSlopes(Bug):
    """ALiBi's slopes for 12 heads

    The paper gives the slopes of a power of two; its code has a rule of its own for other
    numbers of heads: the slopes of the power below, then every other one of the power above.
    Who fills the formula with 12 runs a published model with slopes that it was not trained
    with.
    """

    chapter = "06_positional_encodings#door-3-adding-to-the-scores"
    seen = ("ml-explore/mlx#343", "ml-explore/mlx#3071")

    def wrong(n_heads):
        return 2.0 ** (-8 * torch.arange(1, n_heads + 1) / n_heads)

    def right(n_heads):
        below = 2 ** int(math.log2(n_heads))
        slopes = 2.0 ** (-8 * torch.arange(1, below + 1) / below)
        more = 2.0 ** (-4 * torch.arange(1, 2 * below, 2) / below)
        return torch.cat([slopes, more])[:n_heads]

    def ours(n_heads):
        return alibi_slopes(n_heads)

    def measure(slopes):
        """Largest factor by which a slope of 12 heads is off"""
        ratio = slopes(12) / UnevenSlopes.right(12)
        return torch.maximum(ratio, 1 / ratio).max()

    def test(slopes):
        eight = 2.0 ** -torch.arange(1.0, 9.0)
        four = 2.0 ** -torch.tensor([0.5, 1.5, 2.5, 3.5])
        assert torch.allclose(slopes(8), eight)
        assert torch.allclose(slopes(12), torch.cat([eight, four]))


class YaRNOnPositions(Bug):
    """YaRN on the positions

    YaRN slows RoPE's slow pairs and leaves the fast ones alone.
    A notebook divided the positions instead, which slows them all, and clamped them to the
    original length, so that all late tokens stood at one place; its parity test passed, with
    scaling off.
    A library had the factor under the exponent, which slows each pair by another amount.
    """

    chapter = "06_positional_encodings#when-it-goes-wrong"
    seen = (
        "rasbt/LLMs-from-scratch#939",
        "rasbt/LLMs-from-scratch#940",
        "apache/tvm#18576",
    )

    def wrong(positions, head_dim=64, factor=8, length=512):
        omega = 10_000 ** (-torch.arange(0, head_dim, 2) / head_dim)
        positions = (positions / factor).clamp(max=length - 1)
        return positions[:, None] * omega

    def right(positions, head_dim=64, factor=8, length=512):
        omega = 10_000 ** (-torch.arange(0, head_dim, 2) / head_dim)
        slowest = length / torch.tensor([32, 1]) / (2 * math.pi)
        first, last = slowest.log() / math.log(10_000) * head_dim / 2
        first, last = first.floor().clamp(min=0), last.ceil()
        i = torch.arange(head_dim // 2)
        slowed = ((i - first) / (last - first)).clamp(0, 1)
        omega = slowed * omega / factor + (1 - slowed) * omega
        return positions[:, None] * omega

    def ours(positions, head_dim=64, factor=8, length=512):
        scaling = YaRNScaling(float(factor), length)
        return positions[:, None] * scaling.frequencies(head_dim, 10_000.0)

    def measure(angles):
        """Angle between neighbours, fastest pair, in degrees"""
        near = angles(torch.tensor([10, 11]))
        return (near[1, 0] - near[0, 0]).rad2deg()

    def test(angles):
        step = angles(torch.tensor([4000, 4001])).diff(dim=0)[0]
        unscaled = 10_000 ** (-torch.arange(0, 64, 2) / 64)
        assert math.isclose(step[0], unscaled[0], rel_tol=1e-2)
        assert math.isclose(step[-1], unscaled[-1] / 8, rel_tol=1e-2)


class MovingBase(Bug):
    """The base that moves on

    "Dynamic NTK" raises RoPE's base as the text grows.
    A cache holds keys that were turned with the base of their day, and the new query is turned
    with today's: the distance between two tokens depends on when they were written.
    Cache the keys before they are turned, or fix the factor in advance.
    """

    chapter = "06_positional_encodings#when-it-goes-wrong"
    seen = ("huggingface/transformers#25104",)

    def frequencies(length, original_length=32, width=64):
        factor = max(1.0, length / original_length)
        base = 10_000 * factor ** (width / (width - 2))
        return base ** (-torch.arange(0, width, 2) / width)

    def wrong(n):  # the angles of n keys, each cached when it came
        angles = [i * MovingBase.frequencies(i + 1) for i in range(n)]
        return torch.stack(angles)

    def right(n):
        return torch.arange(n)[:, None] * MovingBase.frequencies(n)

    def measure(angles):
        """Degrees by which one of 128 keys is turned wrongly, at most"""
        return (angles(128) - MovingBase.right(128)).abs().max().rad2deg()

    def test(angles):
        steps = angles(128).diff(dim=0)
        assert torch.allclose(steps, steps[:1], atol=1e-4)


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
