"""Public models by name: each a point in the space of choices, with its source and its counts."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from tfm_ref.architectures import (
    BART,
    BERT,
    BLOOM,
    DEEPSEEK,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT_OSS,
    LLAMA,
    LLAMA3,
    LLAMA4,
    MIXTRAL,
    MPT,
    PALM,
    QWEN2,
    QWEN3,
    T5,
)
from tfm_ref.config import Experts, Latent, TransformerConfig
from tfm_ref.models import Model, build
from tfm_ref.positions import QueryScaling
from tfm_ref.rotary import LinearScaling, Llama3Scaling, YaRNScaling
from tfm_ref.validation import check_choice


class PublicModel(NamedTuple):
    """A public model: its config, what its makers say of its size, and where that is written.

    Args:
        config: its choices.
        stated: number of parameters, as its makers write it.
        source: where config and number are written; ``@`` names a commit.
        stated_active: number of parameters that one token uses, as its makers write it.
        note: what a reader should know before comparing.
    """

    config: TransformerConfig
    stated: str
    source: str
    stated_active: str | None = None
    note: str = ""


PAPER_2017 = "arXiv 1706.03762v5, Table 3 and sections 3 and 5.1"
LITGPT = "Lightning-AI/litgpt litgpt/config.py @26857050, which cites each config.json"
GPT2_CARD = (
    "openai/gpt-2 model_card.md @9b63575 and src/model.py; karpathy/nanoGPT model.py @3adf61e"
)
LLAMA2_CARD = f"{LITGPT}; meta-llama/llama-models models/llama2/MODEL_CARD.md @a9c89c4"
LLAMA3_CARD = f"{LITGPT}; meta-llama/llama-models models/llama3/MODEL_CARD.md"
ROBERTA_PY = "facebookresearch/fairseq fairseq/models/roberta/model.py, examples/roberta/README.md"
BERT_PY = "google-research/bert README.md, modeling.py @eedf571"
BERT_GELU = "modeling.py approximates GELU by tanh, as here; the public library is exact."
ROBERTA_SEGMENT = "With the one segment vector that the public checkpoint carries along."
T5_GIN = "google-research/text-to-text-transfer-transformer t5/models/gin @e081111, README.md"
GEMMA_PY = "google/gemma_pytorch gemma/config.py @014acb7"
DEEPSEEK_JSON = "deepseek-ai/DeepSeek-V3 inference/configs @9b4e978"


def _model(
    stated: str,
    source: str,
    choices: Mapping[str, object],
    sizes: tuple[int | None, ...],
    *,
    active: str | None = None,
    note: str = "",
    **own: object,
) -> PublicModel:
    """Write an entry: the choices of a family, six sizes, and what the model has of its own."""
    names = "n_layers", "d_model", "n_heads", "d_ff", "vocab_size", "max_seq_len"
    settings = dict(choices) | dict(zip(names, sizes, strict=True)) | own
    return PublicModel(TransformerConfig(**settings), stated, source, active, note)


_BERT = {"n_segments": 2, "pooler": True, "norm_eps": 1e-12, "activation": "gelu_tanh"}
_ROBERTA = {"n_segments": 1, "first_position": 2}
_YARN = YaRNScaling(factor=40.0, original_length=4096, temperature=1.0)
_DEEPSEEK = {
    "head_dim": 128,
    "rope_scaling": _YARN,
    "attention_scale": (0.1 * math.log(_YARN.factor) + 1) ** 2 / math.sqrt(128 + 64),
    "latent": Latent(kv_lora_rank=512, q_lora_rank=1536, rope_head_dim=64, v_head_dim=128),
}

MODELS = {  # sizes: layers, d_model, heads, d_ff, vocabulary, longest sequence
    "Transformer-base": _model(
        "65M", PAPER_2017, {}, (6, 512, 8, 2048, 37000, None), n_encoder_layers=6
    ),
    "Transformer-big": _model(
        "213M", PAPER_2017, {}, (6, 1024, 16, 4096, 37000, None), n_encoder_layers=6
    ),
    "GPT-2 small": _model("124M", GPT2_CARD, GPT2, (12, 768, 12, 3072, 50257, 1024)),
    "GPT-2 medium": _model("355M", GPT2_CARD, GPT2, (24, 1024, 16, 4096, 50257, 1024)),
    "GPT-2 large": _model("774M", GPT2_CARD, GPT2, (36, 1280, 20, 5120, 50257, 1024)),
    "GPT-2 XL": _model("1.5B", GPT2_CARD, GPT2, (48, 1600, 25, 6400, 50257, 1024)),
    "GPT-3 175B": _model(
        "175B",
        "arXiv 2005.14165, Table 2.1; openai/gpt-3 model-card.md",
        GPT2,
        (96, 12288, 96, 49152, 50257, 2048),
        note="Its layers alternate between dense and banded attention, of a width not stated; "
        "neither is counted by parameters. The vocabulary is taken to be that of GPT-2.",
    ),
    "BERT-base": _model(
        "110M", BERT_PY, BERT | _BERT, (12, 768, 12, 3072, 30522, 512), note=BERT_GELU
    ),
    "BERT-large": _model(
        "340M", BERT_PY, BERT | _BERT, (24, 1024, 16, 4096, 30522, 512), note=BERT_GELU
    ),
    "RoBERTa-base": _model(
        "125M", ROBERTA_PY, BERT | _ROBERTA, (12, 768, 12, 3072, 50265, 512), note=ROBERTA_SEGMENT
    ),
    "RoBERTa-large": _model(
        "355M", ROBERTA_PY, BERT | _ROBERTA, (24, 1024, 16, 4096, 50265, 512), note=ROBERTA_SEGMENT
    ),
    "T5-small": _model(
        "60M", T5_GIN, T5, (6, 512, 8, 2048, 32128, None), n_encoder_layers=6, head_dim=64
    ),
    "T5-base": _model(
        "220M", T5_GIN, T5, (12, 768, 12, 3072, 32128, None), n_encoder_layers=12, head_dim=64
    ),
    "T5-large": _model(
        "770M", T5_GIN, T5, (24, 1024, 16, 4096, 32128, None), n_encoder_layers=24, head_dim=64
    ),
    "T5-3B": _model(
        "3B", T5_GIN, T5, (24, 1024, 32, 16384, 32128, None), n_encoder_layers=24, head_dim=128
    ),
    "T5-11B": _model(
        "11B", T5_GIN, T5, (24, 1024, 128, 65536, 32128, None), n_encoder_layers=24, head_dim=128
    ),
    "BART-large": _model(
        "400M",
        "facebookresearch/fairseq fairseq/models/bart/model.py @3d262bb, examples/bart/README.md",
        BART,
        (12, 1024, 16, 4096, 50265, 1024),
        n_encoder_layers=12,
    ),
    "BLOOM-176B": _model(
        "176,247,271,424",
        "bigscience-workshop/bigscience train/tr11-176B-ml/README.md @9e64ede; "
        "huggingface.co/bigscience/bloom, commit ae814bf",
        BLOOM,
        (70, 14336, 112, 57344, 250880, 2048),
    ),
    "MPT-7B": _model(
        "7B",
        "config.json as copied in huggingface.co/ybelkada/mpt-7b-bf16-sharded",
        MPT,
        (32, 4096, 32, 16384, 50432, 2048),
        note="mpt-7b.yaml of llm-foundry @8c8dd48 has another vocabulary and does not set ALiBi.",
    ),
    "PaLM-540B": _model(
        "540.35B",
        "arXiv 2204.02311, Table 1, section 2, and section 5 for the scale of the logits",
        PALM,
        (118, 18432, 48, 73728, 256000, 2048),
        head_dim=256,
    ),
    "Llama-1-7B": _model(
        "7B",
        "facebookresearch/llama MODEL_CARD.md @1076b9c",
        LLAMA,
        (32, 4096, 32, 11008, 32000, 2048),
        norm_eps=1e-6,
    ),
    "Llama-2-7B": _model(
        "7B",
        LLAMA2_CARD,
        LLAMA,
        (32, 4096, 32, 11008, 32000, 4096),
        note="sku_list.py of llama-models gave it 8 key-value heads and another base: its "
        "model card contradicts that.",
    ),
    "Llama-2-13B": _model("13B", LLAMA2_CARD, LLAMA, (40, 5120, 40, 13824, 32000, 4096)),
    "Llama-2-70B": _model(
        "70B", LLAMA2_CARD, LLAMA, (80, 8192, 64, 28672, 32000, 4096), n_kv_heads=8
    ),
    "Llama-3-8B": _model("8B", LLAMA3_CARD, LLAMA3, (32, 4096, 32, 14336, 128256, 8192)),
    "Llama-3-70B": _model("70B", LLAMA3_CARD, LLAMA3, (80, 8192, 64, 28672, 128256, 8192)),
    "Llama-3.1-405B": _model(
        "405B",
        f"{LITGPT}; meta-llama/llama-models models/llama3/model.py",
        LLAMA3,
        (126, 16384, 128, 53248, 128256, 131072),
        rope_scaling=Llama3Scaling(),
    ),
    "Mistral-7B-v0.1": _model(
        "7B", LITGPT, LLAMA, (32, 4096, 32, 14336, 32000, 32768), n_kv_heads=8, window=4096
    ),
    "Qwen2.5-7B": _model(
        "7.61B",
        f"{LITGPT}; model card of Qwen2.5-7B",
        QWEN2,
        (28, 3584, 28, 18944, 152064, 131072),
        rope_theta=1_000_000.0,
        n_kv_heads=4,
    ),
    "Qwen3-8B": _model(
        "8.2B",
        f"{LITGPT}; Qwen3 Technical Report, Table 1; model card of Qwen3-8B",
        QWEN3,
        (36, 4096, 32, 12288, 151936, 40960),
        n_kv_heads=8,
    ),
    "DeepSeek-LLM-67B": _model(
        "67B",
        "config.json as copied in huggingface.co/Vivacem/DeepSeek-67B-MMIQC; "
        "deepseek-ai/DeepSeek-LLM README.md",
        LLAMA,
        (95, 8192, 64, 22016, 102400, 4096),
        norm_eps=1e-6,
        n_kv_heads=8,
    ),
    "Gemma-2-2B": _model(
        "2.6B", GEMMA_PY, GEMMA2, (26, 2304, 8, 9216, 256000, 8192), n_kv_heads=4, head_dim=256
    ),
    "Gemma-2-9B": _model(
        "9B", GEMMA_PY, GEMMA2, (42, 3584, 16, 14336, 256000, 8192), n_kv_heads=8, head_dim=256
    ),
    "Gemma-2-27B": _model(
        "27B",
        GEMMA_PY,
        GEMMA2,
        (46, 4608, 32, 36864, 256000, 8192),
        n_kv_heads=16,
        head_dim=128,
        attention_scale=144**-0.5,
    ),
    "Gemma-3-1B": _model(
        "1B",
        GEMMA_PY,
        GEMMA3,
        (26, 1152, 4, 6912, 262144, 32768),
        n_kv_heads=1,
        head_dim=256,
        window=512,
    ),
    "Gemma-3-12B": _model(
        "12B",
        GEMMA_PY,
        GEMMA3,
        (48, 3840, 16, 15360, 262144, 131072),
        rope_scaling=LinearScaling(factor=8.0),
        n_kv_heads=8,
        head_dim=256,
        window=1024,
        note="Without its vision encoder.",
    ),
    "Gemma-3-27B": _model(
        "27B",
        GEMMA_PY,
        GEMMA3,
        (62, 5376, 32, 21504, 262144, 131072),
        rope_scaling=LinearScaling(factor=8.0),
        n_kv_heads=16,
        head_dim=128,
        attention_scale=168**-0.5,
        window=1024,
        note="Without its vision encoder.",
    ),
    "Mixtral-8x7B": _model(
        "47B",
        f"{LITGPT}; arXiv 2401.04088",
        MIXTRAL,
        (32, 4096, 32, None, 32000, 32768),
        experts=Experts(d_ff=14336, n_experts=8, top_k=2),
        active="13B",
    ),
    "Mixtral-8x22B": _model(
        "141B",
        "huggingface.co/mistral-community/Mixtral-8x22B-v0.1 config.json; DeepSeek-V2 "
        "report, Table 2",
        MIXTRAL,
        (56, 6144, 48, None, 32000, 65536),
        experts=Experts(d_ff=16384, n_experts=8, top_k=2),
        active="39B",
    ),
    "Qwen3-235B-A22B": _model(
        "235B",
        f"{LITGPT}; Qwen3 Technical Report, Table 2",
        QWEN3,
        (94, 4096, 64, None, 151936, 40960),
        n_kv_heads=4,
        experts=Experts(d_ff=1536, n_experts=128, top_k=8),
        active="22B",
    ),
    "Llama-4-Scout": _model(
        "109B",
        "meta-pytorch/torchtune torchtune/models/llama4/_model_builders.py @bd2a0fc; "
        "meta-llama/llama-models models/llama4/MODEL_CARD.md @a9c89c4",
        LLAMA4,
        (48, 5120, 40, None, 202048, 10485760),
        rope_theta=500_000.0,
        rope_scaling=Llama3Scaling(factor=16.0, high_freq_factor=1.0),
        n_kv_heads=8,
        qk_norm="rms_norm_no_gain",
        query_scaling=QueryScaling(),
        window=8192,
        global_every=4,
        global_qk_norm=False,
        experts=Experts(
            d_ff=8192,
            n_experts=16,
            top_k=1,
            n_shared=1,
            score="sigmoid",
            normalise=False,
            scale_input=True,
        ),
        active="17B",
        note="Without its vision encoder. query_scaling is for inference, and in the makers' code "
        "off unless one asks for it.",
    ),
    "gpt-oss-120b": _model(
        "117B",
        "openai/gpt-oss gpt_oss/torch/model.py @7b58334, README.md",
        GPT_OSS,
        (36, 2880, 64, None, 201088, 131072),
        rope_theta=150_000.0,
        rope_scaling=YaRNScaling(factor=32.0, original_length=4096, truncate=False),
        n_kv_heads=8,
        head_dim=64,
        experts=Experts(d_ff=2880, n_experts=128, top_k=4, router_bias=True),
        active="5.1B",
    ),
    "DeepSeek-V2": _model(
        "236B",
        f"{DEEPSEEK_JSON}; DeepSeek-V2 report, section 3.1.2",
        DEEPSEEK | _DEEPSEEK,
        (60, 5120, 128, 12288, 102400, 163840),
        experts=Experts(
            d_ff=1536,
            n_experts=160,
            top_k=6,
            n_shared=2,
            n_dense_layers=1,
            normalise=False,
            n_groups=8,
            top_k_groups=3,
            scale=16.0,
        ),
        active="21B",
    ),
    "DeepSeek-V3": _model(
        "671B",
        f"{DEEPSEEK_JSON}; DeepSeek-V3 report, section 4.2",
        DEEPSEEK | _DEEPSEEK,
        (61, 7168, 128, 18432, 129280, 163840),
        experts=Experts(
            d_ff=2048,
            n_experts=256,
            top_k=8,
            n_shared=1,
            n_dense_layers=3,
            score="sigmoid",
            choice_bias=True,
            n_groups=8,
            top_k_groups=4,
            top_k_in_group=2,
            scale=2.5,
        ),
        active="37B",
        note="Without its module that predicts a second token.",
    ),
}
"""The models by name, oldest family first."""


def full_size(name: str) -> Model:
    """Build a model with its full sizes and without memory: on the meta device.

    Args:
        name: a name in :data:`MODELS`.

    Raises:
        ValueError: if there is no such model.

    Example:
        >>> full_size("Mixtral-8x22B").head.proj.weight.shape
        torch.Size([32000, 6144])
    """
    check_choice("name", name, MODELS)
    with torch.device("meta"):
        return build(MODELS[name].config)
