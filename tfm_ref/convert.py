"""Public checkpoints: their configs, names and shapes turned into ours, and back.

What a family does is in :mod:`tfm_ref.zoo`; here is how its files spell it. A table of names has
one line for each tensor: our modules, theirs, and in brackets the form in which one of theirs
holds ours. ``*`` is the number of a layer, ``#`` that of an expert; ``+`` joins our modules that
one tensor of theirs holds; ``|`` is another spelling, read and never written. What stands in two
lines is stored twice, and must agree.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from tfm_ref import zoo
from tfm_ref.config import Experts, Latent, TransformerConfig
from tfm_ref.models import DecoderLM, Encoder, EncoderDecoder, build
from tfm_ref.rotary import LinearScaling, Llama3Scaling, RopeScaling, YaRNScaling

Model = Encoder | DecoderLM | EncoderDecoder

# --- forms: how one tensor of theirs holds ours


class Form(NamedTuple):
    """Take a tensor of theirs apart, and put it together again.

    Args:
        split: from their tensor, our shapes and our config to our tensors.
        merge: from our tensors and our config to theirs.
    """

    split: Callable[[Tensor, list[torch.Size], TransformerConfig], list[Tensor]]
    merge: Callable[[list[Tensor], TransformerConfig], Tensor]


def _turned(t: Tensor) -> Tensor:
    """Swap the axes of a matrix, of each matrix in a stack, and leave a vector as it is."""
    return t.mT if t.ndim > 1 else t


def _split_groups(t: Tensor, shapes: list[torch.Size], config: TransformerConfig) -> list[Tensor]:
    """Take apart rows of the query heads of a group, their key head, and their value head."""
    g = config.n_kv_heads or config.n_heads
    r = config.n_heads // g
    return [part.flatten(0, 2) for part in t.unflatten(0, (g, r + 2, -1)).split([r, 1, 1], 1)]


def _merge_groups(ts: list[Tensor], config: TransformerConfig) -> Tensor:
    g = config.n_kv_heads or config.n_heads
    heads = config.n_heads // g, 1, 1
    grouped = [t.unflatten(0, (g, s, -1)) for t, s in zip(ts, heads, strict=True)]
    return torch.cat(grouped, 1).flatten(0, 2)


FORMS = {
    "": Form(lambda t, shapes, c: [t], lambda ts, c: ts[0]),
    "turned": Form(lambda t, shapes, c: [_turned(t)], lambda ts, c: _turned(ts[0])),
    "rows": Form(
        lambda t, shapes, c: list(t.split([shape[0] for shape in shapes])),
        lambda ts, c: torch.cat(ts),
    ),
    "columns": Form(
        lambda t, shapes, c: list(_turned(t).split([shape[0] for shape in shapes])),
        lambda ts, c: _turned(torch.cat(ts)),
    ),
    "groups": Form(_split_groups, _merge_groups),
    "row": Form(lambda t, shapes, c: [t[0]], lambda ts, c: ts[0][None]),
    "gain - 1": Form(lambda t, shapes, c: [t + 1], lambda ts, c: ts[0] - 1),
    "halves": Form(lambda t, shapes, c: list(t.chunk(2, 1)), lambda ts, c: torch.cat(ts, 1)),
    "woven": Form(
        lambda t, shapes, c: [
            t[..., i::2] if len(shapes[0]) == 2 else t[..., i::2].mT for i in (0, 1)
        ],
        lambda ts, c: torch.stack([t if t.ndim == 2 else t.mT for t in ts], -1).flatten(-2),
    ),
}
"""How a tensor of theirs holds ours, by name.

turned: a matrix that multiplies from the right; rows, columns: several beside one another;
groups: by group of query heads that share a key head; row: with one more axis; gain - 1: a gain
that is stored less 1; halves: of all experts, gate and up; woven: the same, number by number.
"""

# --- names, by family

GPT2 = """
embedding.tokens                                     transformer.wte
head.proj                                          lm_head
stack.positions.table                                transformer.wpe.weight
stack.norm                                           transformer.ln_f
stack.blocks.*.attention_norm                        transformer.h.*.ln_1
stack.blocks.*.attention.q_proj+k_proj+v_proj        transformer.h.*.attn.c_attn    [columns]
stack.blocks.*.attention.o_proj                      transformer.h.*.attn.c_proj    [turned]
stack.blocks.*.feed_forward_norm                     transformer.h.*.ln_2
stack.blocks.*.feed_forward.up_proj                  transformer.h.*.mlp.c_fc       [turned]
stack.blocks.*.feed_forward.down_proj                transformer.h.*.mlp.c_proj     [turned]
"""
BERT = """
embedding.tokens                        bert.embeddings.word_embeddings
embedding.segments                      bert.embeddings.token_type_embeddings
stack.positions.table                   bert.embeddings.position_embeddings.weight
stack.embedding_norm                    bert.embeddings.LayerNorm
stack.blocks.*.attention.q_proj         bert.encoder.layer.*.attention.self.query
stack.blocks.*.attention.k_proj         bert.encoder.layer.*.attention.self.key
stack.blocks.*.attention.v_proj         bert.encoder.layer.*.attention.self.value
stack.blocks.*.attention.o_proj         bert.encoder.layer.*.attention.output.dense
stack.blocks.*.attention_norm           bert.encoder.layer.*.attention.output.LayerNorm
stack.blocks.*.feed_forward.up_proj     bert.encoder.layer.*.intermediate.dense
stack.blocks.*.feed_forward.down_proj   bert.encoder.layer.*.output.dense
stack.blocks.*.feed_forward_norm        bert.encoder.layer.*.output.LayerNorm
pooler                                  bert.pooler.dense
head.transform                          cls.predictions.transform.dense
head.norm                               cls.predictions.transform.LayerNorm
head.proj.bias                          cls.predictions.bias
head.proj                             cls.predictions.decoder
"""
ROBERTA = (
    BERT.replace(" bert.", " roberta.")
    .replace("cls.predictions.transform.LayerNorm", "lm_head.layer_norm")
    .replace("cls.predictions.transform.", "lm_head.")
    .replace("cls.predictions.", "lm_head.")
)
T5_STACK = """
encoder.positions.table                 encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight
encoder.blocks.*.attention_norm         encoder.block.*.layer.0.layer_norm
encoder.blocks.*.attention.q_proj       encoder.block.*.layer.0.SelfAttention.q
encoder.blocks.*.attention.k_proj       encoder.block.*.layer.0.SelfAttention.k
encoder.blocks.*.attention.v_proj       encoder.block.*.layer.0.SelfAttention.v
encoder.blocks.*.attention.o_proj       encoder.block.*.layer.0.SelfAttention.o
encoder.blocks.*.feed_forward_norm      encoder.block.*.layer.1.layer_norm
encoder.blocks.*.feed_forward.up_proj   encoder.block.*.layer.1.DenseReluDense.wi
encoder.blocks.*.feed_forward.down_proj encoder.block.*.layer.1.DenseReluDense.wo
encoder.norm                            encoder.final_layer_norm
embedding.tokens                      encoder.embed_tokens
"""  # noqa: E501
T5_CROSS = """
decoder.blocks.*.cross_attention_norm   decoder.block.*.layer.1.layer_norm
decoder.blocks.*.cross_attention.q_proj decoder.block.*.layer.1.EncDecAttention.q
decoder.blocks.*.cross_attention.k_proj decoder.block.*.layer.1.EncDecAttention.k
decoder.blocks.*.cross_attention.v_proj decoder.block.*.layer.1.EncDecAttention.v
decoder.blocks.*.cross_attention.o_proj decoder.block.*.layer.1.EncDecAttention.o
"""
T5 = (
    """
embedding.tokens                        shared
head.proj                             lm_head
"""
    + T5_STACK
    + T5_STACK.replace("encoder.", "decoder.").replace("layer.1.", "layer.2.")
    + T5_CROSS
)
T5_GATED = (
    T5.replace("DenseReluDense.wi\n", "DenseReluDense.wi_1\n")
    + """
encoder.blocks.*.feed_forward.gate_proj encoder.block.*.layer.1.DenseReluDense.wi_0
decoder.blocks.*.feed_forward.gate_proj decoder.block.*.layer.2.DenseReluDense.wi_0
"""
)
BART_STACK = """
encoder.positions.table                 model.encoder.embed_positions.weight
encoder.embedding_norm                  model.encoder.layernorm_embedding
encoder.blocks.*.attention.q_proj       model.encoder.layers.*.self_attn.q_proj
encoder.blocks.*.attention.k_proj       model.encoder.layers.*.self_attn.k_proj
encoder.blocks.*.attention.v_proj       model.encoder.layers.*.self_attn.v_proj
encoder.blocks.*.attention.o_proj       model.encoder.layers.*.self_attn.out_proj
encoder.blocks.*.attention_norm         model.encoder.layers.*.self_attn_layer_norm
encoder.blocks.*.feed_forward.up_proj   model.encoder.layers.*.fc1
encoder.blocks.*.feed_forward.down_proj model.encoder.layers.*.fc2
encoder.blocks.*.feed_forward_norm      model.encoder.layers.*.final_layer_norm
embedding.tokens                      model.encoder.embed_tokens
"""
BART_CROSS = """
decoder.blocks.*.cross_attention.q_proj model.decoder.layers.*.encoder_attn.q_proj
decoder.blocks.*.cross_attention.k_proj model.decoder.layers.*.encoder_attn.k_proj
decoder.blocks.*.cross_attention.v_proj model.decoder.layers.*.encoder_attn.v_proj
decoder.blocks.*.cross_attention.o_proj model.decoder.layers.*.encoder_attn.out_proj
decoder.blocks.*.cross_attention_norm   model.decoder.layers.*.encoder_attn_layer_norm
"""
BART = (
    """
embedding.tokens                        model.shared
head.proj.weight                      lm_head.weight
head.proj.bias                          final_logits_bias [row]
"""
    + BART_STACK
    + BART_STACK.replace("encoder.", "decoder.")
    + BART_CROSS
)
BLOOM = """
embedding.tokens                               transformer.word_embeddings
head.proj                                    lm_head
stack.embedding_norm                           transformer.word_embeddings_layernorm
stack.norm                                     transformer.ln_f
stack.blocks.*.attention_norm                  transformer.h.*.input_layernorm
stack.blocks.*.attention.q_proj+k_proj+v_proj  transformer.h.*.self_attention.query_key_value [groups]
stack.blocks.*.attention.o_proj                transformer.h.*.self_attention.dense
stack.blocks.*.feed_forward_norm               transformer.h.*.post_attention_layernorm
stack.blocks.*.feed_forward.up_proj            transformer.h.*.mlp.dense_h_to_4h
stack.blocks.*.feed_forward.down_proj          transformer.h.*.mlp.dense_4h_to_h
"""  # noqa: E501
MPT = """
embedding.tokens                               transformer.wte
head.proj                                    lm_head
stack.norm                                     transformer.norm_f
stack.blocks.*.attention_norm                  transformer.blocks.*.norm_1
stack.blocks.*.attention.q_proj+k_proj+v_proj  transformer.blocks.*.attn.Wqkv [rows]
stack.blocks.*.attention.o_proj                transformer.blocks.*.attn.out_proj
stack.blocks.*.feed_forward_norm               transformer.blocks.*.norm_2
stack.blocks.*.feed_forward.up_proj            transformer.blocks.*.ffn.up_proj
stack.blocks.*.feed_forward.down_proj          transformer.blocks.*.ffn.down_proj
"""
LLAMA = """
embedding.tokens                        model.embed_tokens
head.proj                             lm_head
stack.norm                              model.norm
stack.blocks.*.attention_norm           model.layers.*.input_layernorm
stack.blocks.*.attention.q_proj         model.layers.*.self_attn.q_proj
stack.blocks.*.attention.k_proj         model.layers.*.self_attn.k_proj
stack.blocks.*.attention.v_proj         model.layers.*.self_attn.v_proj
stack.blocks.*.attention.o_proj         model.layers.*.self_attn.o_proj
stack.blocks.*.attention.q_norm         model.layers.*.self_attn.q_norm
stack.blocks.*.attention.k_norm         model.layers.*.self_attn.k_norm
stack.blocks.*.attention.sinks          model.layers.*.self_attn.sinks
stack.blocks.*.feed_forward_norm        model.layers.*.post_attention_layernorm
stack.blocks.*.feed_forward.gate_proj   model.layers.*.mlp.gate_proj
stack.blocks.*.feed_forward.up_proj     model.layers.*.mlp.up_proj
stack.blocks.*.feed_forward.down_proj   model.layers.*.mlp.down_proj
"""
GEMMA = """
embedding.tokens                                model.embed_tokens
head.proj                                     lm_head
stack.norm                                      model.norm                                     [gain - 1]
stack.blocks.*.attention_norm                   model.layers.*.input_layernorm                 [gain - 1]
stack.blocks.*.attention.q_proj                 model.layers.*.self_attn.q_proj
stack.blocks.*.attention.k_proj                 model.layers.*.self_attn.k_proj
stack.blocks.*.attention.v_proj                 model.layers.*.self_attn.v_proj
stack.blocks.*.attention.o_proj                 model.layers.*.self_attn.o_proj
stack.blocks.*.attention.q_norm                 model.layers.*.self_attn.q_norm                [gain - 1]
stack.blocks.*.attention.k_norm                 model.layers.*.self_attn.k_norm                [gain - 1]
stack.blocks.*.attention_output_norm            model.layers.*.post_attention_layernorm        [gain - 1]
stack.blocks.*.feed_forward_norm                model.layers.*.pre_feedforward_layernorm       [gain - 1]
stack.blocks.*.feed_forward.gate_proj           model.layers.*.mlp.gate_proj
stack.blocks.*.feed_forward.up_proj             model.layers.*.mlp.up_proj
stack.blocks.*.feed_forward.down_proj           model.layers.*.mlp.down_proj
stack.blocks.*.feed_forward_output_norm         model.layers.*.post_feedforward_layernorm      [gain - 1]
"""  # noqa: E501
EXPERTS = """
stack.blocks.*.feed_forward.router.proj         model.layers.*.mlp.gate
stack.blocks.*.feed_forward.router.choice_bias  model.layers.*.mlp.gate.e_score_correction_bias
stack.blocks.*.feed_forward.gate_proj           model.layers.*.mlp.experts.#.gate_proj.weight
stack.blocks.*.feed_forward.up_proj             model.layers.*.mlp.experts.#.up_proj.weight
stack.blocks.*.feed_forward.down_proj           model.layers.*.mlp.experts.#.down_proj.weight
| stack.blocks.*.feed_forward.gate_proj+up_proj model.layers.*.mlp.experts.gate_up_proj [halves]
| stack.blocks.*.feed_forward.down_proj         model.layers.*.mlp.experts.down_proj
stack.blocks.*.feed_forward.shared.gate_proj    model.layers.*.mlp.shared_experts.gate_proj
stack.blocks.*.feed_forward.shared.up_proj      model.layers.*.mlp.shared_experts.up_proj
stack.blocks.*.feed_forward.shared.down_proj    model.layers.*.mlp.shared_experts.down_proj
"""
MIXTRAL = (
    LLAMA
    + """
stack.blocks.*.feed_forward.router.proj         model.layers.*.block_sparse_moe.gate
stack.blocks.*.feed_forward.gate_proj           model.layers.*.block_sparse_moe.experts.#.w1.weight
stack.blocks.*.feed_forward.down_proj           model.layers.*.block_sparse_moe.experts.#.w2.weight
stack.blocks.*.feed_forward.up_proj             model.layers.*.block_sparse_moe.experts.#.w3.weight
| stack.blocks.*.feed_forward.router.proj       model.layers.*.mlp.gate
| stack.blocks.*.feed_forward.gate_proj+up_proj model.layers.*.mlp.experts.gate_up_proj [halves]
| stack.blocks.*.feed_forward.down_proj         model.layers.*.mlp.experts.down_proj
"""
)
GPT_OSS = (
    LLAMA
    + """
stack.blocks.*.feed_forward.router.proj         model.layers.*.mlp.router
stack.blocks.*.feed_forward.gate_proj+up_proj   model.layers.*.mlp.experts.gate_up_proj      [woven]
stack.blocks.*.feed_forward.gate_bias+up_bias   model.layers.*.mlp.experts.gate_up_proj_bias [woven]
stack.blocks.*.feed_forward.down_proj           model.layers.*.mlp.experts.down_proj [turned]
stack.blocks.*.feed_forward.down_bias           model.layers.*.mlp.experts.down_proj_bias
"""
)
DEEPSEEK = (
    LLAMA
    + EXPERTS
    + """
stack.blocks.*.attention.q_a_proj               model.layers.*.self_attn.q_a_proj
stack.blocks.*.attention.q_a_norm               model.layers.*.self_attn.q_a_layernorm
stack.blocks.*.attention.q_b_proj               model.layers.*.self_attn.q_b_proj
stack.blocks.*.attention.kv_a_proj              model.layers.*.self_attn.kv_a_proj_with_mqa
stack.blocks.*.attention.kv_a_norm              model.layers.*.self_attn.kv_a_layernorm
stack.blocks.*.attention.kv_b_proj              model.layers.*.self_attn.kv_b_proj
"""
)

# --- configs, by family

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
"""Our names of their activations."""


class HFConfig(dict):
    """A config.json whose missing and unknown settings are errors."""

    def __missing__(self, key: str) -> object:
        raise ValueError(f'config.json must have "{key}"; it has {", ".join(sorted(self))}')

    def only(self, **allowed: object) -> None:
        """Refuse settings that our models do not have; absent ones are the allowed ones."""
        for key, value in allowed.items():
            if self.get(key, value) != value:
                raise ValueError(f"{key} must be {value!r}; got {self[key]!r}")

    def activation(self, *keys: str) -> str:
        """Give our name of the activation, under the first of the keys that is there."""
        name = next(self[key] for key in (*keys[:-1], keys[-1]) if key in self or key == keys[-1])
        if name not in ACTIVATIONS:
            raise ValueError(f'{keys[0]} must be one of {", ".join(ACTIVATIONS)}; got "{name}"')
        return ACTIVATIONS[name]


def _rope(hf: HFConfig, given: Mapping | None = None) -> dict[str, object]:
    """Read base and scaling, as version 5 of transformers writes them and as those before did."""
    rope = given or hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope = HFConfig(rope)
    theta = rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in SCALINGS:
        raise ValueError(f'rope_type must be one of {", ".join(SCALINGS)}; got "{kind}"')
    return {"rope_theta": float(theta), "rope_scaling": SCALINGS[kind](rope)}


def _yarn(rope: HFConfig) -> YaRNScaling:
    factor, own, all_dim = rope["factor"], rope.get("mscale"), rope.get("mscale_all_dim")
    temperature = rope.get("attention_factor")
    if temperature is None and own and all_dim:
        temperature = _mscale(factor, own) / _mscale(factor, all_dim)
    return YaRNScaling(
        factor=float(factor),
        original_length=rope["original_max_position_embeddings"],
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=rope.get("truncate", True),
        temperature=temperature,
    )


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


SCALINGS: dict[str, Callable[[HFConfig], RopeScaling | None]] = {
    "default": lambda rope: None,
    "linear": lambda rope: LinearScaling(factor=float(rope["factor"])),
    "yarn": _yarn,
    "llama3": lambda rope: Llama3Scaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_length=rope["original_max_position_embeddings"],
    ),
}
"""How RoPE is stretched, by their names."""


def _windows(hf: HFConfig, window: int | None, global_every: int | None) -> dict[str, int | None]:
    """Read which layers have a window: from layer_types if they are listed, else as is usual."""
    kinds = hf.get("layer_types")
    if kinds is None or window is None:
        return {"window": window, "global_every": global_every if window else None}
    local = [kind == "sliding_attention" for kind in kinds]
    if not any(local):
        return {"window": None, "global_every": None}
    first = local.index(False) + 1 if False in local else None
    if local != [first is None or (layer + 1) % first != 0 for layer in range(len(local))]:
        raise ValueError(f"every n-th layer must be without a window; got layer_types {kinds}")
    return {"window": window, "global_every": first}


def _gpt2(hf: HFConfig) -> dict[str, object]:
    hf.only(
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    return zoo.GPT2 | {
        "vocab_size": hf["vocab_size"],
        "d_model": hf["n_embd"],
        "n_layers": hf["n_layer"],
        "n_heads": hf["n_head"],
        "d_ff": hf.get("n_inner") or 4 * hf["n_embd"],
        "max_seq_len": hf["n_positions"],
        "norm_eps": hf["layer_norm_epsilon"],
        "activation": hf.activation("activation_function"),
        "tied_embeddings": hf.get("tie_word_embeddings", True),
    }


def _sizes(hf: HFConfig) -> dict[str, object]:
    """Read the sizes under the names that most families use."""
    return {
        "vocab_size": hf["vocab_size"],
        "d_model": hf["hidden_size"],
        "n_layers": hf["num_hidden_layers"],
        "n_heads": hf["num_attention_heads"],
        "d_ff": hf["intermediate_size"],
        "max_seq_len": hf["max_position_embeddings"],
    }


def _bert(hf: HFConfig) -> dict[str, object]:
    hf.only(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    first = hf["pad_token_id"] + 1 if hf["model_type"] == "roberta" else 0
    sizes = _sizes(hf)
    return (
        zoo.BERT
        | sizes
        | {
            "max_seq_len": sizes["max_seq_len"] - first,
            "first_position": first,
            "n_segments": hf["type_vocab_size"],
            "norm_eps": hf["layer_norm_eps"],
            "activation": hf.activation("hidden_act"),
            "tied_embeddings": hf.get("tie_word_embeddings", True),
        }
    )


def _t5(hf: HFConfig) -> dict[str, object]:
    hf.only(is_encoder_decoder=True)
    *gate, activation = hf["feed_forward_proj"].split("-")
    if activation == "gelu" and gate:
        activation = "gelu_new"
    tied = hf.get("tie_word_embeddings", True)
    return zoo.T5 | {
        "vocab_size": hf["vocab_size"],
        "d_model": hf["d_model"],
        "n_encoder_layers": hf["num_layers"],
        "n_layers": hf.get("num_decoder_layers") or hf["num_layers"],
        "n_heads": hf["num_heads"],
        "head_dim": hf["d_kv"],
        "d_ff": hf["d_ff"],
        "t5_buckets": hf["relative_attention_num_buckets"],
        "t5_max_distance": hf.get("relative_attention_max_distance", 128),
        "norm_eps": hf["layer_norm_epsilon"],
        "activation": HFConfig(feed_forward_proj=activation).activation("feed_forward_proj"),
        "gated": bool(gate),
        "tied_embeddings": tied,
        "scale_logits": hf.get("scale_decoder_outputs", tied),
    }


def _bart(hf: HFConfig) -> dict[str, object]:
    hf.only(
        normalize_before=False,
        add_final_layer_norm=False,
        share_encoder_decoder_embeddings=True,
        encoder_ffn_dim=hf["decoder_ffn_dim"],
        encoder_attention_heads=hf["decoder_attention_heads"],
        decoder_vocab_size=hf["vocab_size"],
    )
    choices = zoo.MARIAN if hf["model_type"] == "marian" else zoo.BART
    return choices | {
        "vocab_size": hf["vocab_size"],
        "d_model": hf["d_model"],
        "n_encoder_layers": hf["encoder_layers"],
        "n_layers": hf["decoder_layers"],
        "n_heads": hf["decoder_attention_heads"],
        "d_ff": hf["decoder_ffn_dim"],
        "max_seq_len": hf["max_position_embeddings"],
        "scale_embeddings": hf["scale_embedding"],
        "head_bias": True,
        "activation": hf.activation("activation_function"),
        "tied_embeddings": hf.get("tie_word_embeddings", True),
    }


def _bloom(hf: HFConfig) -> dict[str, object]:
    hf.only(apply_residual_connection_post_layernorm=False)
    width = hf.get("hidden_size") or hf["n_embed"]
    return zoo.BLOOM | {
        "vocab_size": hf["vocab_size"],
        "d_model": width,
        "n_layers": hf["n_layer"],
        "n_heads": hf["n_head"],
        "d_ff": 4 * width,
        "max_seq_len": hf.get("seq_length"),
        "norm_eps": hf["layer_norm_epsilon"],
        "tied_embeddings": hf.get("tie_word_embeddings", True),
    }


def _mpt(hf: HFConfig) -> dict[str, object]:
    attention = HFConfig(hf["attn_config"])
    attention.only(
        alibi=True,
        alibi_bias_max=8,
        qk_ln=False,
        clip_qkv=None,
        prefix_lm=False,
        attn_type="multihead_attention",
    )
    hf.only(no_bias=True, logit_scale=None, embedding_fraction=1.0)
    return zoo.MPT | {
        "vocab_size": hf["vocab_size"],
        "d_model": hf["d_model"],
        "n_layers": hf["n_layers"],
        "n_heads": hf["n_heads"],
        "d_ff": hf["expansion_ratio"] * hf["d_model"],
        "max_seq_len": hf["max_seq_len"],
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "attention_scale": attention.get("softmax_scale"),
        "tied_embeddings": hf.get("tie_word_embeddings", True),
    }


def _falcon(hf: HFConfig) -> dict[str, object]:
    hf.only(alibi=False, new_decoder_architecture=False, parallel_attn=True)
    return (
        zoo.FALCON
        | _rope(hf)
        | {
            "vocab_size": hf["vocab_size"],
            "d_model": hf["hidden_size"],
            "n_layers": hf["num_hidden_layers"],
            "n_heads": hf["num_attention_heads"],
            "n_kv_heads": 1 if hf["multi_query"] else hf["num_attention_heads"],
            "d_ff": hf.get("ffn_hidden_size") or 4 * hf["hidden_size"],
            "max_seq_len": hf.get("max_position_embeddings"),
            "norm_eps": hf["layer_norm_epsilon"],
            "attention_bias": hf["bias"],
            "feed_forward_bias": hf["bias"],
            "activation": hf.activation("activation"),
            "tied_embeddings": hf.get("tie_word_embeddings", True),
        }
    )


def _llama(hf: HFConfig) -> dict[str, object]:
    """Read what Llama and all that descend from it share."""
    hf.only(mlp_bias=False)
    return (
        zoo.LLAMA
        | _sizes(hf)
        | _rope(hf)
        | {
            "n_kv_heads": hf.get("num_key_value_heads"),
            "head_dim": hf.get("head_dim"),
            "norm_eps": hf["rms_norm_eps"],
            "attention_bias": hf.get("attention_bias", False),
            "activation": hf.activation("hidden_activation", "hidden_act"),
            "tied_embeddings": hf.get("tie_word_embeddings", False),
        }
    )


def _mistral(hf: HFConfig) -> dict[str, object]:
    return _llama(hf) | _windows(hf, hf.get("sliding_window"), None)


def _qwen(hf: HFConfig) -> dict[str, object]:
    own = {"attention_bias": "qkv"} if hf["model_type"] == "qwen2" else {"qk_norm": True}
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    if window is not None and "layer_types" not in hf:
        raise ValueError("use_sliding_window needs layer_types; got none")
    return _llama(hf) | own | _windows(hf, window, None)


def _gemma(hf: HFConfig) -> dict[str, object]:
    hf.only(use_bidirectional_attention=None if hf["model_type"] == "gemma2" else False)
    third = hf["model_type"] == "gemma3_text"
    every = hf.get("sliding_window_pattern", 6) if third else 2
    rope = hf.get("rope_parameters") or {}
    if third:
        both = (
            rope
            if "full_attention" in rope
            else {
                "full_attention": {
                    "rope_theta": hf.get("rope_theta", 1e6),
                    **(hf.get("rope_scaling") or {}),
                },
                "sliding_attention": {"rope_theta": hf.get("rope_local_base_freq", 10_000.0)},
            }
        )
        local = _rope(hf, both["sliding_attention"])
        hf = HFConfig(hf | {"rope_parameters": both["full_attention"]})
        own = {"qk_norm": True, "local_rope_theta": local["rope_theta"]}
    else:
        own = {}
    return (
        zoo.GEMMA
        | _llama(hf)
        | own
        | _windows(hf, hf["sliding_window"], every)
        | {
            "scale_embeddings": True,
            "norm_placement": "both",
            "attention_scale": hf["query_pre_attn_scalar"] ** -0.5,
            "attention_softcap": hf["attn_logit_softcapping"],
            "logit_softcap": hf["final_logit_softcapping"],
            "tied_embeddings": hf.get("tie_word_embeddings", True),
        }
    )


def _mixtral(hf: HFConfig) -> dict[str, object]:
    experts = Experts(
        d_ff=hf["intermediate_size"],
        n_experts=hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"],
    )
    return _mistral(hf) | {"d_ff": None, "experts": experts}


def _qwen3_moe(hf: HFConfig) -> dict[str, object]:
    hf.only(decoder_sparse_step=1, mlp_only_layers=[])
    experts = Experts(
        d_ff=hf["moe_intermediate_size"],
        n_experts=hf.get("num_experts") or hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"],
        normalise=hf["norm_topk_prob"],
    )
    return _qwen(hf) | {"d_ff": None, "experts": experts}


def _gpt_oss(hf: HFConfig) -> dict[str, object]:
    hf.only(swiglu_alpha=1.702, swiglu_limit=7.0)
    experts = Experts(
        d_ff=hf["intermediate_size"],
        n_experts=hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"],
        router_bias=True,
    )
    return (
        _llama(hf)
        | _windows(hf, hf["sliding_window"], 2)
        | {
            "d_ff": None,
            "experts": experts,
            "sinks": True,
            "activation": "swiglu_clamped",
            "feed_forward_bias": True,
        }
    )


def _deepseek(hf: HFConfig) -> dict[str, object]:
    third = hf["model_type"] == "deepseek_v3"
    hf.only(moe_layer_freq=1)
    if third:
        hf.only(topk_method="noaux_tc", scoring_func="sigmoid")
    grouped = third or hf["topk_method"] == "group_limited_greedy"
    experts = Experts(
        d_ff=hf["moe_intermediate_size"],
        n_experts=hf["n_routed_experts"],
        top_k=hf["num_experts_per_tok"],
        n_shared=hf["n_shared_experts"],
        n_dense_layers=hf["first_k_dense_replace"],
        score="sigmoid" if third else "softmax",
        normalise=hf["norm_topk_prob"] if third else False,
        choice_bias=third,
        n_groups=hf["n_group"] if grouped else 1,
        top_k_groups=hf["topk_group"] if grouped else 1,
        top_k_in_group=2 if third else 1,
        scale=hf["routed_scaling_factor"],
    )
    rope = HFConfig(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    scale = (hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]) ** -0.5
    if rope.get("mscale_all_dim"):
        scale *= _mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    return _llama(hf) | {
        "d_ff": hf["intermediate_size"] if hf["first_k_dense_replace"] else None,
        "n_kv_heads": None,
        "head_dim": hf["qk_nope_head_dim"],
        "rope_interleaved": hf.get("rope_interleave", True),
        "attention_scale": scale,
        "latent": Latent(
            kv_lora_rank=hf["kv_lora_rank"],
            q_lora_rank=hf["q_lora_rank"],
            rope_head_dim=hf["qk_rope_head_dim"],
            v_head_dim=hf["v_head_dim"],
        ),
        "experts": experts,
    }


class Family(NamedTuple):
    """Say how the files of a family spell configs and names.

    Args:
        choices: from a config.json to the arguments of our config.
        names: the table of names.
        prefix: what a checkpoint of the body without a head leaves out of all names.
        ignored: tensors that hold nothing that was learned, or a head that we do not have.
        unties: its configs may call embedding and head tied where the file holds two matrices,
            as those of T5 1.1 do when version 5 of transformers wrote them.
    """

    choices: Callable[[HFConfig], dict[str, object]]
    names: str
    prefix: str = "model."
    ignored: str = r".*rotary_emb\.inv_freq"
    unties: bool = False


FAMILIES = {
    "gpt2": Family(_gpt2, GPT2, "transformer.", r".*\.attn\.(masked_)?bias"),
    "bert": Family(_bert, BERT, "bert.", r".*position_ids|cls\.seq_relationship\..*"),
    "roberta": Family(_bert, ROBERTA, "roberta.", r".*position_ids"),
    "t5": Family(
        _t5,
        T5,
        "",
        r"decoder\..*EncDecAttention\.relative_attention_bias\.weight",
        unties=True,
    ),
    "bart": Family(_bart, BART, "model."),
    "marian": Family(_bart, BART, "model.", r".*embed_positions\.weight"),
    "bloom": Family(_bloom, BLOOM, "transformer."),
    "mpt": Family(_mpt, MPT, "transformer."),
    "falcon": Family(_falcon, BLOOM, "transformer.", r".*rotary.*inv_freq"),
    "llama": Family(_llama, LLAMA),
    "mistral": Family(_mistral, LLAMA),
    "qwen2": Family(_qwen, LLAMA),
    "qwen3": Family(_qwen, LLAMA),
    "gemma2": Family(_gemma, GEMMA),
    "gemma3_text": Family(_gemma, GEMMA),
    "mixtral": Family(_mixtral, MIXTRAL),
    "qwen3_moe": Family(_qwen3_moe, LLAMA + EXPERTS),
    "gpt_oss": Family(_gpt_oss, GPT_OSS),
    "deepseek_v2": Family(_deepseek, DEEPSEEK),
    "deepseek_v3": Family(
        _deepseek,
        DEEPSEEK,
        ignored=r"model\.layers\.\d+\.(embed_tokens|enorm|hnorm|eh_proj|shared_head)\..*",
    ),
}
"""The families, by the model_type of their config.json."""


def _family(model_type: str) -> Family:
    if model_type not in FAMILIES:
        raise ValueError(f'model_type must be one of {", ".join(FAMILIES)}; got "{model_type}"')
    return FAMILIES[model_type]


def config_from_hf(hf: Mapping[str, object]) -> TransformerConfig:
    """Read a config.json: the point in our space of choices that it describes.

    Args:
        hf: the settings, with "model_type"; as a file has them, or ``config.to_dict()``.

    Returns:
        Our config.

    Raises:
        ValueError: if the family is unknown, a setting is missing, or one has a value that our
            models do not have.

    Example:
        >>> config_from_hf({
        ...     "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        ...     "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        ...     "intermediate_size": 14336, "max_position_embeddings": 8192,
        ...     "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
        ... }) == zoo.MODELS["Llama-3-8B"].config
        True
    """
    hf = HFConfig(hf)
    return TransformerConfig(**_family(hf["model_type"]).choices(hf))


class Line(NamedTuple):
    """One line of a table of names, for one layer and one kind of parameter."""

    ours: list[str]
    theirs: str
    form: Form
    written: bool


def _lines(family: Family, model: Model) -> Iterator[Line]:
    """Read the table of a family, with the layers and parameters that a model has."""
    names, state, c = family.names, model.state_dict(), model.config
    if names is T5 and c.gated:
        names = T5_GATED
    for line in filter(None, names.splitlines()):
        other, ours, theirs, form = re.fullmatch(
            r"(\| )?(\S+) +(\S+) *(?:\[(.*)\])?", line
        ).groups()
        head, dot, joined = ours.rpartition(".")
        for layer in range(max(c.n_layers, c.n_encoder_layers) if "*" in ours else 1):
            for kind in "", ".weight", ".bias":
                full = [
                    f"{head}{dot}{name}{kind}".replace("*", str(layer))
                    for name in joined.split("+")
                ]
                if all(name in state for name in full):
                    name = f"{theirs}{kind}".replace("*", str(layer))
                    yield Line(full, name, FORMS[form or ""], written=other is None)


def from_hf(state_dict: Mapping[str, Tensor], hf: Mapping[str, object]) -> Model:
    """Build the model of a public checkpoint, with its weights.

    Args:
        state_dict: its tensors, by the names of its family.
        hf: its config, as :func:`config_from_hf` takes it.

    Returns:
        The model with copies of the tensors, in their dtype, ready for inference (``eval``).

    Raises:
        ValueError: as :func:`config_from_hf`; or if tensors are missing, unexpected or of another
            shape, or copies of one tensor differ: the message lists them all.
    """
    hf = HFConfig(hf)
    family, config = _family(hf["model_type"]), config_from_hf(hf)
    if any("pooler.dense" in name for name in state_dict):
        config = replace(config, pooler=True)
    table, matrix = state_dict.get("shared.weight"), state_dict.get("lm_head.weight")
    if family.unties and matrix is not None and not torch.equal(table, matrix):
        config = replace(config, tied_embeddings=False)
    with torch.device("meta"):
        model = build(config)
    theirs = {_modern(name): t for name, t in state_dict.items()}
    theirs = {n: t for n, t in theirs.items() if not re.fullmatch(family.ignored, n)}
    if not any(name.startswith(family.prefix) for name in theirs):
        theirs = {family.prefix + name: t for name, t in theirs.items()}
    theirs = _stack_experts(theirs)
    wanted, found, wrong = model.state_dict(), {}, []
    unread = set(theirs)
    for ours, name, form, _ in _lines(family, model):
        if name not in theirs:
            continue
        unread.discard(name)
        shapes = [wanted[n].shape for n in ours]
        shape = form.merge([torch.empty(s, device="meta") for s in shapes], config).shape
        if theirs[name].shape != shape:
            wrong.append(f"{name} has shape {tuple(theirs[name].shape)}, not {tuple(shape)}")
            found |= dict.fromkeys(ours)
            continue
        for n, t in zip(ours, form.split(theirs[name], shapes, config), strict=True):
            if found.get(n) is not None and not torch.equal(found[n], t):
                wrong.append(f"{name} differs from its copy")
            found[n] = t.clone(memory_format=torch.contiguous_format)
    if config.tied_embeddings:
        table, matrix = found.get("embedding.tokens.weight"), found.get("head.proj.weight")
        if matrix is not None and table is not None and not torch.equal(matrix, table):
            wrong.append("the matrix of the logits differs from the table that it is tied to")
        found["head.proj.weight"] = table
    missing = [f"{name} is missing" for name in wanted if name not in found]
    wrong += missing + [f"{name} is unexpected" for name in sorted(unread)]
    if wrong:
        raise ValueError(f"the tensors must be those of the config: {'; '.join(wrong)}")
    model.load_state_dict(found, assign=True)
    model.tie()
    return model.eval()


def to_hf(model: Model, model_type: str) -> dict[str, Tensor]:
    """Give the weights of a model by the names of a family.

    Args:
        model: the model.
        model_type: the family, a name in :data:`FAMILIES`.

    Returns:
        Tensors by name, copies included, experts one by one where the family's files have them so.

    Raises:
        ValueError: if the family is unknown, or has no place for some of the tensors.
    """
    state, given, lost = model.state_dict(), {}, set(model.state_dict())
    for ours, name, form, written in _lines(_family(model_type), model):
        if written:
            given[name] = form.merge([state[n] for n in ours], model.config)
            lost -= set(ours)
    if model.config.tied_embeddings:
        lost.discard("head.proj.weight")
    if lost:
        raise ValueError(f"{model_type} must have a place for {', '.join(sorted(lost))}")
    return _unstack_experts(given)


def _modern(name: str) -> str:
    """Rename what files of the first years call otherwise."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def _stack_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the tensors of single experts into one for all, under a name with ``#``."""
    stacked, single = {}, {}
    for name, t in tensors.items():
        common, count = re.subn(r"\bexperts\.\d+\.", "experts.#.", name)
        if count:
            single.setdefault(common, {})[int(re.search(r"experts\.(\d+)\.", name)[1])] = t
        else:
            stacked[name] = t
    for name, parts in single.items():
        stacked[name] = torch.stack([parts[i] for i in sorted(parts)])
    return stacked


def _unstack_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the tensors of all experts apart again."""
    return {
        name.replace("#", str(i)): part
        for name, t in tensors.items()
        for i, part in (enumerate(t) if "#" in name else [(0, t)])
    }


def load_safetensors(path: str | Path) -> Model:
    """Read a checkpoint folder: config.json, and tensors in one safetensors file or several.

    Nothing is unpickled, so that no file can run code.

    Args:
        path: the folder, as it is downloaded, or as ``save_pretrained`` writes it.

    Returns:
        The model with its weights, ready for inference.

    Raises:
        ValueError: as :func:`from_hf`, or if the folder lacks config.json or safetensors, or a
            file that its index names.
    """
    path = Path(path)
    index = path / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    absent = [name for name in ["config.json", *files] if not (path / name).exists()]
    if absent:
        raise ValueError(f"{path} must hold {', '.join(absent)}")
    state = {}
    for name in files:
        state |= load_file(path / name)
    return from_hf(state, json.loads((path / "config.json").read_text(encoding="utf-8")))
