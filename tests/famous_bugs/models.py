"""Famous bugs of models: chapters 8 to 10."""

import tomllib
from pathlib import Path

import torch
from famous_bugs.bug import Bug
from packaging.requirements import Requirement

from tfm_ref import (
    TransformerConfig,
    build,
    config_from_hf,
    count_parameters,
    full_size,
    kv_cache_bytes,
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
