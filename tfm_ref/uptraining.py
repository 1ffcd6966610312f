"""Uptraining: models with fewer key and value heads, made of a trained one."""

from copy import deepcopy
from dataclasses import replace

from torch import nn

from tfm_ref.multi_head import MultiHeadAttention
from tfm_ref.validation import check_size


def pool_kv_heads(model: nn.Module, n_kv_heads: int) -> nn.Module:
    """Give attention fewer key and value heads: each the mean of those whose place it takes.

    ``W_K'[j] = mean(W_K[j s], ..., W_K[j s + s - 1])`` with s = heads / n_kv_heads, and so W_V and
    the biases. What is made so is near to the model, not equal, and trained further: uptraining.

    Args:
        model: a model, or any module with :class:`~tfm_ref.multi_head.MultiHeadAttention` in it.
        n_kv_heads: number of key and value heads of every attention.

    Returns:
        A changed copy.

    Raises:
        ValueError: if there is no such attention, or n_kv_heads is not an integer of at least 1
            that divides the number of key and value heads of each.

    Reference:
        Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from
        Multi-Head Checkpoints", section 2.1, whose uptraining takes 5 % of the steps of
        pre-training. In its section 2.2 the self-attention of an encoder stays as it is; here,
        none does. Norms of keys serve all heads, and stay.

    Example:
        >>> from tfm_ref import DecoderLM, TransformerConfig
        >>> config = TransformerConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=4, d_ff=16)
        >>> pool_kv_heads(DecoderLM(config), 2).config.n_kv_heads
        2
    """
    check_size("n_kv_heads", n_kv_heads)
    pooled = deepcopy(model)
    attentions = [m for m in pooled.modules() if isinstance(m, MultiHeadAttention)]
    for heads in {attention.n_kv_heads for attention in attentions} or {0}:
        if not heads or heads % n_kv_heads:
            raise ValueError(
                f"n_kv_heads ({n_kv_heads}) must divide the heads of keys and values of each "
                f"MultiHeadAttention; got {heads or 'none'}"
            )
    for attention in attentions:
        widths = {attention.k_proj: attention.head_dim, attention.v_proj: attention.v_head_dim}
        attention.n_kv_heads = n_kv_heads
        for projection, width in widths.items():
            for name, t in list(projection.named_parameters()):
                mean = t.detach().unflatten(0, (n_kv_heads, -1, width)).mean(1).flatten(0, 1)
                setattr(projection, name, nn.Parameter(mean, t.requires_grad))
            projection.out_features = len(projection.weight)
    for module in pooled.modules():
        if hasattr(module, "config"):
            module.config = replace(module.config, n_kv_heads=n_kv_heads)
    return pooled
