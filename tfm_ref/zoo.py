"""Public models by name: each a point in the space of choices, with its source and its counts."""

import math
from typing import NamedTuple

import torch

from tfm_ref.config import Experts, Latent, TransformerConfig
from tfm_ref.models import DecoderLM, Encoder, EncoderDecoder, build
from tfm_ref.moe import MoELayer
from tfm_ref.rotary import LinearScaling, Llama3Scaling, YaRNScaling
from tfm_ref.validation import check_choice, check_size

# What the models of a family have in common, beyond what the paper of 2017 does.
GPT2 = {
    "positions": "learned",
    "scale_embeddings": False,
    "norm_placement": "pre",
    "attention_bias": True,
    "activation": "gelu_tanh",
}
BERT = {
    "is_causal": False,
    "positions": "learned",
    "scale_embeddings": False,
    "embedding_norm": True,
    "head_transform": True,
    "head_bias": True,
    "attention_bias": True,
    "activation": "gelu",
}
T5 = {
    "positions": "t5",
    "scale_embeddings": False,
    "scale_logits": True,
    "norm": "rms_norm",
    "norm_eps": 1e-6,
    "norm_placement": "pre",
    "attention_scale": 1.0,
    "feed_forward_bias": False,
}
T5_V1_1 = T5 | {
    "tied_embeddings": False,
    "scale_logits": False,
    "activation": "gelu_tanh",
    "gated": True,
}
BART = {
    "positions": "learned",
    "first_position": 2,
    "scale_embeddings": False,
    "embedding_norm": True,
    "attention_bias": True,
    "activation": "gelu",
}
MARIAN = {
    "sinusoid_halves": True,
    "head_bias": True,
    "attention_bias": True,
    "activation": "silu",
}
BLOOM = {
    "positions": "alibi",
    "scale_embeddings": False,
    "embedding_norm": True,
    "norm_placement": "pre",
    "attention_bias": True,
    "activation": "gelu_tanh",
}
MPT = {
    "positions": "alibi",
    "scale_embeddings": False,
    "norm": "layer_norm_no_bias",
    "norm_placement": "pre",
    "activation": "gelu",
    "feed_forward_bias": False,
}
FALCON = {
    "positions": "rope",
    "scale_embeddings": False,
    "norm_placement": "pre",
    "parallel": True,
    "n_kv_heads": 1,
    "activation": "gelu",
    "feed_forward_bias": False,
}
LLAMA = {
    "positions": "rope",
    "scale_embeddings": False,
    "tied_embeddings": False,
    "norm": "rms_norm",
    "norm_placement": "pre",
    "activation": "silu",
    "gated": True,
    "feed_forward_bias": False,
}
PALM = LLAMA | {
    "norm": "layer_norm_no_bias",
    "parallel": True,
    "n_kv_heads": 1,
    "tied_embeddings": True,
    "scale_logits": True,
}
QWEN2 = LLAMA | {"norm_eps": 1e-6, "attention_bias": "qkv"}
QWEN3 = LLAMA | {"norm_eps": 1e-6, "qk_norm": True}
GEMMA = LLAMA | {
    "scale_embeddings": True,
    "tied_embeddings": True,
    "norm_eps": 1e-6,
    "norm_placement": "both",
    "activation": "gelu_tanh",
}
GEMMA2 = GEMMA | {
    "logit_softcap": 30.0,
    "attention_softcap": 50.0,
    "window": 4096,
    "global_every": 2,
}
GEMMA3 = GEMMA | {
    "qk_norm": True,
    "rope_theta": 1e6,
    "local_rope_theta": 10_000.0,
    "global_every": 6,
}
GPT_OSS = LLAMA | {
    "attention_bias": True,
    "sinks": True,
    "window": 128,
    "global_every": 2,
    "activation": "swiglu_clamped",
    "feed_forward_bias": True,
}
DEEPSEEK = LLAMA | {"norm_eps": 1e-6, "rope_interleaved": True}


class Model(NamedTuple):
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


LITGPT = "Lightning-AI/litgpt litgpt/config.py @26857050, which cites each config.json"
GPT2_CARD = (
    "openai/gpt-2 model_card.md @9b63575 and src/model.py; karpathy/nanoGPT model.py @3adf61e"
)
BERT_PY = "google-research/bert README.md, modeling.py @eedf571"
BERT_GELU = "modeling.py approximates GELU by tanh, as here; the public library is exact."
ROBERTA_SEGMENT = "With the one segment vector that the public checkpoint carries along."
T5_GIN = "google-research/text-to-text-transfer-transformer t5/models/gin @e081111, README.md"
GEMMA_PY = "google/gemma_pytorch gemma/config.py @014acb7"
DEEPSEEK_JSON = "deepseek-ai/DeepSeek-V3 inference/configs @9b4e978"


def _gpt2(stated: str, d_model: int, n_layers: int, n_heads: int) -> Model:
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_ff": 4 * d_model}
    return Model(
        TransformerConfig(**GPT2, **sizes, vocab_size=50257, max_seq_len=1024), stated, GPT2_CARD
    )


def _bert(d_model: int, n_layers: int, n_heads: int, **own: object) -> TransformerConfig:
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_ff": 4 * d_model}
    return TransformerConfig(**BERT | sizes | own, max_seq_len=512)


def _t5(stated: str, d_model: int, n_layers: int, n_heads: int, head_dim: int, d_ff: int) -> Model:
    sizes = {"d_model": d_model, "n_heads": n_heads, "head_dim": head_dim, "d_ff": d_ff}
    layers = {"n_layers": n_layers, "n_encoder_layers": n_layers}
    return Model(TransformerConfig(**T5, **sizes, **layers, vocab_size=32128), stated, T5_GIN)


_BERT = {
    "vocab_size": 30522,
    "n_segments": 2,
    "pooler": True,
    "norm_eps": 1e-12,
    "activation": "gelu_tanh",
}
_ROBERTA = {"vocab_size": 50265, "n_segments": 1, "first_position": 2}
_GEMMA2 = GEMMA2 | {"vocab_size": 256000, "max_seq_len": 8192}
_GEMMA3 = GEMMA3 | {"vocab_size": 262144, "max_seq_len": 131072, "window": 1024}
_YARN = YaRNScaling(factor=40.0, original_length=4096, temperature=1.0)
_DEEPSEEK = DEEPSEEK | {
    "n_heads": 128,
    "head_dim": 128,
    "max_seq_len": 163840,
    "rope_scaling": _YARN,
    "attention_scale": (0.1 * math.log(_YARN.factor) + 1) ** 2 / math.sqrt(128 + 64),
    "latent": Latent(kv_lora_rank=512, q_lora_rank=1536, rope_head_dim=64, v_head_dim=128),
}

MODELS = {
    "Transformer-base": Model(
        TransformerConfig(
            vocab_size=37000, d_model=512, n_layers=6, n_encoder_layers=6, n_heads=8, d_ff=2048
        ),
        "65M",
        "arXiv 1706.03762v5, Table 3 and sections 3 and 5.1",
    ),
    "Transformer-big": Model(
        TransformerConfig(
            vocab_size=37000, d_model=1024, n_layers=6, n_encoder_layers=6, n_heads=16, d_ff=4096
        ),
        "213M",
        "arXiv 1706.03762v5, Table 3 and sections 3 and 5.1",
    ),
    "GPT-2 small": _gpt2("124M", 768, 12, 12),
    "GPT-2 medium": _gpt2("355M", 1024, 24, 16),
    "GPT-2 large": _gpt2("774M", 1280, 36, 20),
    "GPT-2 XL": _gpt2("1.5B", 1600, 48, 25),
    "GPT-3 175B": Model(
        TransformerConfig(
            **GPT2,
            vocab_size=50257,
            d_model=12288,
            n_layers=96,
            n_heads=96,
            d_ff=49152,
            max_seq_len=2048,
        ),
        "175B",
        "arXiv 2005.14165, Table 2.1; openai/gpt-3 model-card.md",
        note="Its layers alternate between dense and banded attention, of a width not stated; "
        "neither is counted by parameters. The vocabulary is taken to be that of GPT-2.",
    ),
    "BERT-base": Model(
        _bert(768, 12, 12, **_BERT),
        "110M",
        BERT_PY,
        note=BERT_GELU,
    ),
    "BERT-large": Model(
        _bert(1024, 24, 16, **_BERT),
        "340M",
        BERT_PY,
        note=BERT_GELU,
    ),
    "RoBERTa-base": Model(
        _bert(768, 12, 12, **_ROBERTA),
        "125M",
        "facebookresearch/fairseq fairseq/models/roberta/model.py, examples/roberta/README.md",
        note=ROBERTA_SEGMENT,
    ),
    "RoBERTa-large": Model(
        _bert(1024, 24, 16, **_ROBERTA),
        "355M",
        "facebookresearch/fairseq fairseq/models/roberta/model.py, examples/roberta/README.md",
        note=ROBERTA_SEGMENT,
    ),
    "T5-small": _t5("60M", 512, 6, 8, 64, 2048),
    "T5-base": _t5("220M", 768, 12, 12, 64, 3072),
    "T5-large": _t5("770M", 1024, 24, 16, 64, 4096),
    "T5-3B": _t5("3B", 1024, 24, 32, 128, 16384),
    "T5-11B": _t5("11B", 1024, 24, 128, 128, 65536),
    "BART-large": Model(
        TransformerConfig(
            **BART,
            vocab_size=50265,
            d_model=1024,
            n_layers=12,
            n_encoder_layers=12,
            n_heads=16,
            d_ff=4096,
            max_seq_len=1024,
        ),
        "400M",
        "facebookresearch/fairseq fairseq/models/bart/model.py @3d262bb, examples/bart/README.md",
    ),
    "BLOOM-176B": Model(
        TransformerConfig(
            **BLOOM,
            vocab_size=250880,
            d_model=14336,
            n_layers=70,
            n_heads=112,
            d_ff=57344,
            max_seq_len=2048,
        ),
        "176,247,271,424",
        "bigscience-workshop/bigscience train/tr11-176B-ml/README.md @9e64ede; "
        "huggingface.co/bigscience/bloom, commit ae814bf",
    ),
    "MPT-7B": Model(
        TransformerConfig(
            **MPT,
            vocab_size=50432,
            d_model=4096,
            n_layers=32,
            n_heads=32,
            d_ff=16384,
            max_seq_len=2048,
        ),
        "7B",
        "config.json as copied in huggingface.co/ybelkada/mpt-7b-bf16-sharded",
        note="mpt-7b.yaml of llm-foundry @8c8dd48 has another vocabulary and does not set ALiBi.",
    ),
    "PaLM-540B": Model(
        TransformerConfig(
            **PALM,
            vocab_size=256000,
            d_model=18432,
            n_layers=118,
            n_heads=48,
            head_dim=256,
            d_ff=73728,
            max_seq_len=2048,
        ),
        "540.35B",
        "arXiv 2204.02311, Table 1, section 2, and section 5 for the scale of the logits",
    ),
    "Llama-1-7B": Model(
        TransformerConfig(
            **LLAMA,
            vocab_size=32000,
            d_model=4096,
            n_layers=32,
            n_heads=32,
            d_ff=11008,
            max_seq_len=2048,
            norm_eps=1e-6,
        ),
        "7B",
        "facebookresearch/llama MODEL_CARD.md @1076b9c",
    ),
    "Llama-2-7B": Model(
        TransformerConfig(
            **LLAMA,
            vocab_size=32000,
            d_model=4096,
            n_layers=32,
            n_heads=32,
            d_ff=11008,
            max_seq_len=4096,
        ),
        "7B",
        f"{LITGPT}; meta-llama/llama-models models/llama2/MODEL_CARD.md @a9c89c4",
        note="sku_list.py of llama-models gave it 8 key-value heads and another base: its model "
        "card contradicts that.",
    ),
    "Llama-2-13B": Model(
        TransformerConfig(
            **LLAMA,
            vocab_size=32000,
            d_model=5120,
            n_layers=40,
            n_heads=40,
            d_ff=13824,
            max_seq_len=4096,
        ),
        "13B",
        f"{LITGPT}; meta-llama/llama-models models/llama2/MODEL_CARD.md @a9c89c4",
    ),
    "Llama-2-70B": Model(
        TransformerConfig(
            **LLAMA,
            vocab_size=32000,
            d_model=8192,
            n_layers=80,
            n_heads=64,
            n_kv_heads=8,
            d_ff=28672,
            max_seq_len=4096,
        ),
        "70B",
        f"{LITGPT}; meta-llama/llama-models models/llama2/MODEL_CARD.md @a9c89c4",
    ),
    "Llama-3-8B": Model(
        TransformerConfig(
            **LLAMA,
            vocab_size=128256,
            d_model=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            d_ff=14336,
            max_seq_len=8192,
            rope_theta=500_000.0,
        ),
        "8B",
        f"{LITGPT}; meta-llama/llama-models models/llama3/MODEL_CARD.md",
    ),
    "Llama-3-70B": Model(
        TransformerConfig(
            **LLAMA,
            vocab_size=128256,
            d_model=8192,
            n_layers=80,
            n_heads=64,
            n_kv_heads=8,
            d_ff=28672,
            max_seq_len=8192,
            rope_theta=500_000.0,
        ),
        "70B",
        f"{LITGPT}; meta-llama/llama-models models/llama3/MODEL_CARD.md",
    ),
    "Llama-3.1-405B": Model(
        TransformerConfig(
            **LLAMA,
            vocab_size=128256,
            d_model=16384,
            n_layers=126,
            n_heads=128,
            n_kv_heads=8,
            d_ff=53248,
            max_seq_len=131072,
            rope_theta=500_000.0,
            rope_scaling=Llama3Scaling(),
        ),
        "405B",
        f"{LITGPT}; meta-llama/llama-models models/llama3/model.py",
    ),
    "Mistral-7B-v0.1": Model(
        TransformerConfig(
            **LLAMA,
            vocab_size=32000,
            d_model=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            d_ff=14336,
            max_seq_len=32768,
            window=4096,
        ),
        "7B",
        LITGPT,
    ),
    "Qwen2.5-7B": Model(
        TransformerConfig(
            **QWEN2,
            vocab_size=152064,
            d_model=3584,
            n_layers=28,
            n_heads=28,
            n_kv_heads=4,
            d_ff=18944,
            max_seq_len=131072,
            rope_theta=1e6,
        ),
        "7.61B",
        f"{LITGPT}; model card of Qwen2.5-7B",
    ),
    "Qwen3-8B": Model(
        TransformerConfig(
            **QWEN3,
            vocab_size=151936,
            d_model=4096,
            n_layers=36,
            n_heads=32,
            n_kv_heads=8,
            head_dim=128,
            d_ff=12288,
            max_seq_len=40960,
            rope_theta=1e6,
        ),
        "8.2B",
        f"{LITGPT}; Qwen3 Technical Report, Table 1; model card of Qwen3-8B",
    ),
    "DeepSeek-LLM-67B": Model(
        TransformerConfig(
            **LLAMA,
            vocab_size=102400,
            d_model=8192,
            n_layers=95,
            n_heads=64,
            n_kv_heads=8,
            d_ff=22016,
            max_seq_len=4096,
            norm_eps=1e-6,
        ),
        "67B",
        "config.json as copied in huggingface.co/Vivacem/DeepSeek-67B-MMIQC; "
        "deepseek-ai/DeepSeek-LLM README.md",
    ),
    "Gemma-2-2B": Model(
        TransformerConfig(
            **_GEMMA2, d_model=2304, n_layers=26, n_heads=8, n_kv_heads=4, head_dim=256, d_ff=9216
        ),
        "2.6B",
        GEMMA_PY,
    ),
    "Gemma-2-9B": Model(
        TransformerConfig(
            **_GEMMA2, d_model=3584, n_layers=42, n_heads=16, n_kv_heads=8, head_dim=256, d_ff=14336
        ),
        "9B",
        GEMMA_PY,
    ),
    "Gemma-2-27B": Model(
        TransformerConfig(
            **_GEMMA2,
            d_model=4608,
            n_layers=46,
            n_heads=32,
            n_kv_heads=16,
            head_dim=128,
            d_ff=36864,
            attention_scale=144**-0.5,
        ),
        "27B",
        GEMMA_PY,
    ),
    "Gemma-3-1B": Model(
        TransformerConfig(
            **_GEMMA3 | {"max_seq_len": 32768, "window": 512},
            d_model=1152,
            n_layers=26,
            n_heads=4,
            n_kv_heads=1,
            head_dim=256,
            d_ff=6912,
        ),
        "1B",
        GEMMA_PY,
    ),
    "Gemma-3-12B": Model(
        TransformerConfig(
            **_GEMMA3,
            d_model=3840,
            n_layers=48,
            n_heads=16,
            n_kv_heads=8,
            head_dim=256,
            d_ff=15360,
            rope_scaling=LinearScaling(factor=8.0),
        ),
        "12B",
        GEMMA_PY,
        note="Without its vision encoder.",
    ),
    "Gemma-3-27B": Model(
        TransformerConfig(
            **_GEMMA3,
            d_model=5376,
            n_layers=62,
            n_heads=32,
            n_kv_heads=16,
            head_dim=128,
            d_ff=21504,
            attention_scale=168**-0.5,
            rope_scaling=LinearScaling(factor=8.0),
        ),
        "27B",
        GEMMA_PY,
        note="Without its vision encoder.",
    ),
    "Mixtral-8x7B": Model(
        TransformerConfig(
            **LLAMA,
            vocab_size=32000,
            d_model=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            max_seq_len=32768,
            rope_theta=1e6,
            experts=Experts(d_ff=14336, n_experts=8, top_k=2),
        ),
        "47B",
        f"{LITGPT}; arXiv 2401.04088",
        stated_active="13B",
    ),
    "Mixtral-8x22B": Model(
        TransformerConfig(
            **LLAMA,
            vocab_size=32000,
            d_model=6144,
            n_layers=56,
            n_heads=48,
            n_kv_heads=8,
            max_seq_len=65536,
            rope_theta=1e6,
            experts=Experts(d_ff=16384, n_experts=8, top_k=2),
        ),
        "141B",
        "huggingface.co/mistral-community/Mixtral-8x22B-v0.1 config.json; "
        "DeepSeek-V2 report, Table 2",
        stated_active="39B",
    ),
    "Qwen3-235B-A22B": Model(
        TransformerConfig(
            **QWEN3,
            vocab_size=151936,
            d_model=4096,
            n_layers=94,
            n_heads=64,
            n_kv_heads=4,
            head_dim=128,
            max_seq_len=40960,
            rope_theta=1e6,
            experts=Experts(d_ff=1536, n_experts=128, top_k=8),
        ),
        "235B",
        f"{LITGPT}; Qwen3 Technical Report, Table 2",
        stated_active="22B",
    ),
    "Llama-4-Scout": Model(
        TransformerConfig(
            **LLAMA,
            vocab_size=202048,
            d_model=5120,
            n_layers=48,
            n_heads=40,
            n_kv_heads=8,
            max_seq_len=10485760,
            rope_theta=500_000.0,
            rope_interleaved=True,
            rope_scaling=Llama3Scaling(factor=16.0, high_freq_factor=1.0),
            window=8192,
            chunked=True,
            global_every=4,
            global_positions=False,
            experts=Experts(
                d_ff=8192,
                n_experts=16,
                top_k=1,
                n_shared=1,
                score="sigmoid",
                normalise=False,
                scale_input=True,
            ),
        ),
        "109B",
        "meta-pytorch/torchtune torchtune/models/llama4/_model_builders.py @bd2a0fc; "
        "meta-llama/llama-models models/llama4/MODEL_CARD.md @a9c89c4",
        stated_active="17B",
        note="Without its vision encoder. Built to be counted: that its layers with RoPE normalise "
        "queries and keys, and the others scale late queries, takes no parameter and is left out.",
    ),
    "gpt-oss-120b": Model(
        TransformerConfig(
            **GPT_OSS,
            vocab_size=201088,
            d_model=2880,
            n_layers=36,
            n_heads=64,
            n_kv_heads=8,
            head_dim=64,
            max_seq_len=131072,
            rope_theta=150_000.0,
            rope_scaling=YaRNScaling(factor=32.0, original_length=4096, truncate=False),
            experts=Experts(d_ff=2880, n_experts=128, top_k=4, router_bias=True),
        ),
        "117B",
        "openai/gpt-oss gpt_oss/torch/model.py @7b58334, README.md",
        stated_active="5.1B",
    ),
    "DeepSeek-V2": Model(
        TransformerConfig(
            **_DEEPSEEK,
            vocab_size=102400,
            d_model=5120,
            n_layers=60,
            d_ff=12288,
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
        ),
        "236B",
        f"{DEEPSEEK_JSON}; DeepSeek-V2 report, section 3.1.2",
        stated_active="21B",
    ),
    "DeepSeek-V3": Model(
        TransformerConfig(
            **_DEEPSEEK,
            vocab_size=129280,
            d_model=7168,
            n_layers=61,
            d_ff=18432,
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
        ),
        "671B",
        f"{DEEPSEEK_JSON}; DeepSeek-V3 report, section 4.2",
        stated_active="37B",
        note="Without its module that predicts a second token.",
    ),
}
"""The models by name, oldest family first."""


def full_size(name: str) -> Encoder | DecoderLM | EncoderDecoder:
    """Build a model with its full sizes and without memory: on the meta device.

    Args:
        name: a name in :data:`MODELS`.

    Raises:
        ValueError: if there is no such model.

    Example:
        >>> count_parameters(full_size("Mixtral-8x22B")).total
        140620634112
    """
    check_choice("name", name, MODELS)
    with torch.device("meta"):
        return build(MODELS[name].config)


class ParameterCount(NamedTuple):
    """Numbers of parameters; one that serves in two places counts once.

    Args:
        total: all.
        active: those that one token uses: of the experts, only the chosen.
        embedding: those of the table that is looked up at the entrance.
        head: those of the matrix that makes the logits; 0 if it is that table.
    """

    total: int
    active: int
    embedding: int
    head: int

    @property
    def without_embeddings(self) -> int:
        """Leave out the table, and the matrix of the logits."""
        return self.total - self.embedding - self.head

    @property
    def active_without_lookup(self) -> int:
        """Leave out of the active ones a table that is only looked up, never multiplied."""
        return self.active - (self.embedding if self.head else 0)


def count_parameters(model: Encoder | DecoderLM | EncoderDecoder) -> ParameterCount:
    """Count the parameters of a model that was built.

    Args:
        model: the model, on any device, the meta device too.

    Returns:
        The counts.

    Example:
        >>> count = count_parameters(full_size("Llama-2-7B"))
        >>> count.total, count.without_embeddings
        (6738415616, 6476271616)
    """
    total = sum(p.numel() for p in model.parameters())
    mixtures = [module for module in model.modules() if isinstance(module, MoELayer)]
    idle = sum(
        sum(p.numel() for p in mixture.parameters()) - mixture.active_parameters
        for mixture in mixtures
    )
    table, matrix = model.embedding.tokens.weight, model.head.proj.weight
    return ParameterCount(
        total, total - idle, table.numel(), 0 if matrix is table else matrix.numel()
    )


def kv_cache_bytes(
    model: DecoderLM | EncoderDecoder,
    length: int = 1,
    *,
    source_length: int = 0,
    bytes_per_number: int = 2,
) -> int:
    """Say how many bytes the keys and values of one sequence take, in all layers.

    Args:
        model: the model, on any device, the meta device too.
        length: tokens of the sequence; layers with a window remember no more than that.
        source_length: tokens of the source that a cross-attention looks at.
        bytes_per_number: 2 for bfloat16.

    Returns:
        Bytes for one sequence; with length 1, bytes per token.

    Raises:
        ValueError: if a length is negative or bytes_per_number is not an integer of at least 1.

    Example:
        >>> kv_cache_bytes(full_size("Llama-3-8B")) // 1024
        128
    """
    check_size("length", length, least=0)
    check_size("source_length", source_length, least=0)
    check_size("bytes_per_number", bytes_per_number)
    stack = getattr(model, "decoder", None) or model.stack
    config, numbers = stack.config, 0
    for layer, block in enumerate(stack.blocks):
        seen = min(length, config.window) if config.is_local(layer) else length
        numbers += seen * block.attention.cache_width
        if block.cross_attention is not None:
            numbers += source_length * block.cross_attention.cache_width
    return numbers * bytes_per_number
