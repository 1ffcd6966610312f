"""Checkpoints as files and dictionaries have them: what is read, what is refused, and why."""

import json
import pickle
import re
from dataclasses import replace

import pytest
import torch
from oracles import redraw
from public_settings import LLAMA
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from tfm_ref import build, config_from_hf, from_hf, load_safetensors, to_hf

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
