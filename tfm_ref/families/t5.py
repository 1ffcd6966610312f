"""Encoder-decoders with relative positions: T5, T5 1.1 and Switch."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tfm_ref import architectures
from tfm_ref.families.family import Family, HFConfig
from tfm_ref.families.settings import TIED, activation, experts

STACK_NAMES = """
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
CROSS_NAMES = """
decoder.blocks.*.cross_attention_norm   decoder.block.*.layer.1.layer_norm
decoder.blocks.*.cross_attention.q_proj decoder.block.*.layer.1.EncDecAttention.q
decoder.blocks.*.cross_attention.k_proj decoder.block.*.layer.1.EncDecAttention.k
decoder.blocks.*.cross_attention.v_proj decoder.block.*.layer.1.EncDecAttention.v
decoder.blocks.*.cross_attention.o_proj decoder.block.*.layer.1.EncDecAttention.o
"""
T5_NAMES = (
    """
embedding.tokens shared
head.proj        lm_head
"""
    + STACK_NAMES
    + STACK_NAMES.replace("encoder.", "decoder.").replace("layer.1.", "layer.2.")
    + CROSS_NAMES
)
T5_GATED_NAMES = (
    T5_NAMES.replace("DenseReluDense.wi.", "DenseReluDense.wi_1.")
    + """
encoder.blocks.*.feed_forward.gate_proj encoder.block.*.layer.1.DenseReluDense.wi_0
decoder.blocks.*.feed_forward.gate_proj decoder.block.*.layer.2.DenseReluDense.wi_0
"""
)
SWITCH_STACK_NAMES = """
encoder.blocks.*.feed_forward.router.proj encoder.block.*.layer.1.mlp.router.classifier
encoder.blocks.*.feed_forward.up_proj     encoder.block.*.layer.1.mlp.experts.expert_#.wi.weight
encoder.blocks.*.feed_forward.down_proj   encoder.block.*.layer.1.mlp.experts.expert_#.wo.weight
"""
SWITCH_NAMES = (
    T5_NAMES.replace("DenseReluDense", "mlp")
    + SWITCH_STACK_NAMES
    + SWITCH_STACK_NAMES.replace("encoder.", "decoder.").replace("layer.1.", "layer.2.")
)


def decoder_layers(hf: HFConfig) -> int:
    """Read the number of layers that write: as many as read, if it is not said."""
    return hf.get("num_decoder_layers") or hf["num_layers"]


def gated_activation(hf: HFConfig) -> str:
    """Read the activation of T5; what it calls gated-gelu is the approximation by tanh."""
    kind = hf["feed_forward_proj"].removeprefix("gated-")
    gelu = {"gelu": "gelu_new"} if hf["feed_forward_proj"].startswith("gated-") else {}
    return activation("feed_forward_proj")(HFConfig(feed_forward_proj=gelu.get(kind, kind)))


def switch_step(hf: HFConfig) -> int:
    """Read every how many-th layer of Switch is a mixture, which must be so in both stacks."""
    steps = [
        layers // hf[mixtures] if hf[mixtures] else 0
        for layers, mixtures in (
            (hf["num_layers"], "num_sparse_encoder_layers"),
            (decoder_layers(hf), "num_sparse_decoder_layers"),
        )
    ]
    if not steps[0] == steps[1] >= 1:
        raise ValueError(f"every n-th layer must be a mixture, in both stacks; got n = {steps}")
    return steps[0]


def untied(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """See two matrices in T5 1.1, which version 5 of transformers calls tied all the same."""
    table, matrix = tensors.get("shared.weight"), tensors.get("lm_head.weight")
    both = table is not None and matrix is not None
    return {"tied_embeddings": False} if both and not torch.equal(table, matrix) else {}


FIELDS = TIED | {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "n_encoder_layers": "num_layers",
    "n_layers": decoder_layers,
    "n_heads": "num_heads",
    "head_dim": "d_kv",
    "d_ff": "d_ff",
    "t5_buckets": "relative_attention_num_buckets",
    "t5_max_distance": ("relative_attention_max_distance", 128),
    "norm_eps": "layer_norm_epsilon",
}
ONLY = {"is_encoder_decoder": True, "is_decoder": False}
IGNORED = r"decoder\..*EncDecAttention\.relative_attention_bias\.weight"

T5 = Family(
    choices=architectures.T5,
    fields=FIELDS
    | {
        "activation": gated_activation,
        "gated": lambda hf: hf["feed_forward_proj"].startswith("gated-"),
        "scale_logits": lambda hf: hf.get(
            "scale_decoder_outputs", hf.get("tie_word_embeddings", True)
        ),
    },
    only=ONLY,
    names=T5_NAMES,
    prefix="",
    ignored=IGNORED,
    gated_names=T5_GATED_NAMES,
    told_by_tensors=untied,
)
SWITCH = Family(
    choices=architectures.T5,
    fields=FIELDS
    | {
        "d_ff": lambda hf: hf["d_ff"] if switch_step(hf) > 1 else None,
        "activation": activation("dense_act_fn", "relu"),
        "scale_logits": ("tie_word_embeddings", True),
        "experts": experts(
            {
                "d_ff": "d_ff",
                "n_experts": "num_experts",
                "n_dense_layers": lambda hf: min(switch_step(hf) - 1, 1),
                "every": switch_step,
                "router_bias": ("router_bias", False),
                "noise": ("router_jitter_noise", 0.01),
                "capacity": "expert_capacity",
            },
            top_k=1,
            normalise=False,
        ),
    },
    only=ONLY | {"router_dtype": "float32"},
    names=SWITCH_NAMES,
    prefix="",
    ignored=IGNORED,
    told_by_tensors=untied,
)
