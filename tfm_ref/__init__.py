"""tfm_ref, the package of The Tested Transformer: attention, readable and tested."""

from tfm_ref.attention import SelfAttention, attention_weights, scaled_dot_product_attention
from tfm_ref.claims import attempt, check, refute
from tfm_ref.masks import causal_mask, padding_mask, prefix_mask, sliding_window_mask
from tfm_ref.multi_head import MultiHeadAttention, fused_attention

__version__ = "0.1.0"
__all__ = [
    "MultiHeadAttention",
    "SelfAttention",
    "attempt",
    "attention_weights",
    "causal_mask",
    "check",
    "fused_attention",
    "padding_mask",
    "prefix_mask",
    "refute",
    "scaled_dot_product_attention",
    "sliding_window_mask",
]
