"""Attention by PyTorch's own kernels, made to agree with the equation where they do not."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tfm_ref.attention_checks import check_qkv, check_terms
from tfm_ref.masks import causal_mask
from tfm_ref.validation import check_dropout


def fused_attention(
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b g m k"],
    v: Float[Tensor, "b g m v"],
    *,
    mask: Bool[Tensor, "#b #h #n #m"] | None = None,
    is_causal: bool = False,
    bias: Float[Tensor, "#b #h #n #m"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b h n v"]:
    """Compute :func:`~tfm_ref.attention.scaled_dot_product_attention` with PyTorch's kernels.

    Arguments, returns and errors are the same, but that a softcap is refused: the kernels have
    none. PyTorch chooses the kernel; on the CPU the n × m weights are stored only with dropout,
    with values of another width than the keys, or if the bias or the sinks need a gradient.

    Kernels for the CPU, and those for wide heads, copy a key head for each query head of its
    group. Few queries, as in decoding, are therefore shown to it as the queries of one head:
    (b, g · r, n, k) → (b, g, r · n, k).

    Reference:
        ``torch.nn.functional.scaled_dot_product_attention``. Its ``is_causal`` aligns the first
        query with the first key; ours aligns the last with the last. A query that may attend to
        nothing gives NaN in some of its kernels; here it gives 0.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
        >>> from tfm_ref import scaled_dot_product_attention
        >>> expected = scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.allclose(fused_attention(q, k, v, is_causal=True), expected, atol=1e-6)
        True
    """
    check_qkv(q, k, v)
    check_dropout(dropout)
    if softcap is not None:
        raise ValueError(
            f'PyTorch\'s kernels have no softcap; got {softcap}. Use "naive" or "tiled".'
        )
    (b, h, n, width), (_, g, m, _) = q.shape, k.shape
    check_terms(q, k, mask=mask, bias=bias, sinks=sinks)
    if sinks is not None and bias is None:
        bias = q.new_zeros(()).expand(b, h, n, m)
    if n == 1:
        is_causal = False  # the last query sees every key
    if is_causal and not (mask is None and bias is None and n == m):
        causal = causal_mask(n, m, device=q.device)
        mask, is_causal = causal if mask is None else mask & causal, False
    added, blind = bias, None
    if mask is not None:
        # A query without any allowed key is shown all of them, and its output set to 0.
        blind = ~mask.any(-1, keepdim=True)
        allowed = mask | blind
        added = allowed if bias is None else bias.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        # One more key, of zeros and with the sink for its bias, and a value of zeros.
        column = sinks[:, None, None].expand(b, h, n, 1)
        added = torch.cat([added.expand(b, h, n, m), column], -1)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    r = h // g
    folds = r > 1 and r * n <= m and not is_causal and (q.device.type == "cpu" or width > 256)
    if folds:
        q = q.unflatten(1, (g, r)).flatten(2, 3)
        if added is not None and added.shape[1:3] != (1, 1):
            added = added.expand(-1, h, n, -1).unflatten(1, (g, r)).flatten(2, 3)
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=added,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[1] != g,
    )
    y = y.unflatten(2, (r, n)).flatten(1, 2) if folds else y
    return y if blind is None else y.masked_fill(blind, 0.0)
