"""tfm_ref, the package of The Tested Transformer: attention, readable and tested."""

from tfm_ref.attention import SelfAttention, attention_weights, scaled_dot_product_attention
from tfm_ref.claims import attempt, check, refute
from tfm_ref.data import corpus
from tfm_ref.latent import LatentAttention
from tfm_ref.layers import Block, FeedForward, RMSNorm
from tfm_ref.masks import causal_mask, padding_mask, prefix_mask, sliding_window_mask
from tfm_ref.moe import MoELayer, Router, Routing
from tfm_ref.multi_head import MultiHeadAttention, fused_attention
from tfm_ref.positions import (
    ALiBi,
    LearnedPositions,
    PositionScheme,
    SinusoidalPositions,
    T5Bias,
    alibi_slopes,
    sinusoidal_encoding,
)
from tfm_ref.progress import progress
from tfm_ref.rotary import (
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RotaryPositions,
    YaRNScaling,
)
from tfm_ref.tokenizer import BPETokenizer, bpe_merges, train_bpe

__version__ = "0.1.0"
__all__ = [
    "ALiBi",
    "BPETokenizer",
    "Block",
    "FeedForward",
    "LatentAttention",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "MoELayer",
    "MultiHeadAttention",
    "NTKScaling",
    "PositionScheme",
    "RMSNorm",
    "RotaryPositions",
    "Router",
    "Routing",
    "SelfAttention",
    "SinusoidalPositions",
    "T5Bias",
    "YaRNScaling",
    "alibi_slopes",
    "attempt",
    "attention_weights",
    "bpe_merges",
    "causal_mask",
    "check",
    "corpus",
    "fused_attention",
    "padding_mask",
    "prefix_mask",
    "progress",
    "refute",
    "scaled_dot_product_attention",
    "sinusoidal_encoding",
    "sliding_window_mask",
    "train_bpe",
]
