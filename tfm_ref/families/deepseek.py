"""DeepSeek-V2 and V3: latent attention, and mixtures whose experts stand in groups."""

import math

from tfm_ref import architectures
from tfm_ref.config import Latent
from tfm_ref.families import llama, mixture
from tfm_ref.families.family import Family, HFConfig
from tfm_ref.families.settings import experts, mscale, rope
from tfm_ref.validation import check_choice

NAMES = (
    llama.NAMES
    + mixture.EXPERT_NAMES
    + """
stack.blocks.*.attention.q_a_proj  model.layers.*.self_attn.q_a_proj
stack.blocks.*.attention.q_a_norm  model.layers.*.self_attn.q_a_layernorm
stack.blocks.*.attention.q_b_proj  model.layers.*.self_attn.q_b_proj
stack.blocks.*.attention.kv_a_proj model.layers.*.self_attn.kv_a_proj_with_mqa
stack.blocks.*.attention.kv_a_norm model.layers.*.self_attn.kv_a_layernorm
stack.blocks.*.attention.kv_b_proj model.layers.*.self_attn.kv_b_proj
"""
)


def is_limited(hf: HFConfig) -> bool:
    """Say whether DeepSeek-V2 chooses its experts from some groups only."""
    check_choice("topk_method", hf["topk_method"], ["greedy", "group_limited_greedy"])
    return hf["topk_method"] == "group_limited_greedy"


def latent_scale(hf: HFConfig) -> float:
    """Read the factor of MLA's dot products, raised for longer sequences."""
    settings = rope(hf)
    longer = settings.get("mscale_all_dim") and mscale(
        settings["factor"], settings["mscale_all_dim"]
    )
    return (longer or 1.0) ** 2 / math.sqrt(hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"])


FIELDS = llama.FIELDS | {
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
EXPERTS = {
    "d_ff": "moe_intermediate_size",
    "n_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "n_shared": "n_shared_experts",
    "n_dense_layers": "first_k_dense_replace",
    "scale": "routed_scaling_factor",
}
V2_EXPERTS = EXPERTS | {
    "n_groups": lambda hf: hf["n_group"] if is_limited(hf) else 1,
    "top_k_groups": lambda hf: hf["topk_group"] if is_limited(hf) else 1,
}
V3_EXPERTS = EXPERTS | {
    "normalise": "norm_topk_prob",
    "n_groups": "n_group",
    "top_k_groups": "topk_group",
}
ONLY = llama.ONLY | {"moe_layer_freq": 1}

DEEPSEEK_V2 = Family(
    choices=architectures.DEEPSEEK,
    fields=FIELDS | {"experts": experts(V2_EXPERTS, normalise=False)},
    only=ONLY | {"scoring_func": "softmax", "norm_topk_prob": False},
    names=NAMES,
)
DEEPSEEK_V3 = Family(
    choices=architectures.DEEPSEEK,
    fields=FIELDS
    | {"experts": experts(V3_EXPERTS, score="sigmoid", choice_bias=True, top_k_in_group=2)},
    only=ONLY | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    names=NAMES,
    ignored=r".*rotary_emb\.inv_freq|model\.layers\.61\..*",  # it predicts a second token
)
