"""Configs: every choice does something."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from tfm_ref import Experts, Latent, QueryScaling, TransformerConfig, YaRNScaling, build
from tfm_ref.moe import MoELayer

SIZES = {"vocab_size": 11, "d_model": 12, "n_layers": 3, "n_heads": 4, "d_ff": 10}
BASE = TransformerConfig(**SIZES)
ROPE = replace(BASE, positions="rope", head_dim=4, norm_placement="pre", window=2, global_every=2)
LEARNED = replace(BASE, positions="learned", max_seq_len=9)
EXPERTS = {"d_ff": None, "experts": Experts(d_ff=5, n_experts=4, top_k=2)}
LATENT = {
    "head_dim": 3,
    "latent": Latent(kv_lora_rank=5, rope_head_dim=4, v_head_dim=2),
}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])

CHANGES = {  # one field, from a config in which it can do something
    "vocab_size": (BASE, {"vocab_size": 12}),
    "d_model": (BASE, {"d_model": 16}),
    "n_layers": (BASE, {"n_layers": 2}),
    "n_heads": (BASE, {"n_heads": 2}),
    "d_ff": (BASE, {"d_ff": 9}),
    "n_encoder_layers": (BASE, {"n_encoder_layers": 1}),
    "is_causal": (BASE, {"is_causal": False}),
    "max_seq_len": (LEARNED, {"max_seq_len": 10}),
    "n_segments": (BASE, {"n_segments": 2}),
    "scale_embeddings": (BASE, {"scale_embeddings": False}),
    "embedding_norm": (BASE, {"embedding_norm": True}),
    "tied_embeddings": (BASE, {"tied_embeddings": False}),
    "head_transform": (BASE, {"head_transform": True}),
    "head_bias": (BASE, {"head_bias": True}),
    "scale_logits": (BASE, {"scale_logits": True}),
    "logit_softcap": (BASE, {"logit_softcap": 2.0}),
    "pooler": (replace(BASE, is_causal=False), {"pooler": True}),
    "positions": (BASE, {"positions": "none"}),
    "first_position": (LEARNED, {"first_position": 2}),
    "sinusoid_halves": (BASE, {"sinusoid_halves": True}),
    "rope_theta": (ROPE, {"rope_theta": 50.0}),
    "rope_dim": (ROPE, {"rope_dim": 2}),
    "rope_interleaved": (ROPE, {"rope_interleaved": True}),
    "rope_scaling": (ROPE, {"rope_scaling": YaRNScaling(factor=2.0, original_length=4)}),
    "t5_buckets": (replace(BASE, positions="t5"), {"t5_buckets": 4}),
    "t5_max_distance": (replace(BASE, positions="t5", t5_buckets=4), {"t5_max_distance": 3}),
    "norm": (BASE, {"norm": "rms_norm"}),
    "norm_eps": (BASE, {"norm_eps": 0.5}),
    "norm_placement": (BASE, {"norm_placement": "both"}),
    "parallel": (ROPE, {"parallel": True}),
    "n_kv_heads": (BASE, {"n_kv_heads": 2}),
    "head_dim": (BASE, {"head_dim": 5}),
    "attention_bias": (BASE, {"attention_bias": "qkv"}),
    "qk_norm": (BASE, {"qk_norm": "rms_norm_no_gain"}),
    "query_scaling": (BASE, {"query_scaling": QueryScaling(length=2, strength=5.0)}),
    "attention_scale": (BASE, {"attention_scale": 3.0}),
    "attention_softcap": (BASE, {"attention_softcap": 0.1}),
    "sinks": (BASE, {"sinks": True}),
    "window": (BASE, {"window": 2}),
    "n_first": (replace(BASE, window=2), {"n_first": 1}),
    "chunked": (ROPE, {"chunked": True}),
    "global_every": (ROPE, {"global_every": 3}),
    "global_positions": (ROPE, {"global_positions": False}),
    "global_qk_norm": (replace(ROPE, qk_norm="rms_norm"), {"global_qk_norm": False}),
    "local_rope_theta": (ROPE, {"local_rope_theta": 50.0}),
    "latent": (ROPE, LATENT),
    "activation": (BASE, {"activation": "gelu"}),
    "gated": (BASE, {"gated": True}),
    "feed_forward_bias": (BASE, {"feed_forward_bias": False}),
    "experts": (BASE, EXPERTS),
    "dropout": (BASE, {"dropout": 0.5}),
    "attention_dropout": (BASE, {"attention_dropout": 0.5}),
}


def fingerprint(config: TransformerConfig) -> list:
    """Build the model with numbered weights, run it, and give all that it shows."""
    model = build(config).train()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
        torch.manual_seed(0)
        given = (TOKENS, TOKENS) if config.n_encoder_layers else (TOKENS,)
        return [type(model).__name__, shapes, model(*given).tolist()]


def test_every_field_is_tested():
    assert CHANGES.keys() == {field.name for field in fields(TransformerConfig)}


@pytest.mark.parametrize("name", CHANGES)
def test_every_choice_does_something(name):
    before, change = CHANGES[name]
    after = replace(before, **change)
    assert getattr(before, name) != getattr(after, name)
    assert fingerprint(before) == fingerprint(before)
    assert fingerprint(before) != fingerprint(after)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (replace(BASE, **EXPERTS), {"n_dense_layers": 1}),
        (replace(BASE, **EXPERTS), {"every": 2}),
        *[
            (replace(BASE, **EXPERTS), {name: value})
            for name, value in {
                "d_ff": 6,
                "n_experts": 3,
                "top_k": 3,
                "n_shared": 1,
                "score": "sigmoid",
                "normalise": False,
                "router_bias": True,
                "choice_bias": True,
                "scale": 2.0,
                "scale_input": True,
                "noise": 0.5,
                "capacity_factor": 0.1,
                "capacity": 1,
            }.items()
        ],
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_choice_of_experts_does_something(config, change):
    d_ff = 10 if change.keys() & {"n_dense_layers", "every"} else None
    other = replace(config, d_ff=d_ff, experts=replace(config.experts, **change))
    if "choice_bias" in change:
        assert build(other).stack.blocks[0].feed_forward.router.choice_bias is not None
    else:
        assert fingerprint(config) != fingerprint(other)


@pytest.mark.parametrize(
    ("n_dense_layers", "every", "mixtures"),
    [(0, 1, [0, 1, 2, 3, 4]), (2, 1, [2, 3, 4]), (1, 2, [1, 3]), (0, 3, [0, 3]), (5, 2, [])],
)
def test_which_layers_are_mixtures(n_dense_layers, every, mixtures):
    experts = Experts(d_ff=5, n_experts=4, top_k=2, n_dense_layers=n_dense_layers, every=every)
    d_ff = None if len(mixtures) == 5 else 10
    config = replace(BASE, n_layers=5, d_ff=d_ff, experts=experts)
    made = [isinstance(block.feed_forward, MoELayer) for block in build(config).stack.blocks]
    assert [layer for layer, is_mixture in enumerate(made) if is_mixture] == mixtures
    assert [layer for layer in range(5) if config.has_experts(layer)] == mixtures


def test_frozen_and_comparable():
    with pytest.raises(FrozenInstanceError):
        BASE.d_model = 3
    assert TransformerConfig(**SIZES) == BASE
    assert hash(TransformerConfig(**SIZES)) == hash(BASE)


def test_building_a_config_draws_no_random_number():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    replace(BASE, **EXPERTS)
    assert torch.equal(torch.random.get_rng_state(), before)
