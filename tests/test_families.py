"""Families: which settings are read and which refused, and that nothing of a model is lost."""

import re

import pytest
from oracles import redraw, tiny
from public_settings import FIRST, LLAMA, usual

from tfm_ref import MODELS, build, config_from_hf, to_hf
from tfm_ref.families import FAMILIES
from tfm_ref.families.family import HFConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama9"}, "model_type must be one of gpt2, bert, roberta, t5"),
        ({"hidden_act": "mish"}, "hidden_act must be one of relu, gelu, gelu_new"),
        ({"mlp_bias": True}, "mlp_bias must be False; got True"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type must be one of default, linear, yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, 'config.json must have "factor"; it has'),
        ({"num_attention_heads": 5}, "d_model (12) must be divisible by n_heads (5)"),
    ],
)
def test_settings_that_are_not_built(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_from_hf(LLAMA | change)


def test_settings_that_are_missing():
    optional = {"rope_theta", "tie_word_embeddings", "num_key_value_heads"}
    for key in LLAMA:
        fewer = {k: v for k, v in LLAMA.items() if k != key}
        if key in optional:
            config_from_hf(fewer)
        else:
            with pytest.raises(ValueError, match=f'config.json must have "{key}"'):
                config_from_hf(fewer)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_family_excludes(model_type):
    """Every setting that must have one value is refused with another."""
    settings = usual(model_type)
    config_from_hf(settings)
    for key, wanted in FAMILIES[model_type].only.items():
        group, _, name = key.rpartition(".")
        other = "another value"
        changed = settings | ({group: settings[group] | {name: other}} if group else {key: other})
        if callable(wanted):
            wanted = wanted(HFConfig(changed))
        with pytest.raises(ValueError, match=re.escape(f"{key} must be {wanted!r}; got 'another")):
            config_from_hf(changed)


def test_every_family_has_a_parity_case():
    assert FIRST.keys() == FAMILIES.keys()


# --- where RoPE is written


def test_the_settings_of_rope_stand_in_three_places():
    scaled = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled |= {"original_max_position_embeddings": 8192}
    plain = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    of_4 = plain | {"rope_theta": 5e5, "rope_scaling": scaled | {"rope_type": "llama3"}}
    of_3 = plain | {"rope_theta": 5e5, "rope_scaling": scaled | {"type": "llama3"}}
    of_5 = plain | {"rope_parameters": scaled | {"rope_type": "llama3", "rope_theta": 5e5}}
    assert config_from_hf(of_3) == config_from_hf(of_4) == config_from_hf(of_5)
    assert config_from_hf(of_5).rope_theta == 5e5
    assert config_from_hf(of_5).rope_scaling == MODELS["Llama-3.1-405B"].config.rope_scaling
    assert config_from_hf(plain).rope_theta == 10_000.0
    assert config_from_hf(plain | {"rope_scaling": None}).rope_scaling is None
    for part in {"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}:
        with pytest.raises(ValueError, match=re.escape("partial_rotary_factor must be 1.0; got 0")):
            config_from_hf(LLAMA | part)


# --- what a family says in its own way


@pytest.mark.parametrize(
    ("model_type", "theta"),
    [
        ("llama", 1e4),
        ("falcon", 1e4),
        ("mixtral", 1e6),
        ("gemma3_text", 1e6),
        ("llama4_text", 5e5),
        ("gpt_oss", 1.5e5),
    ],
)
def test_a_base_that_is_not_written_is_that_of_the_family(model_type, theta):
    settings = usual(model_type)
    del settings["rope_parameters"]
    assert config_from_hf(settings | {"rope_local_base_freq": 50.0}).rope_theta == theta


def test_nothing_stretches_the_layers_with_a_window():
    """Files of version 4 say so by leaving it out, those of version 5 by a type."""
    settings = usual("gemma3_text")
    of_5, kinds = config_from_hf(settings), settings.pop("rope_parameters")
    of_4 = {"rope_theta": 900.0, "rope_local_base_freq": 50.0}
    of_4 |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert config_from_hf(settings | of_4) == of_5
    kinds["sliding_attention"]["rope_type"] = "linear"
    message = 'rope_type of sliding_attention must be one of default; got "linear"'
    with pytest.raises(ValueError, match=re.escape(message)):
        config_from_hf(settings | {"rope_parameters": kinds})


def test_the_activation_of_falcon():
    settings = usual("falcon")
    del settings["activation"]
    assert config_from_hf(settings).activation == "gelu"
    assert config_from_hf(settings | {"activation": "relu"}).activation == "relu"
    with pytest.raises(ValueError, match="activation must be one of relu, gelu, gelu_new"):
        config_from_hf(settings | {"activation": "mish"})


def test_how_deepseek_chooses_experts():
    settings = usual("deepseek_v2")
    assert config_from_hf(settings).experts.n_groups == 4
    assert config_from_hf(settings | {"topk_method": "greedy"}).experts.n_groups == 1
    with pytest.raises(ValueError, match="topk_method must be one of greedy, group_limited_greedy"):
        config_from_hf(settings | {"topk_method": "noaux_tc"})


def test_the_layers_of_llama_4():
    """Files list them or say every how many-th; a list that is empty says nothing."""
    settings = usual("llama4_text")
    config = config_from_hf(settings)
    assert (config.window, config.global_every, config.n_layers) == (5, 4, 4)
    del settings["layer_types"], settings["moe_layers"]
    for listed in [1, 1, 1, 0], [], None:
        assert config_from_hf(settings | {"no_rope_layers": listed}) == config
    half = settings | {"no_rope_layers": None, "no_rope_layer_interval": 2}
    assert config_from_hf(half).global_every == 2
    with pytest.raises(ValueError, match=r"layer_types must be \['chunked_attention', 'full_at"):
        config_from_hf(half | {"layer_types": ["chunked_attention"] * 4})
    with pytest.raises(ValueError, match=r"moe_layers must be \[0, 1, 2, 3\]; got \[1\]"):
        config_from_hf(settings | {"moe_layers": [1]})
    with pytest.raises(ValueError, match="global_positions = False needs global_every to be given"):
        config_from_hf(settings | {"attention_chunk_size": None})
    yarn = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 2.0}
    with pytest.raises(ValueError, match=r'rope_type must be one of [a-z0-9, ]*; got "yarn"'):
        config_from_hf(settings | {"rope_parameters": yarn})


def test_the_layers_of_switch():
    """Every second is a mixture, beginning with the second; in both stacks."""
    settings = usual("switch_transformers")
    config = config_from_hf(settings)
    assert (config.n_encoder_layers, config.n_layers) == (4, 2)
    assert [layer for layer in range(4) if config.encoder.has_experts(layer)] == [1, 3]
    assert [layer for layer in range(2) if config.has_experts(layer)] == [1]
    every = {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 2}
    assert config_from_hf(settings | every).d_ff is None
    third = {"num_layers": 6, "num_decoder_layers": 3}
    third = config_from_hf(settings | third | {"num_sparse_encoder_layers": 2})
    assert [layer for layer in range(6) if third.encoder.has_experts(layer)] == [1, 4]
    assert (third.experts.noise, third.experts.capacity) == (0.01, 64)
    alike = {"num_decoder_layers": None, "num_sparse_decoder_layers": 2}
    assert config_from_hf(settings | alike).n_layers == 4
    for other, steps in (
        ({"num_sparse_decoder_layers": 2}, "[2, 1]"),
        (
            {"num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0},
            "[0, 0]",
        ),
    ):
        message = f"every n-th layer must be a mixture, in both stacks; got n = {steps}"
        with pytest.raises(ValueError, match=re.escape(message)):
            config_from_hf(settings | other)


TWO_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def test_windows_are_read_from_the_list_of_layers():
    mistral = LLAMA | {"model_type": "mistral", "sliding_window": 4}
    assert config_from_hf(mistral).window == 4
    assert config_from_hf(mistral | {"sliding_window": None}).window is None
    kinds = ["sliding_attention", "full_attention"]
    config = config_from_hf(mistral | {"layer_types": kinds})
    assert (config.window, config.global_every) == (4, 2)
    assert config_from_hf(mistral | {"layer_types": kinds[1:] * 2}).window is None
    with pytest.raises(ValueError, match="each of layer_types must be one of sliding_attention, f"):
        config_from_hf(mistral | {"layer_types": ["chunked_attention", kinds[1]]})
    with pytest.raises(ValueError, match=r'config\.json must have "sliding_window"'):
        config_from_hf(LLAMA | {"model_type": "mistral"})
    assert config_from_hf(LLAMA | {"model_type": "mixtral"} | TWO_EXPERTS).window is None
    assert config_from_hf(mistral | {"model_type": "mixtral"} | TWO_EXPERTS).window == 4
    for qwen in "qwen2", "qwen3":  # a window that is not said to be used is not
        assert config_from_hf(mistral | {"model_type": qwen}).window is None
    with pytest.raises(ValueError, match=r"must have num_hidden_layers \(2\) entries; got 1"):
        config_from_hf(mistral | {"layer_types": kinds[:1]})
    with pytest.raises(ValueError, match="every n-th layer must have no window; got layer_types"):
        config_from_hf(mistral | {"num_hidden_layers": 3, "layer_types": [*kinds[::-1], kinds[0]]})


# --- names


KINDS = {
    "GPT-2": "gpt2",
    "BERT": "bert",
    "RoBERTa": "roberta",
    "T5": "t5",
    "BART": "bart",
    "BLOOM": "bloom",
    "MPT": "mpt",
    "Llama-1": "llama",
    "Llama-2": "llama",
    "Llama-3": "llama",
    "Llama-4": "llama4_text",
    "Mistral": "mistral",
    "Qwen2.5": "qwen2",
    "Qwen3-8B": "qwen3",
    "Qwen3-235B": "qwen3_moe",
    "DeepSeek-LLM": "llama",
    "Gemma-2": "gemma2",
    "Gemma-3": "gemma3_text",
    "Mixtral": "mixtral",
    "gpt-oss": "gpt_oss",
    "DeepSeek-V2": "deepseek_v2",
    "DeepSeek-V3": "deepseek_v3",
}
UNSPELLED = {"Transformer-base", "Transformer-big", "GPT-3 175B", "PaLM-540B"}


def test_every_model_of_the_zoo_is_written():
    """Where a family spells a model, nothing of it is lost on the way."""
    spelled = {n: kind for start, kind in KINDS.items() for n in MODELS if n.startswith(start)}
    assert MODELS.keys() - spelled.keys() == UNSPELLED
    for name, kind in spelled.items():
        model = redraw(build(tiny(MODELS[name].config)))
        tensors = to_hf(model, kind)
        numbers = sum(t.numel() for t in tensors.values())
        assert numbers >= sum(p.numel() for p in model.parameters())
        assert not any("#" in n or "*" in n for n in tensors)
