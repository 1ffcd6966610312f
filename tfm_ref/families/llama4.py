"""Llama 4: chunks between layers that know no positions, and a mixture in some layers."""

from tfm_ref import architectures
from tfm_ref.families import llama
from tfm_ref.families.family import Family, HFConfig, Reader
from tfm_ref.families.settings import (
    SCALINGS,
    experts,
    global_every,
    rope,
    rope_scaling,
    rope_theta,
    window,
)
from tfm_ref.positions import QueryScaling
from tfm_ref.rotary import RopeScaling
from tfm_ref.validation import check_choice

NAMES = (
    llama.NAMES.replace(".mlp.", ".feed_forward.")
    + """
stack.blocks.*.feed_forward.router.proj       model.layers.*.feed_forward.router
stack.blocks.*.feed_forward.gate_proj+up_proj model.layers.*.feed_forward.experts.gate_up_proj [turned halves]
stack.blocks.*.feed_forward.down_proj         model.layers.*.feed_forward.experts.down_proj    [turned]
stack.blocks.*.feed_forward.shared.gate_proj  model.layers.*.feed_forward.shared_expert.gate_proj
stack.blocks.*.feed_forward.shared.up_proj    model.layers.*.feed_forward.shared_expert.up_proj
stack.blocks.*.feed_forward.shared.down_proj  model.layers.*.feed_forward.shared_expert.down_proj
"""  # noqa: E501
)


def layer_types(hf: HFConfig) -> list[str]:
    """Say which layers of Llama 4 have chunks and positions: those listed, or three in four."""
    every = hf.get("no_rope_layer_interval", 4)
    usual = [(layer + 1) % every for layer in range(hf["num_hidden_layers"])]
    listed = hf.get("no_rope_layers") or usual
    return ["chunked_attention" if turned else "full_attention" for turned in listed]


def chunks(read: Reader) -> Reader:
    """Read the chunks of Llama 4 by a function that reads windows."""

    def read_chunks(hf: HFConfig) -> object:
        kinds = [kind.replace("chunked", "sliding") for kind in layer_types(hf)]
        return read(
            HFConfig(hf | {"layer_types": kinds, "sliding_window": hf["attention_chunk_size"]})
        )

    return read_chunks


def mixtures(hf: HFConfig) -> list[int]:
    """Say which layers have a mixture."""
    every = hf["interleave_moe_layer_step"]
    return [layer for layer in range(hf["num_hidden_layers"]) if (layer + 1) % every == 0]


def rope_scaling_before_norm(hf: HFConfig) -> RopeScaling | None:
    """Read how RoPE is stretched, where a norm follows it, which a temperature would not pass."""
    check_choice("rope_type", rope(hf).get("rope_type", "default"), SCALINGS.keys() - {"yarn"})
    return rope_scaling(hf)


def query_scaling(hf: HFConfig) -> QueryScaling | None:
    """Read by what late queries are multiplied."""
    if not hf["attn_temperature_tuning"]:
        return None
    return QueryScaling(length=hf["floor_scale"], strength=hf["attn_scale"])


LLAMA4 = Family(
    choices=architectures.LLAMA4,
    fields=llama.FIELDS
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
        "experts": experts(
            {
                "d_ff": "intermediate_size",
                "n_experts": "num_local_experts",
                "top_k": "num_experts_per_tok",
                "n_dense_layers": lambda hf: hf["interleave_moe_layer_step"] - 1,
                "every": "interleave_moe_layer_step",
            },
            n_shared=1,
            score="sigmoid",
            normalise=False,
            scale_input=True,
        ),
    },
    only={"layer_types": layer_types, "moe_layers": mixtures},
    names=NAMES,
)
