"""Decoders of the kind of Llama with mixtures of experts: Mixtral, Qwen 3 and gpt-oss."""

from tfm_ref import architectures
from tfm_ref.families import llama
from tfm_ref.families.family import Family, HFConfig
from tfm_ref.families.settings import experts, global_every, rope_theta, window

EXPERT_NAMES = """
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
MIXTRAL_NAMES = (
    llama.NAMES
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
GPT_OSS_NAMES = (
    llama.NAMES
    + """
stack.blocks.*.feed_forward.router.proj       model.layers.*.mlp.router
stack.blocks.*.feed_forward.gate_proj+up_proj model.layers.*.mlp.experts.gate_up_proj      [woven]
stack.blocks.*.feed_forward.gate_bias+up_bias model.layers.*.mlp.experts.gate_up_proj_bias [woven]
stack.blocks.*.feed_forward.down_proj         model.layers.*.mlp.experts.down_proj         [turned]
stack.blocks.*.feed_forward.down_bias         model.layers.*.mlp.experts.down_proj_bias
"""
)
NO_PLAIN_LAYER = {"d_ff": lambda hf: None}

MIXTRAL = Family(
    choices=architectures.LLAMA,
    fields=llama.MISTRAL_FIELDS
    | NO_PLAIN_LAYER
    | {
        "rope_theta": rope_theta(1e6),
        "window": lambda hf: window(HFConfig({"sliding_window": None} | hf)),
        "experts": experts(
            {
                "d_ff": "intermediate_size",
                "n_experts": "num_local_experts",
                "top_k": "num_experts_per_tok",
            }
        ),
    },
    only=llama.ONLY,
    names=MIXTRAL_NAMES,
)
QWEN3_MOE = Family(
    choices=architectures.QWEN3,
    fields=llama.QWEN_FIELDS
    | NO_PLAIN_LAYER
    | {
        "experts": experts(
            {
                "d_ff": "moe_intermediate_size",
                "n_experts": lambda hf: hf.get("num_local_experts") or hf["num_experts"],
                "top_k": "num_experts_per_tok",
                "normalise": "norm_topk_prob",
            }
        )
    },
    only=llama.QWEN_ONLY | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    names=llama.NAMES + EXPERT_NAMES,
)
GPT_OSS = Family(
    choices=architectures.GPT_OSS,
    fields=llama.FIELDS
    | NO_PLAIN_LAYER
    | {
        "rope_theta": rope_theta(150_000.0),
        "attention_bias": ("attention_bias", True),
        "activation": lambda hf: "swiglu_clamped",
        "window": window,
        "global_every": global_every(2),
        "experts": experts(
            {
                "d_ff": "intermediate_size",
                "n_experts": "num_local_experts",
                "top_k": "num_experts_per_tok",
            },
            router_bias=True,
        ),
    },
    only={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    names=GPT_OSS_NAMES,
)
