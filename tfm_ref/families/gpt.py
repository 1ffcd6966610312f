"""Decoders that grew from GPT-2: GPT-2, BLOOM, MPT and Falcon."""

from tfm_ref import architectures
from tfm_ref.families.family import Family, HFConfig
from tfm_ref.families.settings import TIED, activation, rope_scaling, rope_theta

GPT2_NAMES = """
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
BLOOM_NAMES = """
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
MPT_NAMES = """
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


def bloom_width(hf: HFConfig) -> int:
    """Read the width of BLOOM, which has two names."""
    return hf.get("hidden_size") or hf["n_embed"]


GPT2 = Family(
    choices=architectures.GPT2,
    fields=TIED
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
    only={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    names=GPT2_NAMES,
    prefix="transformer.",
    ignored=r".*\.attn\.(masked_)?bias",
)
BLOOM = Family(
    choices=architectures.BLOOM,
    fields=TIED
    | {
        "vocab_size": "vocab_size",
        "d_model": bloom_width,
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "d_ff": lambda hf: 4 * bloom_width(hf),
        "max_seq_len": ("seq_length", None),
        "norm_eps": "layer_norm_epsilon",
    },
    only={"apply_residual_connection_post_layernorm": False},
    names=BLOOM_NAMES,
    prefix="transformer.",
)
MPT = Family(
    choices=architectures.MPT,
    fields=TIED
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
    only={
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
    names=MPT_NAMES,
    prefix="transformer.",
)
FALCON = Family(
    choices=architectures.FALCON,
    fields=TIED
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
    only={
        "alibi": False,
        "new_decoder_architecture": False,
        "num_ln_in_parallel_attn": None,
        "parallel_attn": True,
    },
    names=BLOOM_NAMES,
    prefix="transformer.",
    ignored=r".*rotary.*inv_freq",
)
