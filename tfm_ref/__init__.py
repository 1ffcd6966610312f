"""tfm_ref, the package of The Tested Transformer: attention, readable and tested.

The page book/api.md has the modules in the order in which the chapters need them.
"""

from tfm_ref.attention import SelfAttention, attention_weights, scaled_dot_product_attention
from tfm_ref.balance import (
    Balance,
    BiasController,
    balance_of,
    gshard_loss,
    importance_loss,
    pooled_loss,
    routings,
    sequence_loss,
    switch_loss,
    z_loss,
)
from tfm_ref.batches import Batch, TokenBatches, padding_share
from tfm_ref.beams import Hypotheses, beam_search
from tfm_ref.bpe import bpe_merges, train_bpe
from tfm_ref.cache import KVCache, RollingCache, StackCache
from tfm_ref.checkpoints import (
    average_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from tfm_ref.claims import attempt, check, refute
from tfm_ref.config import Experts, Latent, TransformerConfig
from tfm_ref.convert import config_from_hf, from_hf, load_safetensors, to_hf
from tfm_ref.data import (
    Pair,
    Split,
    Vocabulary,
    corpus,
    english_japanese,
    in_japanese_script,
    letters,
    missing_multi30k,
    multi30k,
    read_pairs,
    unseen_pattern,
)
from tfm_ref.decode_triton import decode_attention
from tfm_ref.expert_parallel import (
    ExpertParallel,
    bytes_sent,
    expert_shares,
    whole_state_dict,
)
from tfm_ref.flash import PartialSoftmax, merge, online_softmax, tiled_attention
from tfm_ref.flash_triton import triton_attention
from tfm_ref.fused import fused_attention
from tfm_ref.generation import Writer, greedy, sample
from tfm_ref.latent import LatentAttention
from tfm_ref.layers import Block, FeedForward, RMSNorm
from tfm_ref.losses import label_smoothed_cross_entropy
from tfm_ref.maps import attention_maps
from tfm_ref.masks import (
    causal_mask,
    chunked_mask,
    padding_mask,
    prefix_mask,
    sliding_window_mask,
)
from tfm_ref.models import DecoderLM, Encoder, EncoderDecoder, build
from tfm_ref.moe import MoELayer
from tfm_ref.multi_head import MultiHeadAttention
from tfm_ref.position_biases import ALiBi, T5Bias, alibi_slopes
from tfm_ref.position_embeddings import LearnedPositions, SinusoidalPositions, sinusoidal_encoding
from tfm_ref.positions import PositionScheme, QueryScaling
from tfm_ref.progress import progress
from tfm_ref.rotary import (
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RotaryPositions,
    YaRNScaling,
)
from tfm_ref.routing import ExpertChoiceRouter, Router, Routing
from tfm_ref.sampling import sampling_probs, top_k_filter, top_p_filter
from tfm_ref.schedules import noam_lr
from tfm_ref.sizes import count_parameters, kv_cache_bytes
from tfm_ref.stack import Stack
from tfm_ref.tokenizer import BPETokenizer
from tfm_ref.training import fit, set_seed
from tfm_ref.uptraining import pool_kv_heads
from tfm_ref.zoo import MODELS, full_size

__version__ = "0.1.0"
__all__ = [
    "MODELS",
    "ALiBi",
    "BPETokenizer",
    "Balance",
    "Batch",
    "BiasController",
    "Block",
    "DecoderLM",
    "Encoder",
    "EncoderDecoder",
    "ExpertChoiceRouter",
    "ExpertParallel",
    "Experts",
    "FeedForward",
    "Hypotheses",
    "KVCache",
    "Latent",
    "LatentAttention",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "MoELayer",
    "MultiHeadAttention",
    "NTKScaling",
    "Pair",
    "PartialSoftmax",
    "PositionScheme",
    "QueryScaling",
    "RMSNorm",
    "RollingCache",
    "RotaryPositions",
    "Router",
    "Routing",
    "SelfAttention",
    "SinusoidalPositions",
    "Split",
    "Stack",
    "StackCache",
    "T5Bias",
    "TokenBatches",
    "TransformerConfig",
    "Vocabulary",
    "Writer",
    "YaRNScaling",
    "alibi_slopes",
    "attempt",
    "attention_maps",
    "attention_weights",
    "average_checkpoints",
    "balance_of",
    "beam_search",
    "bpe_merges",
    "build",
    "bytes_sent",
    "causal_mask",
    "check",
    "chunked_mask",
    "config_from_hf",
    "corpus",
    "count_parameters",
    "decode_attention",
    "english_japanese",
    "expert_shares",
    "fit",
    "from_hf",
    "full_size",
    "fused_attention",
    "greedy",
    "gshard_loss",
    "importance_loss",
    "in_japanese_script",
    "kv_cache_bytes",
    "label_smoothed_cross_entropy",
    "latest_checkpoint",
    "letters",
    "load_checkpoint",
    "load_safetensors",
    "load_weights",
    "merge",
    "missing_multi30k",
    "multi30k",
    "noam_lr",
    "online_softmax",
    "padding_mask",
    "padding_share",
    "pool_kv_heads",
    "pooled_loss",
    "prefix_mask",
    "progress",
    "read_pairs",
    "refute",
    "routings",
    "sample",
    "sampling_probs",
    "save_checkpoint",
    "scaled_dot_product_attention",
    "sequence_loss",
    "set_seed",
    "sinusoidal_encoding",
    "sliding_window_mask",
    "switch_loss",
    "tiled_attention",
    "to_hf",
    "top_k_filter",
    "top_p_filter",
    "train_bpe",
    "triton_attention",
    "unseen_pattern",
    "whole_state_dict",
    "z_loss",
]
