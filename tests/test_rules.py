"""Rules: choices that contradict each other are refused, by a config and what it builds."""

import re
from dataclasses import replace

import pytest
from test_config import BASE, EXPERTS, LATENT

from tfm_ref import Experts, YaRNScaling
from tfm_ref.rules import RULES

REFUSED = {
    "first_position": ({"first_position": 2}, "first_position = 2 needs positions = 'learned'"),
    "sinusoid_halves": (
        {"positions": "none", "sinusoid_halves": True},
        "sinusoid_halves = True needs positions = 'sinusoidal'; got 'none'",
    ),
    "rope_theta": ({"rope_theta": 5.0}, "rope_theta = 5.0 needs positions = 'rope'"),
    "rope_dim": ({"rope_dim": 2}, "rope_dim = 2 needs positions = 'rope'"),
    "rope_interleaved": ({"rope_interleaved": True}, "rope_interleaved = True needs positions"),
    "rope_scaling": (
        {"rope_scaling": YaRNScaling(factor=2.0, original_length=4)},
        "needs positions = 'rope'",
    ),
    "t5_buckets": ({"t5_buckets": 8}, "t5_buckets = 8 needs positions = 't5'"),
    "t5_max_distance": ({"t5_max_distance": 8}, "t5_max_distance = 8 needs positions = 't5'"),
    "local_rope_theta": (
        {"positions": "rope", "local_rope_theta": 5.0},
        "local_rope_theta = 5.0 needs global_every to be given; got None",
    ),
    "global_positions": ({"global_positions": False}, "needs global_every to be given; got None"),
    "chunked": ({"chunked": True}, "chunked = True needs window to be given; got None"),
    "n_first": ({"n_first": 2}, "n_first = 2 needs window to be given; got None"),
    "global_every": ({"global_every": 2}, "global_every = 2 needs window to be given; got None"),
    "window": (
        {"is_causal": False, "window": 2},
        "window = 2 needs is_causal = True; got False",
    ),
    "n_encoder_layers": (
        {"is_causal": False, "n_encoder_layers": 2},
        "n_encoder_layers = 2 needs is_causal = True; got False",
    ),
    "n_segments": (
        {"n_segments": 2, "n_encoder_layers": 1},
        "n_segments = 2 needs n_encoder_layers = 0; got 1",
    ),
    "pooler": ({"pooler": True}, "pooler = True needs is_causal = False; got True"),
    "parallel": ({"parallel": True}, "parallel = True needs norm_placement = 'pre'; got 'post'"),
    "n_kv_heads": (
        {"positions": "rope", "n_kv_heads": 2, **LATENT},
        "n_kv_heads = 2 needs latent = None; got Latent(",
    ),
    "global_qk_norm": (
        {"qk_norm": "rms_norm", "global_qk_norm": False},
        "global_qk_norm = False needs global_every to be given; got None",
    ),
    "qk_norm": (
        {"positions": "rope", "qk_norm": "rms_norm", **LATENT},
        "qk_norm = 'rms_norm' needs latent = None",
    ),
    "attention_softcap": (
        {"positions": "rope", "attention_softcap": 2.0, **LATENT},
        "attention_softcap = 2.0 needs latent = None",
    ),
    "sinks": ({"positions": "rope", "sinks": True, **LATENT}, "sinks = True needs latent = None"),
    "latent": (LATENT, "needs positions = 'rope'; got 'sinusoidal'"),
}


def test_every_rule_is_tested():
    assert {name for names, _, _ in RULES for name in names} == REFUSED.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *REFUSED.values(),
        (
            {"parallel": True, "norm_placement": "pre", "n_encoder_layers": 1},
            "parallel = True needs n_encoder_layers = 0; got 1",
        ),
        (
            {"positions": "rope", "n_encoder_layers": 1, **LATENT},
            "needs n_encoder_layers = 0; got 1",
        ),
        ({"window": 2, "n_encoder_layers": 1}, "window = 2 needs n_encoder_layers = 0; got 1"),
        (
            {"positions": "t5", "t5_buckets": 3, "n_encoder_layers": 1},
            "n_buckets must be an integer of at least 4; got 3",
        ),
        (
            {"positions": "rope", **LATENT, "head_dim": None},
            "latent attention needs head_dim to be given, and attention_bias to be True or False; "
            "got None and False",
        ),
        (
            {"positions": "rope", **LATENT, "attention_bias": "qkv"},
            "attention_bias to be True or False; got 3 and 'qkv'",
        ),
        (
            {"positions": "rope", "head_dim": 4, "rope_dim": 6},
            "rope_dim must be an integer from 2 to 4; got 6",
        ),
        (
            {"positions": "rope", "head_dim": 4, "rope_dim": 0},
            "rope_dim must be an integer from 2 to 4; got 0",
        ),
        (
            {"positions": "rope", "head_dim": 4, "local_rope_theta": 1.0}
            | {"window": 2, "global_every": 2},
            "theta must be finite and above 1; got 1.0",
        ),
        (
            {"window": 2, "global_every": 2, "global_qk_norm": False},
            "global_qk_norm = False needs qk_norm to be given; got None",
        ),
        ({"qk_norm": True}, "qk_norm must be one of layer_norm, layer_norm_no_bias, rms_norm, rms"),
        ({"norm_eps": -1.0}, "norm_eps must be at least 0; got -1.0"),
        ({"positions": "rope", "rope_dim": 2, **LATENT}, "rope_dim = 2 needs latent = None"),
        ({"positions": "rotary"}, "positions must be one of none, learned, sinusoidal, rope, al"),
        ({"norm": "batch_norm"}, "norm must be one of layer_norm, layer_norm_no_bias, rms_norm"),
        ({"norm_placement": "mid"}, "norm_placement must be one of pre, post, both"),
        ({"activation": "tanh"}, "activation must be one of relu, gelu, gelu_tanh, silu"),
        ({"positions": "learned"}, "positions = 'learned' needs max_seq_len to be given"),
        ({"is_causal": "no"}, "is_causal must be True or False; got 'no'"),
        ({"is_causal": None}, "is_causal must be True or False; got None"),
        ({"gated": 1}, "gated must be True or False; got 1"),
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1; got 0"),
        ({"n_layers": 0}, "n_layers must be an integer of at least 1; got 0"),
        ({"n_heads": 0, "positions": "none"}, "n_heads must be an integer of at least 1; got 0"),
        ({"d_model": 0}, "d_model must be an integer of at least 1; got 0"),
        ({"n_layers": True}, "n_layers must be an integer of at least 1; got True"),
        ({"n_encoder_layers": -1}, "n_encoder_layers must be an integer of at least 0; got -1"),
        ({"n_segments": -1}, "n_segments must be an integer of at least 0; got -1"),
        ({"max_seq_len": 0}, "max_seq_len must be an integer of at least 1; got 0"),
        ({"window": 0}, "window must be an integer of at least 1; got 0"),
        ({"window": 2, "n_first": -1}, "n_first must be an integer of at least 0; got -1"),
        (
            {"window": 2, "chunked": True, "n_first": 1},
            "n_first = 1 needs chunked = False; got True",
        ),
        ({"window": 2, "global_every": 0}, "global_every must be an integer of at least 1; got 0"),
        (
            {"positions": "learned", "max_seq_len": 4, "first_position": -1},
            "first_position must be an integer of at least 0; got -1",
        ),
        ({"n_heads": 5}, "d_model (12) must be divisible by n_heads (5)"),
        ({"n_kv_heads": 3}, "n_heads (4) must be a multiple of n_kv_heads (3)"),
        ({"attention_bias": "qx"}, 'bias must be True, False or letters of "qkvo"'),
        ({"attention_softcap": 0.0}, "softcap must be finite and above 0; got 0.0"),
        ({"logit_softcap": 0.0}, "softcap must be finite and above 0; got 0.0"),
        ({"dropout": 1.0}, "dropout must lie in 0 <= dropout < 1; got 1.0"),
        ({"attention_dropout": 1.0}, "dropout must lie in 0 <= dropout < 1; got 1.0"),
        ({"positions": "rope", "head_dim": 3}, "width that positions pair must be even; got 3"),
        ({"norm_eps": -1.0, "norm": "rms_norm"}, "eps must be at least 0; got -1.0"),
        ({"d_ff": None}, "some layer has a plain feed-forward; got d_ff None and 3 such layers"),
        (EXPERTS | {"d_ff": 9}, "some layer has a plain feed-forward; got d_ff 9 and 0 such"),
        (
            {"experts": Experts(d_ff=5, n_experts=4, top_k=2, n_dense_layers=4)},
            "n_dense_layers must be an integer from 0 to 3; got 4",
        ),
        (
            {"experts": Experts(d_ff=5, n_experts=4, top_k=2, every=0)},
            "every must be an integer of at least 1; got 0",
        ),
        (
            {"experts": Experts(d_ff=5, n_experts=4, top_k=2, every=2)} | {"d_ff": None},
            "some layer has a plain feed-forward; got d_ff None and 1 such layers",
        ),
        (
            {"experts": Experts(d_ff=5, n_experts=4, top_k=5, n_dense_layers=1)},
            "top_k must be an integer from 1 to 4; got 5",
        ),
    ],
)
def test_contradictions_are_refused(change, message, no_shape_checks):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(BASE, **change)
