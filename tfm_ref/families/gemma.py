"""Gemma 2 and 3: decoders with norms on both sides of a sub-layer, and windows between."""

from tfm_ref import architectures
from tfm_ref.families import llama
from tfm_ref.families.family import Family, HFConfig
from tfm_ref.families.settings import TIED, activation, global_every, rope_theta, window
from tfm_ref.validation import check_choice

NAMES = """
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


def local_rope_theta(hf: HFConfig) -> float:
    """Read the base of RoPE in layers with a window, which nothing stretches."""
    settings = HFConfig((hf.get("rope_parameters") or {}).get("sliding_attention", {}))
    kind = settings.get("rope_type", "default")
    check_choice("rope_type of sliding_attention", kind, ["default"])
    return float(hf.get("rope_local_base_freq") or settings["rope_theta"])


FIELDS = (
    llama.FIELDS
    | TIED
    | {
        "activation": activation("hidden_activation"),
        "attention_scale": lambda hf: hf["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
        "window": window,
    }
)

GEMMA2 = Family(
    choices=architectures.GEMMA2,
    fields=FIELDS | {"global_every": global_every(2)},
    only=llama.ONLY | {"use_bidirectional_attention": None},
    names=NAMES,
)
GEMMA3 = Family(
    choices=architectures.GEMMA3,
    fields=FIELDS
    | {
        "global_every": global_every(6),
        "rope_theta": rope_theta(1e6),
        "local_rope_theta": local_rope_theta,
    },
    only=llama.ONLY | {"use_bidirectional_attention": False},
    names=NAMES,
)
