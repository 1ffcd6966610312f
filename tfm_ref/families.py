"""Families of public models: how their files spell the choices, and how they name the tensors.

What the models of a family do is in :mod:`tfm_ref.zoo`. A table of names has one line for each
tensor: our module, theirs, and in brackets the form in which theirs holds ours; a name of theirs
that ends in .weight or .bias, or is one of experts, is a tensor's, as is ours beside it. ``*`` is
the number of a layer, ``#`` that of an expert; ``+`` joins our modules that one tensor of theirs
holds; ``|`` is another spelling, read and never written. What stands in two lines is stored
twice, and must agree.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tfm_ref import zoo
from tfm_ref.config import Experts, Latent
from tfm_ref.positions import QueryScaling
from tfm_ref.rotary import LinearScaling, Llama3Scaling, RopeScaling, YaRNScaling
from tfm_ref.validation import check_choice

# --- names, by family

GPT2 = """
embedding.tokens                              transformer.wte
head.proj                                     lm_head
stack.positions.table                         transformer.wpe.weight
stack.norm                                    transformer.ln_f
stack.blocks.*.attention_norm                 transformer.h.*.ln_1
stack.blocks.*.attention.q_proj+k_proj+v_proj transformer.h.*.attn.c_attn [columns]
stack.blocks.*.attention.o_proj               transformer.h.*.attn.c_proj [turned]
stack.blocks.*.feed_forward_norm              transformer.h.*.ln_2
stack.blocks.*.feed_forward.up_proj           transformer.h.*.mlp.c_fc    [turned]
stack.blocks.*.feed_forward.down_proj         transformer.h.*.mlp.c_proj  [turned]
"""
BERT = """
embedding.tokens                      bert.embeddings.word_embeddings
embedding.segments                    bert.embeddings.token_type_embeddings
stack.positions.table                 bert.embeddings.position_embeddings.weight
stack.embedding_norm                  bert.embeddings.LayerNorm
stack.blocks.*.attention.q_proj       bert.encoder.layer.*.attention.self.query
stack.blocks.*.attention.k_proj       bert.encoder.layer.*.attention.self.key
stack.blocks.*.attention.v_proj       bert.encoder.layer.*.attention.self.value
stack.blocks.*.attention.o_proj       bert.encoder.layer.*.attention.output.dense
stack.blocks.*.attention_norm         bert.encoder.layer.*.attention.output.LayerNorm
stack.blocks.*.feed_forward.up_proj   bert.encoder.layer.*.intermediate.dense
stack.blocks.*.feed_forward.down_proj bert.encoder.layer.*.output.dense
stack.blocks.*.feed_forward_norm      bert.encoder.layer.*.output.LayerNorm
pooler                                bert.pooler.dense
head.transform                        cls.predictions.transform.dense
head.norm                             cls.predictions.transform.LayerNorm
head.proj.bias                        cls.predictions.bias
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
encoder.blocks.*.feed_forward.up_proj.weight   encoder.block.*.layer.1.DenseReluDense.wi.weight
encoder.blocks.*.feed_forward.down_proj.weight encoder.block.*.layer.1.DenseReluDense.wo.weight
encoder.norm                            encoder.final_layer_norm
embedding.tokens                        encoder.embed_tokens
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
embedding.tokens shared
head.proj        lm_head
"""
    + T5_STACK
    + T5_STACK.replace("encoder.", "decoder.").replace("layer.1.", "layer.2.")
    + T5_CROSS
)
T5_GATED = (
    T5.replace("DenseReluDense.wi.", "DenseReluDense.wi_1.")
    + """
encoder.blocks.*.feed_forward.gate_proj encoder.block.*.layer.1.DenseReluDense.wi_0
decoder.blocks.*.feed_forward.gate_proj decoder.block.*.layer.2.DenseReluDense.wi_0
"""
)
SWITCH_STACK = """
encoder.blocks.*.feed_forward.router.proj encoder.block.*.layer.1.mlp.router.classifier
encoder.blocks.*.feed_forward.up_proj     encoder.block.*.layer.1.mlp.experts.expert_#.wi.weight
encoder.blocks.*.feed_forward.down_proj   encoder.block.*.layer.1.mlp.experts.expert_#.wo.weight
"""
SWITCH = (
    T5.replace("DenseReluDense", "mlp")
    + SWITCH_STACK
    + SWITCH_STACK.replace("encoder.", "decoder.").replace("layer.1.", "layer.2.")
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
embedding.tokens                        model.encoder.embed_tokens
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
embedding.tokens model.shared
head.proj.weight lm_head.weight
head.proj.bias   final_logits_bias [row]
"""
    + BART_STACK
    + BART_STACK.replace("encoder.", "decoder.")
    + BART_CROSS
)
BLOOM = """
embedding.tokens                              transformer.word_embeddings
head.proj                                     lm_head
stack.embedding_norm                          transformer.word_embeddings_layernorm
stack.norm                                    transformer.ln_f
stack.blocks.*.attention_norm                 transformer.h.*.input_layernorm
stack.blocks.*.attention.q_proj+k_proj+v_proj transformer.h.*.self_attention.query_key_value [groups]
stack.blocks.*.attention.o_proj               transformer.h.*.self_attention.dense
stack.blocks.*.feed_forward_norm              transformer.h.*.post_attention_layernorm
stack.blocks.*.feed_forward.up_proj           transformer.h.*.mlp.dense_h_to_4h
stack.blocks.*.feed_forward.down_proj         transformer.h.*.mlp.dense_4h_to_h
"""  # noqa: E501
MPT = """
embedding.tokens                              transformer.wte
head.proj                                     lm_head
stack.norm                                    transformer.norm_f
stack.blocks.*.attention_norm                 transformer.blocks.*.norm_1
stack.blocks.*.attention.q_proj+k_proj+v_proj transformer.blocks.*.attn.Wqkv [rows]
stack.blocks.*.attention.o_proj               transformer.blocks.*.attn.out_proj
stack.blocks.*.feed_forward_norm              transformer.blocks.*.norm_2
stack.blocks.*.feed_forward.up_proj           transformer.blocks.*.ffn.up_proj
stack.blocks.*.feed_forward.down_proj         transformer.blocks.*.ffn.down_proj
"""
LLAMA = """
embedding.tokens                             model.embed_tokens
head.proj                                    lm_head
stack.norm                                   model.norm
stack.blocks.*.attention_norm                model.layers.*.input_layernorm
stack.blocks.*.attention.q_proj              model.layers.*.self_attn.q_proj
stack.blocks.*.attention.k_proj              model.layers.*.self_attn.k_proj
stack.blocks.*.attention.v_proj              model.layers.*.self_attn.v_proj
stack.blocks.*.attention.o_proj              model.layers.*.self_attn.o_proj
stack.blocks.*.attention.q_norm              model.layers.*.self_attn.q_norm
stack.blocks.*.attention.k_norm              model.layers.*.self_attn.k_norm
stack.blocks.*.attention.sinks               model.layers.*.self_attn.sinks
stack.blocks.*.feed_forward_norm             model.layers.*.post_attention_layernorm
stack.blocks.*.feed_forward.gate_proj.weight model.layers.*.mlp.gate_proj.weight
stack.blocks.*.feed_forward.up_proj.weight   model.layers.*.mlp.up_proj.weight
stack.blocks.*.feed_forward.down_proj.weight model.layers.*.mlp.down_proj.weight
"""
GEMMA = """
embedding.tokens                        model.embed_tokens
head.proj                               lm_head
stack.norm                              model.norm                                [gain - 1]
stack.blocks.*.attention_norm           model.layers.*.input_layernorm            [gain - 1]
stack.blocks.*.attention.q_proj         model.layers.*.self_attn.q_proj
stack.blocks.*.attention.k_proj         model.layers.*.self_attn.k_proj
stack.blocks.*.attention.v_proj         model.layers.*.self_attn.v_proj
stack.blocks.*.attention.o_proj         model.layers.*.self_attn.o_proj
stack.blocks.*.attention.q_norm         model.layers.*.self_attn.q_norm           [gain - 1]
stack.blocks.*.attention.k_norm         model.layers.*.self_attn.k_norm           [gain - 1]
stack.blocks.*.attention_output_norm    model.layers.*.post_attention_layernorm   [gain - 1]
stack.blocks.*.feed_forward_norm        model.layers.*.pre_feedforward_layernorm  [gain - 1]
stack.blocks.*.feed_forward.gate_proj   model.layers.*.mlp.gate_proj
stack.blocks.*.feed_forward.up_proj     model.layers.*.mlp.up_proj
stack.blocks.*.feed_forward.down_proj   model.layers.*.mlp.down_proj
stack.blocks.*.feed_forward_output_norm model.layers.*.post_feedforward_layernorm [gain - 1]
"""
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
LLAMA4 = (
    LLAMA.replace(".mlp.", ".feed_forward.")
    + """
stack.blocks.*.feed_forward.router.proj       model.layers.*.feed_forward.router
stack.blocks.*.feed_forward.gate_proj+up_proj model.layers.*.feed_forward.experts.gate_up_proj [turned halves]
stack.blocks.*.feed_forward.down_proj         model.layers.*.feed_forward.experts.down_proj    [turned]
stack.blocks.*.feed_forward.shared.gate_proj  model.layers.*.feed_forward.shared_expert.gate_proj
stack.blocks.*.feed_forward.shared.up_proj    model.layers.*.feed_forward.shared_expert.up_proj
stack.blocks.*.feed_forward.shared.down_proj  model.layers.*.feed_forward.shared_expert.down_proj
"""  # noqa: E501
)
GPT_OSS = (
    LLAMA
    + """
stack.blocks.*.feed_forward.router.proj       model.layers.*.mlp.router
stack.blocks.*.feed_forward.gate_proj+up_proj model.layers.*.mlp.experts.gate_up_proj      [woven]
stack.blocks.*.feed_forward.gate_bias+up_bias model.layers.*.mlp.experts.gate_up_proj_bias [woven]
stack.blocks.*.feed_forward.down_proj         model.layers.*.mlp.experts.down_proj         [turned]
stack.blocks.*.feed_forward.down_bias         model.layers.*.mlp.experts.down_proj_bias
"""
)
DEEPSEEK = (
    LLAMA
    + EXPERTS
    + """
stack.blocks.*.attention.q_a_proj  model.layers.*.self_attn.q_a_proj
stack.blocks.*.attention.q_a_norm  model.layers.*.self_attn.q_a_layernorm
stack.blocks.*.attention.q_b_proj  model.layers.*.self_attn.q_b_proj
stack.blocks.*.attention.kv_a_proj model.layers.*.self_attn.kv_a_proj_with_mqa
stack.blocks.*.attention.kv_a_norm model.layers.*.self_attn.kv_a_layernorm
stack.blocks.*.attention.kv_b_proj model.layers.*.self_attn.kv_b_proj
"""
)

# --- settings that take more than a look


class HFConfig(dict):
    """A config.json whose missing settings are errors."""

    def __missing__(self, key: str) -> object:
        raise ValueError(f'config.json must have "{key}"; it has {", ".join(sorted(self))}')


Reader = Callable[[HFConfig], object]

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
"""Our names of their activations."""


def activation(key: str, usual: str | None = None) -> Reader:
    """Read our name of the activation from a setting, which may be missing if one is usual."""

    def read(hf: HFConfig) -> str:
        kind = hf[key] if usual is None else hf.get(key, usual)
        check_choice(key, kind, ACTIVATIONS)
        return ACTIVATIONS[kind]

    return read


def rope(hf: HFConfig) -> HFConfig:
    """Find the settings of RoPE: in one place in version 5 of transformers, in two before."""
    together = hf.get("rope_parameters") or {}
    together = together.get("full_attention", together)
    return HFConfig(
        {"rope_theta": hf.get("rope_theta")} | (hf.get("rope_scaling") or {}) | together
    )


def rope_theta(usual: float) -> Reader:
    """Read the base of RoPE."""
    return lambda hf: float(rope(hf)["rope_theta"] or usual)


def local_rope_theta(hf: HFConfig) -> float:
    """Read the base of RoPE in layers with a window, which nothing stretches."""
    settings = HFConfig((hf.get("rope_parameters") or {}).get("sliding_attention", {}))
    kind = settings.get("rope_type", "default")
    check_choice("rope_type of sliding_attention", kind, ["default"])
    return float(hf.get("rope_local_base_freq") or settings["rope_theta"])


def mscale(factor: float, weight: float) -> float:
    """Give DeepSeek's factor for attention over longer sequences."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def yarn(hf: HFConfig) -> YaRNScaling:
    """Read YaRN, with the temperature of those who split it in two."""
    factor, own, all_dim = hf["factor"], hf.get("mscale"), hf.get("mscale_all_dim")
    temperature = hf.get("attention_factor")
    if temperature is None and own and all_dim:
        temperature = mscale(factor, own) / mscale(factor, all_dim)
    return YaRNScaling(
        factor=float(factor),
        original_length=hf["original_max_position_embeddings"],
        beta_fast=float(hf.get("beta_fast") or 32),
        beta_slow=float(hf.get("beta_slow") or 1),
        truncate=hf.get("truncate", True),
        temperature=temperature,
    )


SCALINGS: Mapping[str, Callable[[HFConfig], RopeScaling | None]] = {
    "default": lambda hf: None,
    "linear": lambda hf: LinearScaling(factor=float(hf["factor"])),
    "yarn": yarn,
    "llama3": lambda hf: Llama3Scaling(
        factor=float(hf["factor"]),
        low_freq_factor=float(hf["low_freq_factor"]),
        high_freq_factor=float(hf["high_freq_factor"]),
        original_length=hf["original_max_position_embeddings"],
    ),
}
"""How RoPE is stretched, by their names."""


def rope_scaling(hf: HFConfig) -> RopeScaling | None:
    """Read how RoPE is stretched."""
    settings = rope(hf)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    check_choice("rope_type", kind, SCALINGS)
    part = settings.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if part not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor must be 1.0; got {part}")
    return SCALINGS[kind](settings)


def window(hf: HFConfig) -> int | None:
    """Read the window, if any layer has one."""
    kinds = hf.get("layer_types")
    for kind in kinds or []:
        check_choice("each of layer_types", kind, ["sliding_attention", "full_attention"])
    if kinds is not None and len(kinds) != hf["num_hidden_layers"]:
        raise ValueError(
            f"layer_types must have num_hidden_layers ({hf['num_hidden_layers']}) entries; "
            f"got {len(kinds)}"
        )
    return hf["sliding_window"] if kinds is None or "sliding_attention" in kinds else None


def qwen_window(hf: HFConfig) -> int | None:
    """Read the window of those that have none unless they say so."""
    return window(hf) if hf.get("use_sliding_window", False) else None


def global_every(usual: int | None) -> Reader:
    """Read every how many-th layer has no window: as the config lists them, or as is usual."""

    def read(hf: HFConfig) -> int | None:
        kinds = hf.get("layer_types")
        if hf.get("sliding_window") is None or window(hf) is None:
            return None
        if kinds is None:
            return hf.get("sliding_window_pattern", usual)
        every = kinds.index("full_attention") + 1 if "full_attention" in kinds else None
        for layer, kind in enumerate(kinds):
            if (kind == "full_attention") != (every is not None and (layer + 1) % every == 0):
                raise ValueError(f"every n-th layer must have no window; got layer_types {kinds}")
        return every

    return read


def llama4_kinds(hf: HFConfig) -> list[str]:
    """Say which layers of Llama 4 have chunks and positions: those listed, or three in four."""
    every = hf.get("no_rope_layer_interval", 4)
    usual = [(layer + 1) % every for layer in range(hf["num_hidden_layers"])]
    listed = hf.get("no_rope_layers") or usual
    return ["chunked_attention" if turned else "full_attention" for turned in listed]


def chunks(read: Reader) -> Reader:
    """Read the chunks of Llama 4 by a function that reads windows."""

    def read_chunks(hf: HFConfig) -> object:
        kinds = [kind.replace("chunked", "sliding") for kind in llama4_kinds(hf)]
        return read(
            HFConfig(hf | {"layer_types": kinds, "sliding_window": hf["attention_chunk_size"]})
        )

    return read_chunks


def rope_scaling_before_norm(hf: HFConfig) -> RopeScaling | None:
    """Read how RoPE is stretched, where a norm follows it, which a temperature would not pass."""
    check_choice("rope_type", rope(hf).get("rope_type", "default"), SCALINGS.keys() - {"yarn"})
    return rope_scaling(hf)


def query_scaling(hf: HFConfig) -> QueryScaling | None:
    """Read by what late queries are multiplied."""
    if not hf["attn_temperature_tuning"]:
        return None
    return QueryScaling(length=hf["floor_scale"], strength=hf["attn_scale"])


def t5_decoder_layers(hf: HFConfig) -> int:
    """Read the number of layers that write: as many as read, if it is not said."""
    return hf.get("num_decoder_layers") or hf["num_layers"]


def t5_activation(hf: HFConfig) -> str:
    """Read the activation of T5; what it calls gated-gelu is the approximation by tanh."""
    kind = hf["feed_forward_proj"].removeprefix("gated-")
    gelu = {"gelu": "gelu_new"} if hf["feed_forward_proj"].startswith("gated-") else {}
    return activation("feed_forward_proj")(HFConfig(feed_forward_proj=gelu.get(kind, kind)))


def experts(**fields: object) -> Reader:
    """Read a mixture of experts; its fields are read as those of a config are."""
    return lambda hf: Experts(**read_fields(hf, fields))


def switch_step(hf: HFConfig) -> int:
    """Read every how many-th layer of Switch is a mixture, which must be so in both stacks."""
    steps = [
        layers // hf[mixtures] if hf[mixtures] else 0
        for layers, mixtures in (
            (hf["num_layers"], "num_sparse_encoder_layers"),
            (t5_decoder_layers(hf), "num_sparse_decoder_layers"),
        )
    ]
    if not steps[0] == steps[1] >= 1:
        raise ValueError(f"every n-th layer must be a mixture, in both stacks; got n = {steps}")
    return steps[0]


def latent_scale(hf: HFConfig) -> float:
    """Read the factor of MLA's dot products, raised for longer sequences."""
    settings = rope(hf)
    longer = settings.get("mscale_all_dim") and mscale(
        settings["factor"], settings["mscale_all_dim"]
    )
    return (longer or 1.0) ** 2 / math.sqrt(hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"])


def pooled(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """See whether an encoder comes with a pooler: the same config stands beside both."""
    return {"pooler": any("pooler.dense" in name for name in tensors)}


def t5_untied(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """See two matrices in T5 1.1, which version 5 of transformers calls tied all the same."""
    table, matrix = tensors.get("shared.weight"), tensors.get("lm_head.weight")
    both = table is not None and matrix is not None
    return {"tied_embeddings": False} if both and not torch.equal(table, matrix) else {}


def read_fields(hf: HFConfig, fields: Mapping[str, object]) -> dict[str, object]:
    """Read our fields: by the name of a setting, by name and default, or by a function."""
    values = {}
    for ours, how in fields.items():
        if isinstance(how, str):
            values[ours] = hf[how]
        elif isinstance(how, tuple):
            values[ours] = hf.get(*how)
        else:
            values[ours] = how(hf)
    return values


# --- the families


class Family(NamedTuple):
    """Say how the files of a family spell configs and names.

    Args:
        choices: what all models of the family do.
        fields: our field, and the setting that says it: its name, name and default, or a function.
        only: settings that must have one value, if they are there: no other is built here.
        names: the table of names.
        prefix: what a checkpoint of the body without a head leaves out of all names.
        ignored: tensors that hold nothing that was learned, or a head that is not built here.
        gated_names: the table of names of a model with a gate, where that is another.
        told_by_tensors: our fields that no setting says, and only the tensors do.
    """

    choices: Mapping[str, object]
    fields: Mapping[str, object]
    only: Mapping[str, object]
    names: str
    prefix: str = "model."
    ignored: str = r".*rotary_emb\.inv_freq"
    gated_names: str | None = None
    told_by_tensors: Callable[[Mapping[str, Tensor]], dict[str, object]] = lambda tensors: {}


TIED = {"tied_embeddings": ("tie_word_embeddings", True)}
SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
}
BERT_FIELDS = (
    SIZES
    | TIED
    | {
        "n_segments": "type_vocab_size",
        "norm_eps": "layer_norm_eps",
        "activation": activation("hidden_act"),
    }
)
BERT_ONLY = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
BART_FIELDS = TIED | {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "n_encoder_layers": "encoder_layers",
    "n_layers": "decoder_layers",
    "n_heads": "decoder_attention_heads",
    "d_ff": "decoder_ffn_dim",
    "max_seq_len": "max_position_embeddings",
    "scale_embeddings": "scale_embedding",
    "head_bias": lambda hf: True,
    "activation": activation("activation_function"),
}
BART_ONLY = {
    "normalize_before": False,
    "add_final_layer_norm": False,
    "is_decoder": False,
    "share_encoder_decoder_embeddings": True,
    "encoder_ffn_dim": lambda hf: hf["decoder_ffn_dim"],
    "encoder_attention_heads": lambda hf: hf["decoder_attention_heads"],
    "decoder_vocab_size": lambda hf: hf["vocab_size"],
}
LLAMA_FIELDS = SIZES | {
    "n_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "rope_theta": rope_theta(10_000.0),
    "rope_scaling": rope_scaling,
    "norm_eps": "rms_norm_eps",
    "attention_bias": ("attention_bias", False),
    "activation": activation("hidden_act"),
    "tied_embeddings": ("tie_word_embeddings", False),
}
T5_FIELDS = TIED | {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "n_encoder_layers": "num_layers",
    "n_layers": t5_decoder_layers,
    "n_heads": "num_heads",
    "head_dim": "d_kv",
    "d_ff": "d_ff",
    "t5_buckets": "relative_attention_num_buckets",
    "t5_max_distance": ("relative_attention_max_distance", 128),
    "norm_eps": "layer_norm_epsilon",
}
T5_ONLY = {"is_encoder_decoder": True, "is_decoder": False}
LLAMA_ONLY = {"mlp_bias": False}
WINDOW = {"window": window, "global_every": global_every(None)}
QWEN_WINDOW = {"window": qwen_window, "global_every": global_every(None)}
QWEN_ONLY = LLAMA_ONLY | {  # which layers have the window, a list must say
    "use_sliding_window": lambda hf: "layer_types" in hf and bool(hf.get("use_sliding_window")),
}
GEMMA_FIELDS = (
    LLAMA_FIELDS
    | TIED
    | {
        "activation": activation("hidden_activation"),
        "attention_scale": lambda hf: hf["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
        "window": window,
    }
)
MOE = {"d_ff": lambda hf: None}
SWITCH_EXPERTS = {
    "d_ff": "d_ff",
    "n_experts": "num_experts",
    "top_k": lambda hf: 1,
    "n_dense_layers": lambda hf: min(switch_step(hf) - 1, 1),
    "every": switch_step,
    "normalise": lambda hf: False,
    "router_bias": ("router_bias", False),
    "noise": ("router_jitter_noise", 0.01),
    "capacity": "expert_capacity",
}
LLAMA4_EXPERTS = {
    "d_ff": "intermediate_size",
    "n_experts": "num_local_experts",
    "top_k": "num_experts_per_tok",
    "n_shared": lambda hf: 1,
    "n_dense_layers": lambda hf: hf["interleave_moe_layer_step"] - 1,
    "every": "interleave_moe_layer_step",
    "score": lambda hf: "sigmoid",
    "normalise": lambda hf: False,
    "scale_input": lambda hf: True,
}
DEEPSEEK_FIELDS = {
    "d_ff": "moe_intermediate_size",
    "n_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "n_shared": "n_shared_experts",
    "n_dense_layers": "first_k_dense_replace",
    "scale": "routed_scaling_factor",
}
DEEPSEEK_2 = DEEPSEEK_FIELDS | {
    "normalise": lambda hf: False,
    "n_groups": lambda hf: hf["n_group"] if limited(hf) else 1,
    "top_k_groups": lambda hf: hf["topk_group"] if limited(hf) else 1,
}
DEEPSEEK_3 = DEEPSEEK_FIELDS | {
    "score": lambda hf: "sigmoid",
    "normalise": "norm_topk_prob",
    "choice_bias": lambda hf: True,
    "n_groups": "n_group",
    "top_k_groups": "topk_group",
    "top_k_in_group": lambda hf: 2,
}
MLA = LLAMA_FIELDS | {
    "d_ff": lambda hf: hf["intermediate_size"] if hf["first_k_dense_replace"] else None,
    "n_kv_heads": lambda hf: None,
    "head_dim": "qk_nope_head_dim",
    "rope_interleaved": ("rope_interleave", True),
    "attention_scale": latent_scale,
    "latent": lambda hf: Latent(
        kv_lora_rank=hf["kv_lora_rank"],
        q_lora_rank=hf["q_lora_rank"],
        rope_head_dim=hf["qk_rope_head_dim"],
        v_head_dim=hf["v_head_dim"],
    ),
}


def limited(hf: HFConfig) -> bool:
    """Say whether DeepSeek-V2 chooses its experts from some groups only."""
    check_choice("topk_method", hf["topk_method"], ["greedy", "group_limited_greedy"])
    return hf["topk_method"] == "group_limited_greedy"


FAMILIES = {
    "gpt2": Family(
        zoo.GPT2,
        TIED
        | {
            "vocab_size": "vocab_size",
            "d_model": "n_embd",
            "n_layers": "n_layer",
            "n_heads": "n_head",
            "d_ff": lambda hf: hf.get("n_inner") or 4 * hf["n_embd"],
            "max_seq_len": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "activation": activation("activation_function"),
        },
        {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        GPT2,
        "transformer.",
        r".*\.attn\.(masked_)?bias",
    ),
    "bert": Family(
        zoo.BERT,
        BERT_FIELDS,
        BERT_ONLY,
        BERT,
        "bert.",
        r".*position_ids|cls\.seq_relationship\..*",
        told_by_tensors=pooled,
    ),
    "roberta": Family(
        zoo.BERT,
        BERT_FIELDS
        | {
            "first_position": lambda hf: hf["pad_token_id"] + 1,
            "max_seq_len": lambda hf: hf["max_position_embeddings"] - hf["pad_token_id"] - 1,
        },
        BERT_ONLY | {"hidden_act": "gelu"},  # its head has no other
        ROBERTA,
        "roberta.",
        r".*position_ids",
        told_by_tensors=pooled,
    ),
    "t5": Family(
        zoo.T5,
        T5_FIELDS
        | {
            "activation": t5_activation,
            "gated": lambda hf: hf["feed_forward_proj"].startswith("gated-"),
            "scale_logits": lambda hf: hf.get(
                "scale_decoder_outputs", hf.get("tie_word_embeddings", True)
            ),
        },
        T5_ONLY,
        T5,
        "",
        r"decoder\..*EncDecAttention\.relative_attention_bias\.weight",
        gated_names=T5_GATED,
        told_by_tensors=t5_untied,
    ),
    "switch_transformers": Family(
        zoo.T5,
        T5_FIELDS
        | {
            "d_ff": lambda hf: hf["d_ff"] if switch_step(hf) > 1 else None,
            "activation": activation("dense_act_fn", "relu"),
            "scale_logits": ("tie_word_embeddings", True),
            "experts": experts(**SWITCH_EXPERTS),
        },
        T5_ONLY | {"router_dtype": "float32"},
        SWITCH,
        "",
        r"decoder\..*EncDecAttention\.relative_attention_bias\.weight",
        told_by_tensors=t5_untied,
    ),
    "bart": Family(
        zoo.BART,
        BART_FIELDS,
        BART_ONLY | {"normalize_embedding": True, "static_position_embeddings": False},
        BART,
    ),
    "marian": Family(
        zoo.MARIAN,
        BART_FIELDS,
        BART_ONLY | {"normalize_embedding": False, "static_position_embeddings": True},
        BART,
        ignored=r".*embed_positions\.weight",
    ),
    "bloom": Family(
        zoo.BLOOM,
        TIED
        | {
            "vocab_size": "vocab_size",
            "d_model": lambda hf: hf.get("hidden_size") or hf["n_embed"],
            "n_layers": "n_layer",
            "n_heads": "n_head",
            "d_ff": lambda hf: 4 * (hf.get("hidden_size") or hf["n_embed"]),
            "max_seq_len": ("seq_length", None),
            "norm_eps": "layer_norm_epsilon",
        },
        {"apply_residual_connection_post_layernorm": False},
        BLOOM,
        "transformer.",
    ),
    "mpt": Family(
        zoo.MPT,
        TIED
        | {
            "vocab_size": "vocab_size",
            "d_model": "d_model",
            "n_layers": "n_layers",
            "n_heads": "n_heads",
            "d_ff": lambda hf: hf["expansion_ratio"] * hf["d_model"],
            "max_seq_len": "max_seq_len",
            "norm_eps": ("layer_norm_epsilon", 1e-5),
            "attention_scale": lambda hf: hf["attn_config"].get("softmax_scale"),
        },
        {
            "no_bias": True,
            "logit_scale": None,
            "embedding_fraction": 1.0,
            "norm_type": "low_precision_layernorm",
            "attn_config.attn_uses_sequence_id": False,
            "attn_config.alibi": True,
            "attn_config.alibi_bias_max": 8,
            "attn_config.qk_ln": False,
            "attn_config.clip_qkv": None,
            "attn_config.prefix_lm": False,
            "attn_config.attn_type": "multihead_attention",
        },
        MPT,
        "transformer.",
    ),
    "falcon": Family(
        zoo.FALCON,
        TIED
        | {
            "vocab_size": "vocab_size",
            "d_model": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "n_kv_heads": lambda hf: 1 if hf["multi_query"] else hf["num_attention_heads"],
            "d_ff": lambda hf: hf.get("ffn_hidden_size") or 4 * hf["hidden_size"],
            "max_seq_len": ("max_position_embeddings", None),
            "norm_eps": "layer_norm_epsilon",
            "rope_theta": rope_theta(10_000.0),
            "rope_scaling": rope_scaling,
            "attention_bias": "bias",
            "feed_forward_bias": "bias",
            "activation": activation("activation", "gelu"),
        },
        {
            "alibi": False,
            "new_decoder_architecture": False,
            "num_ln_in_parallel_attn": None,
            "parallel_attn": True,
        },
        BLOOM,
        "transformer.",
        r".*rotary.*inv_freq",
    ),
    "llama": Family(zoo.LLAMA, LLAMA_FIELDS, LLAMA_ONLY, LLAMA),
    "mistral": Family(zoo.LLAMA, LLAMA_FIELDS | WINDOW, LLAMA_ONLY, LLAMA),
    "qwen2": Family(
        zoo.QWEN2,
        LLAMA_FIELDS | QWEN_WINDOW | {"attention_bias": lambda hf: "qkv"},
        QWEN_ONLY,
        LLAMA,
    ),
    "qwen3": Family(zoo.QWEN3, LLAMA_FIELDS | QWEN_WINDOW, QWEN_ONLY, LLAMA),
    "gemma2": Family(
        zoo.GEMMA2,
        GEMMA_FIELDS | {"global_every": global_every(2)},
        LLAMA_ONLY | {"use_bidirectional_attention": None},
        GEMMA,
    ),
    "gemma3_text": Family(
        zoo.GEMMA3,
        GEMMA_FIELDS
        | {
            "global_every": global_every(6),
            "rope_theta": rope_theta(1e6),
            "local_rope_theta": local_rope_theta,
        },
        LLAMA_ONLY | {"use_bidirectional_attention": False},
        GEMMA,
    ),
    "mixtral": Family(
        zoo.LLAMA,
        LLAMA_FIELDS
        | WINDOW
        | MOE
        | {
            "rope_theta": rope_theta(1e6),
            "window": lambda hf: window(HFConfig({"sliding_window": None} | hf)),
            "experts": experts(
                d_ff="intermediate_size", n_experts="num_local_experts", top_k="num_experts_per_tok"
            ),
        },
        LLAMA_ONLY,
        MIXTRAL,
    ),
    "qwen3_moe": Family(
        zoo.QWEN3,
        LLAMA_FIELDS
        | QWEN_WINDOW
        | MOE
        | {
            "experts": experts(
                d_ff="moe_intermediate_size",
                n_experts=lambda hf: hf.get("num_local_experts") or hf["num_experts"],
                top_k="num_experts_per_tok",
                normalise="norm_topk_prob",
            )
        },
        QWEN_ONLY | {"decoder_sparse_step": 1, "mlp_only_layers": []},
        LLAMA + EXPERTS,
    ),
    "llama4_text": Family(
        zoo.LLAMA4,
        LLAMA_FIELDS
        | {
            "d_ff": lambda hf: (
                hf["intermediate_size_mlp"] if hf["interleave_moe_layer_step"] > 1 else None
            ),
            "rope_theta": rope_theta(500_000.0),
            "rope_scaling": rope_scaling_before_norm,
            "window": chunks(window),
            "global_every": chunks(global_every(None)),
            "qk_norm": lambda hf: "rms_norm_no_gain" if hf["use_qk_norm"] else None,
            "global_qk_norm": lambda hf: not hf["use_qk_norm"],
            "query_scaling": query_scaling,
            "experts": experts(**LLAMA4_EXPERTS),
        },
        {
            "layer_types": llama4_kinds,
            "moe_layers": lambda hf: [
                layer
                for layer in range(hf["num_hidden_layers"])
                if (layer + 1) % hf["interleave_moe_layer_step"] == 0
            ],
        },
        LLAMA4,
    ),
    "gpt_oss": Family(
        zoo.GPT_OSS,
        LLAMA_FIELDS
        | MOE
        | {
            "rope_theta": rope_theta(150_000.0),
            "attention_bias": ("attention_bias", True),
            "activation": lambda hf: "swiglu_clamped",
            "window": window,
            "global_every": global_every(2),
            "experts": experts(
                d_ff="intermediate_size",
                n_experts="num_local_experts",
                top_k="num_experts_per_tok",
                router_bias=lambda hf: True,
            ),
        },
        {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        GPT_OSS,
    ),
    "deepseek_v2": Family(
        zoo.DEEPSEEK,
        MLA | {"experts": experts(**DEEPSEEK_2)},
        LLAMA_ONLY | {"moe_layer_freq": 1, "scoring_func": "softmax", "norm_topk_prob": False},
        DEEPSEEK,
    ),
    "deepseek_v3": Family(
        zoo.DEEPSEEK,
        MLA | {"experts": experts(**DEEPSEEK_3)},
        LLAMA_ONLY | {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        DEEPSEEK,
        ignored=r".*rotary_emb\.inv_freq|model\.layers\.61\..*",  # it predicts a second token
    ),
}
"""The families, by the model_type of their config.json."""


def family_of(model_type: str) -> Family:
    """Look a family up.

    Raises:
        ValueError: if it is unknown.
    """
    check_choice("model_type", model_type, FAMILIES)
    return FAMILIES[model_type]


def choices_of(settings: Mapping[str, object]) -> dict[str, object]:
    """Read a config.json: the arguments of our config.

    Raises:
        ValueError: if the family is unknown, a setting is missing, or one has a value of which no
            model is built here.
    """
    hf = HFConfig(settings)
    family = family_of(hf["model_type"])
    for key, wanted in family.only.items():
        group, _, name = key.rpartition(".")
        place = HFConfig(hf[group]) if group else hf
        wanted = wanted(hf) if callable(wanted) else wanted
        if place.get(name, wanted) != wanted:
            raise ValueError(f"{key} must be {wanted!r}; got {place[name]!r}")
    return {**family.choices, **read_fields(hf, family.fields)}
