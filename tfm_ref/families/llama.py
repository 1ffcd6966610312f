"""Decoders of the kind of Llama: Llama 1 to 3, Mistral, Qwen 2 and 3."""

from tfm_ref import architectures
from tfm_ref.families.family import Family, HFConfig
from tfm_ref.families.settings import (
    SIZES,
    activation,
    global_every,
    rope_scaling,
    rope_theta,
    window,
)

NAMES = """
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


def qwen_window(hf: HFConfig) -> int | None:
    """Read the window of those that have none unless they say so."""
    return window(hf) if hf.get("use_sliding_window", False) else None


FIELDS = SIZES | {
    "n_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "rope_theta": rope_theta(10_000.0),
    "rope_scaling": rope_scaling,
    "norm_eps": "rms_norm_eps",
    "attention_bias": ("attention_bias", False),
    "activation": activation("hidden_act"),
    "tied_embeddings": ("tie_word_embeddings", False),
}
MISTRAL_FIELDS = FIELDS | {"window": window, "global_every": global_every(None)}
QWEN_FIELDS = FIELDS | {"window": qwen_window, "global_every": global_every(None)}
ONLY = {"mlp_bias": False}
QWEN_ONLY = ONLY | {  # which layers have the window, a list must say
    "use_sliding_window": lambda hf: "layer_types" in hf and bool(hf.get("use_sliding_window")),
}

LLAMA = Family(choices=architectures.LLAMA, fields=FIELDS, only=ONLY, names=NAMES)
MISTRAL = Family(choices=architectures.LLAMA, fields=MISTRAL_FIELDS, only=ONLY, names=NAMES)
QWEN2 = Family(
    choices=architectures.QWEN2,
    fields=QWEN_FIELDS | {"attention_bias": lambda hf: "qkv"},
    only=QWEN_ONLY,
    names=NAMES,
)
QWEN3 = Family(choices=architectures.QWEN3, fields=QWEN_FIELDS, only=QWEN_ONLY, names=NAMES)
