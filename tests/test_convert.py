"""Checkpoints as files and dictionaries have them: what is read, what is refused, and why."""

import json
import pickle
import re
from dataclasses import replace

import pytest
import torch
from oracles import redraw, tiny
from parity.cases import CASES
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from tfm_ref import (
    MODELS,
    MultiHeadAttention,
    TransformerConfig,
    build,
    config_from_hf,
    from_hf,
    kv_cache_bytes,
    load_safetensors,
    pool_kv_heads,
    to_hf,
)
from tfm_ref.families import FAMILIES, HFConfig

LLAMA = {
    "model_type": "llama",
    "vocab_size": 13,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 10,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


def state(settings=LLAMA):
    """Give the tensors of a model with these settings, by the names of its family."""
    return to_hf(redraw(build(config_from_hf(settings))), settings["model_type"])


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder: config.json and one file of tensors."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    save_file(state(), tmp_path / "model.safetensors")
    return tmp_path


# --- what is read


def test_a_folder_with_one_file(folder):
    model = load_safetensors(str(folder))
    assert not model.training
    assert torch.equal(model(TOKENS), from_hf(state(), LLAMA)(TOKENS))


def test_a_folder_with_several_files(folder):
    whole, names = load_safetensors(folder)(TOKENS), list(state())
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(names)}
    for place in set(places.values()):
        part = {name: t for name, t in state().items() if places[name] == place}
        save_file(part, folder / place)
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    assert torch.equal(load_safetensors(folder)(TOKENS), whole)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=re.escape("must hold model-00002-of-00003.safetensors")):
        load_safetensors(folder)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise RuntimeError('a file ran code')",))


def test_nothing_is_unpickled(folder):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    load_safetensors(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(Exception, match=r"(?i)header"):
        load_safetensors(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=re.escape(f"{folder} must hold {name}")):
        load_safetensors(folder)


def test_dtype_is_that_of_the_file(folder):
    halved = {name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(halved, folder / "model.safetensors")
    assert load_safetensors(folder)(TOKENS).dtype == torch.bfloat16


def test_tensors_are_copied():
    tensors = state()
    model = from_hf(tensors, LLAMA)
    before = model(TOKENS)
    for t in tensors.values():
        t.zero_()
    assert torch.equal(model(TOKENS), before)


def test_experts_may_come_in_any_order():
    """Sorted by name, expert 10 stands before expert 2."""
    few = {"num_local_experts": 11, "num_experts_per_tok": 2}
    settings = LLAMA | few | {"model_type": "mixtral"}
    tensors = state(settings)
    model = from_hf(dict(sorted(tensors.items())), settings)
    assert_close(to_hf(model, "mixtral"), tensors)


def test_buffers_of_angles_are_ignored():
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    assert_close(from_hf(state() | extra, LLAMA)(TOKENS), from_hf(state(), LLAMA)(TOKENS))


BERT = {
    "model_type": "bert",
    "vocab_size": 13,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 10,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}


def test_a_bert_of_the_first_years():
    """Its norms have gammas and betas; it has a pooler and a head for the next sentence."""
    tensors = to_hf(redraw(build(replace(config_from_hf(BERT), pooler=True))), "bert")
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} < tensors.keys()
    old = {
        re.sub(r"LayerNorm\.(weight|bias)", lambda m: m[0].replace(m[1], OLD[m[1]]), name): t
        for name, t in tensors.items()
        if not name.startswith("cls.predictions.decoder")
    }
    old |= {
        "cls.seq_relationship.weight": torch.ones(2, 12),
        "bert.embeddings.position_ids": TOKENS,
    }
    model = from_hf(old, BERT)
    assert torch.equal(model(TOKENS), from_hf(tensors, BERT)(TOKENS))
    assert model.pool(TOKENS).shape == (1, 12)


OLD = {"weight": "gamma", "bias": "beta"}


GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 13,
    "n_embd": 12,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 16,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}


def test_tensors_lie_in_memory_as_layers_keep_them():
    """GPT-2 stores its matrices turned; files of safetensors take none that is a mere view."""
    parameters = from_hf(state(GPT2), GPT2).parameters()
    assert all(p.is_contiguous() for p in parameters)


def test_a_checkpoint_without_the_prefix_of_its_body():
    settings = GPT2
    tensors = state(settings)
    body = {n.removeprefix("transformer."): t for n, t in tensors.items() if n != "lm_head.weight"}
    body["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    assert torch.equal(from_hf(body, settings)(TOKENS), from_hf(tensors, settings)(TOKENS))


# --- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "config: model.norm.weight is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "extra is unexpected"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(11)}),
            "model.norm.weight has shape (11,), not (12,)",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": torch.ones(12, 12)}),
            "model.layers.1.self_attn.k_proj.weight has shape (12, 12), not (4, 12)",
        ),
        (
            lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(12)}),
            "model.layers.2.input_layernorm.weight is unexpected",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(12)}),
            "model.layers.0.self_attn.q_proj.bias is unexpected",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    tensors = state()
    change(tensors)
    with pytest.raises(ValueError, match=re.escape(message)):
        from_hf(tensors, LLAMA)


def test_all_that_is_wrong_is_listed():
    tensors = state()
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    tensors |= {"one": torch.ones(1), "two": torch.ones(1)}
    message = (
        "the tensors must be those of the config: model.norm.weight is missing; "
        "lm_head.weight is missing; one is unexpected; two is unexpected"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        from_hf(tensors, LLAMA)


def test_a_tensor_of_another_shape_is_not_called_missing_too():
    tensors = state(GPT2) | {"transformer.h.0.attn.c_attn.weight": torch.ones(12, 35)}
    message = "transformer.h.0.attn.c_attn.weight has shape (12, 35), not (12, 36)"
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        from_hf(tensors, GPT2)


def test_copies_must_agree():
    tied = LLAMA | {"tie_word_embeddings": True}
    tensors = state(tied)
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    del tensors["lm_head.weight"]
    model = from_hf(tensors, tied)
    assert model.head.proj.weight is model.embedding.tokens.weight
    only_head = {n: t for n, t in state(tied).items() if n != "model.embed_tokens.weight"}
    with pytest.raises(ValueError, match=r"config: model\.embed_tokens\.weight is missing$"):
        from_hf(only_head, tied)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    with pytest.raises(ValueError, match="the matrix of the logits differs from the table"):
        from_hf(tensors, tied)
    tensors = state(BERT)
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"] + 1
    with pytest.raises(ValueError, match="differs from its copy"):
        from_hf(tensors, BERT)


def test_a_family_must_have_a_place_for_everything():
    config = replace(config_from_hf(LLAMA), n_segments=2)
    with pytest.raises(ValueError, match=re.escape("llama must have a place for embedding.segme")):
        to_hf(build(config), "llama")


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


FIRST = {case.build().config.model_type: case for case in reversed(CASES)}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_family_excludes(model_type):
    """Every setting that must have one value is refused with another."""
    settings = json.loads(FIRST[model_type].build().config.to_json_string(use_diff=False))
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


MIXTRAL = LLAMA | {
    "model_type": "mixtral",
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
EXPERT = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT.format(0)), f"{EXPERT.format(1)} is unexpected"),
        (lambda t: t.pop(EXPERT.format(1)), "experts.#.w1.weight has shape (1, 10, 12), not (2, "),
        (
            lambda t: t.update({EXPERT.format(5): t.pop(EXPERT.format(1))}),
            f"{EXPERT.format(0)} is unexpected; {EXPERT.format(5)} is unexpected",
        ),
        (
            lambda t: t.update({EXPERT.format(1): torch.ones(9, 12)}),
            f"experts.#.w1.weight is missing; {EXPERT.format(0)} is unexpected; ",
        ),
    ],
)
def test_experts_that_are_missing_or_misshaped(change, message):
    tensors = state(MIXTRAL)
    from_hf(tensors, MIXTRAL)
    change(tensors)
    with pytest.raises(ValueError, match=re.escape(message)):
        from_hf(tensors, MIXTRAL)


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


def usual(model_type):
    """Give the settings of a family, as version 5 writes them."""
    settings = FIRST[model_type].build().config.to_json_string(use_diff=False)
    return json.loads(settings)


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


# --- fewer key and value heads


@pytest.mark.parametrize("bias", [False, True])
def test_key_and_value_heads_are_pooled_by_hand(bias):
    """Heads 0 and 1 give head 0, 2 and 3 give head 1: neighbours, as they are shared."""
    layer = MultiHeadAttention(d_model=1, n_heads=4, head_dim=2, v_head_dim=1, bias=bias)
    with torch.no_grad():
        layer.k_proj.weight.copy_(torch.tensor([1.0, 10, 3, 30, 5, 50, 9, 90])[:, None])
        layer.v_proj.weight.copy_(torch.tensor([1.0, 2, 4, 8])[:, None])
        if bias:
            layer.k_proj.bias.copy_(torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7]))
            layer.v_proj.bias.copy_(torch.tensor([0.0, 2, 4, 8]))
    pooled = pool_kv_heads(layer, 2)
    assert (pooled.n_kv_heads, pooled.cache_width, layer.n_kv_heads) == (2, 2 * 3, 4)
    assert pooled.k_proj.weight[:, 0].tolist() == [2, 20, 7, 70]
    assert pooled.v_proj.weight[:, 0].tolist() == [1.5, 6]
    if bias:
        assert pooled.k_proj.bias.tolist() == [1, 2, 5, 6]
        assert pooled.v_proj.bias.tolist() == [1, 6]
    assert pool_kv_heads(pooled, 1).k_proj.weight[:, 0].tolist() == [4.5, 45]
    assert repr(pooled.k_proj) == repr(torch.nn.Linear(1, 4, bias=bias))
    assert torch.equal(pooled.q_proj.weight, layer.q_proj.weight)


def test_pooling_leaves_frozen_what_is_frozen():
    layer = MultiHeadAttention(d_model=4, n_heads=2)
    layer.k_proj.weight.requires_grad_(False)
    pooled = pool_kv_heads(layer, 1)
    assert not pooled.k_proj.weight.requires_grad
    assert pooled.v_proj.weight.requires_grad


@pytest.mark.parametrize("n_encoder_layers", [0, 1])
@torch.no_grad()
def test_pooling_equal_heads_changes_nothing(n_encoder_layers):
    """Biases and norms of keys too; the config and the cache are those of the fewer heads."""
    config = TransformerConfig(
        vocab_size=13,
        d_model=24,
        n_layers=2,
        n_heads=4,
        d_ff=10,
        n_encoder_layers=n_encoder_layers,
        attention_bias=True,
        qk_norm="rms_norm",
    )
    few = redraw(build(replace(config, n_kv_heads=2))).double().eval()
    many = build(config).double().eval()
    state = {
        name: t.unflatten(0, (2, 1, -1)).expand(-1, 2, -1, *[-1] * (t.ndim - 1)).flatten(0, 2)
        if re.search(r"[kv]_proj", name)
        else t
        for name, t in few.state_dict().items()
    }
    many.load_state_dict(state)
    pooled = pool_kv_heads(many, 2)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    args = (tokens, tokens) if n_encoder_layers else (tokens,)
    for model in many, pooled:
        assert_close(model(*args), few(*args), atol=1e-10, rtol=0)
    assert pooled.config == few.config
    assert kv_cache_bytes(pooled, 7) == kv_cache_bytes(few, 7)
    for name, t in few.state_dict().items():
        assert_close(pooled.state_dict()[name], t)
    assert many.config == config


def test_pooling_refuses_what_cannot_be_pooled():
    layer = MultiHeadAttention(d_model=12, n_heads=6, n_kv_heads=3)
    for number in 2, 6:
        message = rf"n_kv_heads \({number}\) must divide the heads .*; got 3"
        with pytest.raises(ValueError, match=message):
            pool_kv_heads(layer, number)
    with pytest.raises(ValueError, match="got none"):
        pool_kv_heads(torch.nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="n_kv_heads must be an integer of at least 1; got 0"):
        pool_kv_heads(layer, 0)
