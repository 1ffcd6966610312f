"""Famous bugs of models: chapters 8 to 10."""

import math
import tomllib
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from famous_bugs.bug import Bug
from packaging.requirements import Requirement
from torch import nn

from tfm_ref import (
    Stack,
    TransformerConfig,
    attention_maps,
    build,
    config_from_hf,
    count_parameters,
    full_size,
    kv_cache_bytes,
    label_smoothed_cross_entropy,
    scaled_dot_product_attention,
)

QWEN3 = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
QWEN3_235B = {
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
}


class MapsWithoutTheMask(Bug):
    """Maps of a model that nobody has trained

    To collect the maps of attention, each layer is asked for its weights, with the mask.
    Then the tokens are passed on through the layer, and there the mask is forgotten.
    All maps look causal; from the second layer on they are made of tokens that saw the future.
    """

    chapter = "08_architecture_variants#when-it-goes-wrong"

    def two_texts():
        sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 32}
        config = TransformerConfig(vocab_size=2, positions="none", **sizes)
        stack, x = Stack(config), torch.randn(1, 6, 16)
        for p in stack.parameters():
            nn.init.normal_(p)
        y = x.clone()
        y[:, -1] = torch.randn(16)  # the last token changes
        return stack, x, y

    def wrong(stack, x):
        maps = []
        for block in stack.blocks:
            maps.append(block.attention.attention_weights(x, is_causal=True))
            x = block(x)
        return maps

    def right(stack, x):
        maps = []
        for block in stack.blocks:
            maps.append(block.attention.attention_weights(x, is_causal=True))
            x = block(x, is_causal=True)
        return maps

    def ours(stack, x):
        return list(attention_maps(stack, x).values())

    def measure(maps_of):
        """How far a weight of an earlier token moves when the last token changes"""
        stack, x, y = MapsWithoutTheMask.two_texts()
        move = maps_of(stack, y)[1] - maps_of(stack, x)[1]
        return move[..., :-1, :].abs().max().detach()

    def test(maps_of):
        stack, x, y = MapsWithoutTheMask.two_texts()
        before, after = maps_of(stack, x)[1], maps_of(stack, y)[1]
        torch.testing.assert_close(before[..., :-1, :], after[..., :-1, :])


class CausalMaskInTheWrongCorner(Bug):
    """The causal mask in the wrong corner

    With as many queries as keys there is one causal mask.
    With keys in a cache there are fewer queries, and the mask belongs in the bottom right corner.
    Aligned at the top left, the newest token sees the first key and nothing else.
    """

    chapter = "08_architecture_variants#when-it-goes-wrong"
    seen = (
        "pytorch/pytorch#108108",
        "Dao-AILab/flash-attention#517",
        "meta-llama/llama#899",
    )

    def wrong(q, k, v):
        n, m = q.shape[2], k.shape[2]
        mask = torch.ones(n, m).tril().bool()
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v

    def right(q, k, v):
        n, m = q.shape[2], k.shape[2]
        mask = torch.ones(n, m).tril(m - n).bool()
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v

    def ours(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def measure(attention):
        """How many of 100 keys in a cache the newest token sees"""
        q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 100, 8)
        weights = attention(q, k, torch.eye(100)[None, None])
        return (weights > 0).sum()

    def test(attention):
        q, k, v = torch.randn(3, 1, 1, 7, 8)
        whole = attention(q, k, v)
        for first in range(7):
            rest = attention(q[:, :, first:], k, v)
            torch.testing.assert_close(rest, whole[:, :, first:])


class TargetNotShifted(Bug):
    """The target that stands in the input

    What the model reads and what it must predict are the same row, place by place.
    A causal mask does not help, for a token may see itself.
    The model learns to copy, its loss falls to nothing, and it cannot write a word.
    """

    chapter = "08_architecture_variants#when-it-goes-wrong"
    seen = ("Project-MONAI/GenerativeModels#314",)

    def copier(text):
        return 10.0 * F.one_hot(text, 6)  # logits: what has just been read

    def wrong(model, text):
        return F.cross_entropy(model(text).mT, text)

    def right(model, text):
        return F.cross_entropy(model(text[:, :-1]).mT, text[:, 1:])

    def measure(loss):
        """The loss of a model that only repeats what it reads"""
        return loss(TargetNotShifted.copier, torch.arange(6)[None])

    def test(loss):
        text = torch.arange(6)[None]
        guessing = math.log(6)
        assert loss(TargetNotShifted.copier, text) > guessing


class SmoothedToNaN(Bug):
    """The loss that is not a number

    The smoothed target is built by hand, with a 0 for the padding.
    Where the model gives it probability 0, too, the term is 0 times minus infinity.
    On paper that is 0; here it is NaN, and a curve of such losses is empty.
    """

    chapter = "09_training_and_translation#when-it-goes-wrong"
    seen = (
        "harvardnlp/annotated-transformer#18",
        "harvardnlp/annotated-transformer#109",
    )

    def wrong(log_p, q):
        return F.kl_div(log_p, q, reduction="sum")

    def right(log_p, q):
        counts = q > 0
        return F.kl_div(log_p[counts], q[counts], reduction="sum")

    def measure(loss):
        """The loss of a model that guesses among all tokens but the padding"""
        q = torch.tensor([0.0, 0.04, 0.9, 0.03, 0.03])  # <pad> is the first
        p = torch.tensor([0.0, 0.25, 0.25, 0.25, 0.25])
        return loss(p.log(), q)

    def test(loss):
        q = torch.tensor([0.0, 0.04, 0.9, 0.03, 0.03])
        p = torch.tensor([0.0, 0.25, 0.25, 0.25, 0.25])
        torch.testing.assert_close(loss(q.log(), q), torch.tensor(0.0))
        assert 0 < loss(p.log(), q) < math.inf


class WrittenFromPadding(Bug):
    """The text that begins with padding

    In training each target begins with token 1; writing begins with token 0, the padding.
    A large model guesses its way back and loses the first words.
    The one here, a table of what follows what, never finds its way back.
    """

    chapter = "09_training_and_translation#when-it-goes-wrong"
    seen = ("harvardnlp/annotated-transformer#127",)

    def train(targets):
        follows = torch.zeros(10, 10)
        follows[targets[:, :-1], targets[:, 1:]] = 1.0
        return follows

    def wrong(follows, n):
        text = [0]  # <pad>
        for _ in range(n):
            text.append(follows[text[-1]].argmax().item())
        return text[1:]

    def right(follows, n):
        text = [1]  # <bos>
        for _ in range(n):
            text.append(follows[text[-1]].argmax().item())
        return text[1:]

    def measure(write):
        """How many of 5 tokens are right"""
        targets = torch.tensor([[1, 4, 2, 8, 5, 7]])
        written = torch.tensor([write(WrittenFromPadding.train(targets), 5)])
        return (written == targets[:, 1:]).sum()

    def test(write):
        targets = torch.tensor([[1, 4, 2, 8, 5, 7]])
        model = WrittenFromPadding.train(targets)
        assert write(model, 5) == targets[0, 1:].tolist()


class MeanOfMeans(Bug):
    """The mean of means

    A batch that does not fit into memory is computed in parts, and their losses are averaged.
    In a short part each token counts more than in a long one.
    The gradient is that of another loss, and no shape or error tells.
    """

    chapter = "09_training_and_translation#when-it-goes-wrong"
    seen = ("huggingface/transformers#34191",)

    def wrong(parts):
        means = [F.cross_entropy(*part) for part in parts]
        return sum(means) / len(means)

    def right(parts):
        sums = [F.cross_entropy(*part, reduction="sum") for part in parts]
        return sum(sums) / sum(len(t) for _, t in parts)

    def ours(parts):
        loss = partial(label_smoothed_cross_entropy, smoothing=0.0)
        both = [loss(logits[None], t[None]) for logits, t in parts]
        return sum(total for total, _ in both) / sum(n for _, n in both)

    def measure(loss):
        """How much more a token that is alone in its part counts than one of 99"""
        logits = torch.zeros(100, 9, requires_grad=True)
        t = torch.zeros(100).long()
        loss([(logits[:1], t[:1]), (logits[1:], t[1:])]).backward()
        return logits.grad[0].norm() / logits.grad[1].norm()

    def test(loss):
        logits, t = torch.randn(10, 9), torch.randint(9, (10,))
        cut = [(logits[:2], t[:2]), (logits[2:], t[2:])]
        torch.testing.assert_close(loss(cut), loss([(logits, t)]))


class DividedHeadWidth(Bug):
    """The width of a head, divided out

    In 2017 the heads filled the width of the model, and many programs still divide one by the
    other.
    Where a config has a `head_dim` of its own, the cache that they plan has the wrong size.
    A server that did so wrote keys and values over the parameters.
    """

    chapter = "03_how_many_heads#when-it-goes-wrong"
    seen = (
        "LMCache/LMCache#688",
        "vllm-project/vllm#2622",
        "deepspeedai/DeepSpeed#8389",
        "NVIDIA/Model-Optimizer#2482",
    )

    def wrong(hf):
        g, layers = hf["num_key_value_heads"], hf["num_hidden_layers"]
        d_k = hf["hidden_size"] // hf["num_attention_heads"]
        return 2 * 2 * layers * g * d_k  # keys and values, 2 bytes a number

    def right(hf):
        g, layers = hf["num_key_value_heads"], hf["num_hidden_layers"]
        d_k = hf["hidden_size"] // hf["num_attention_heads"]
        d_k = hf.get("head_dim") or d_k
        return 2 * 2 * layers * g * d_k  # keys and values, 2 bytes a number

    def ours(hf):
        # QWEN3 holds the fields that do not matter here
        return kv_cache_bytes(build(config_from_hf(QWEN3 | hf)))

    def measure(bytes_per_token):
        """Gigabytes that a cache for 131,072 tokens of Qwen3 235B is given"""
        return bytes_per_token(QWEN3_235B) * 131_072 / 1e9

    def test(bytes_per_token):
        hf = {"hidden_size": 32, "num_hidden_layers": 2}
        hf |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        assert bytes_per_token(hf) == 2 * 2 * 2 * 2 * 8
        hf |= {"head_dim": 16}  # and not 32 / 4
        assert bytes_per_token(hf) == 2 * 2 * 2 * 2 * 16


class TiedCountedTwice(Bug):
    """Tied parameters, counted twice

    A matrix that serves as embedding and as head stands in a `state_dict` under both names.
    A sum over it counts both; `parameters()` gives each tensor once.
    The size is off by the whole vocabulary, and the file that is planned for it is too.
    """

    chapter = "05_tokens_and_embeddings#one-matrix-at-both-ends"

    def wrong(model):
        return sum(t.numel() for t in model.state_dict().values())

    def right(model):
        return sum(p.numel() for p in model.parameters())

    def ours(model):
        return count_parameters(model).total

    def measure(count):
        """Millions of parameters of GPT-2 small"""
        return count(full_size("GPT-2 small")) / 1e6

    def test(count):
        sizes = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 16}
        sizes |= {"vocab_size": 11, "positions": "rope"}
        model = build(TransformerConfig(**sizes, tied_embeddings=True))
        tensors = model.state_dict().values()
        held = {t.data_ptr(): t.numel() for t in tensors}
        assert count(model) == sum(held.values())


class DefaultBase(Bug):
    """The base of RoPE, looked for in the wrong place

    The base stood at the top of `config.json` and now stands in `rope_parameters`.
    Code that asks for it with a default gets the default, and nothing fails.
    The first token has angle 0 and is right; all later ones turn at the wrong speed.
    """

    chapter = "10_real_models#when-it-goes-wrong"
    seen = ("deepspeedai/DeepSpeed#8341", "deepspeedai/DeepSpeed#8345")

    def wrong(hf):
        return hf.get("rope_theta", 10_000.0)

    def right(hf):
        inside = hf.get("rope_parameters") or {}
        return inside.get("rope_theta") or hf["rope_theta"]

    def ours(hf):
        # QWEN3 holds the fields that do not matter here
        return config_from_hf(QWEN3 | hf).rope_theta

    def measure(base):
        """Full turns too many, or too few, of the second of 64 pairs at token 8,192"""
        read = base({"rope_parameters": {"rope_theta": 500_000.0}})
        turns = [8192 * b ** (-1 / 64) for b in (read, 500_000.0)]
        return abs(turns[0] - turns[1]) / (2 * torch.pi)

    def test(base):
        top = {"rope_theta": 5e5}
        inside = {"rope_type": "default", "rope_theta": 5e5}
        assert base(top) == base({"rope_parameters": inside}) == 5e5


class PinnedEnvironment(Bug):
    """Environment rot: a requirement with an exact pin

    A notebook that asks for one version of a library, or for a library that nobody keeps up, runs
    until newer versions of all else no longer fit.
    Then no cell runs any more, though nobody has touched it.
    A lower bound lets new versions in, and a test with the oldest and the newest says whether they
    work.
    """

    seen = (
        "harvardnlp/annotated-transformer#46",
        "harvardnlp/annotated-transformer#124",
        "harvardnlp/annotated-transformer#133",
        "pytorch/tutorials#2895",
        "d2l-ai/d2l-en#2474",
        "d2l-ai/d2l-en#2608",
        "d2l-ai/d2l-en#2625",
        "d2l-ai/d2l-en#2659",
    )

    def wrong():
        return ["numpy==2.0", "torch==2.11"]

    def right():
        return ["numpy>=2.0", "torch>=2.11"]

    def ours():
        file = Path(__file__).parents[2] / "pyproject.toml"
        return tomllib.loads(file.read_text("utf-8"))["project"]["dependencies"]

    def measure(requirements):
        """How many of torch 2.11, 2.12 and 2.13 it refuses"""
        asked = {r.name: r.specifier for r in map(Requirement, requirements())}
        return sum(v not in asked["torch"] for v in ("2.11", "2.12", "2.13"))

    def test(requirements):
        asked = {r.name: r.specifier for r in map(Requirement, requirements())}
        for version in "2.11", "2.12", "2.13":
            assert version in asked["torch"], f"torch {version} is refused"
        exact = [name for name, bound in asked.items() if "==" in str(bound)]
        assert not exact, f"pinned: {exact}"
