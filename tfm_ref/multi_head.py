"""Several attentions side by side: one class for MHA, GQA and MQA, for self and cross."""

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tfm_ref.attention import attention_weights, scaled_dot_product_attention
from tfm_ref.attention_checks import (
    check_bias,
    check_mask,
    check_qkv,
    check_query_scale,
    check_sinks,
)
from tfm_ref.cache import KVCache
from tfm_ref.flash import tiled_attention
from tfm_ref.flash_triton import triton_attention
from tfm_ref.masks import causal_mask
from tfm_ref.validation import check_choice, check_dropout, check_size, check_softcap, check_tokens


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
    if not (mask is None and bias is None and sinks is None):
        scores = q.new_empty(()).expand(b, h, n, m)  # no memory: what checks look at
        if bias is not None:
            check_bias(bias, scores)
        if mask is not None:
            check_mask(mask, scores)
        if sinks is not None:
            check_sinks(sinks, scores)
            bias = torch.zeros_like(scores) if bias is None else bias
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
        column = sinks[:, None, None].expand(*scores.shape[:3], 1)
        added = torch.cat([added.expand(scores.shape), column], -1)
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


BACKENDS = {
    "naive": scaled_dot_product_attention,
    "tiled": tiled_attention,
    "sdpa": fused_attention,
    "triton": triton_attention,
}
"""The ways to compute one and the same attention, by name."""

LACKS = {"tiled": {"dropout"}, "sdpa": {"softcap"}, "triton": {"dropout", "softcap"}}
"""What a way to compute cannot do."""


def check_backend(backend: str, *, dropout: float = 0.0, softcap: float | None = None) -> None:
    """Refuse a way to compute that is unknown, or that lacks what the layer asks for.

    Args:
        backend: its name.
        dropout: probability with which a weight is set to 0.
        softcap: what bounds the scores, if anything.

    Raises:
        ValueError: if there is no such backend, or if dropout is above 0 or softcap given and it
            has none.

    Example:
        >>> check_backend("sdpa", softcap=50.0)
        Traceback (most recent call last):
        ValueError: softcap (50.0) needs backend "naive" or "tiled"; got "sdpa"
    """
    check_choice("backend", backend, BACKENDS)
    asked = {"dropout": dropout or None, "softcap": softcap}
    for what in sorted(LACKS.get(backend, ())):
        if asked[what] is not None:
            able = " or ".join(f'"{name}"' for name in BACKENDS if what not in LACKS.get(name, ()))
            raise ValueError(f'{what} ({asked[what]}) needs backend {able}; got "{backend}"')


class AttentionLayer(nn.Module):
    """Attend from tokens to tokens: what every layer does, however it makes queries, keys, values.

    A layer makes queries in ``_queries``, what it keeps of a token in ``_kept``, and of these what
    attention takes in ``_terms``; what attention gives, ``_output`` turns into each head's values.
    And it has ``o_proj``, ``scale``, ``dropout`` and ``backend``.
    """

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b m d"] | None = None,
        *,
        mask: Bool[Tensor, "#b #h #n #m"] | None = None,
        is_causal: bool = False,
        bias: Float[Tensor, "#b #h #n #m"] | None = None,
        rotation: Callable[[Tensor], Tensor] | None = None,
        query_scale: Float[Tensor, "#b n"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Mix into each token of x what its heads find in the context.

        Args:
            x: tokens that ask.
            context: tokens that answer, for cross-attention; x if not given.
            mask: True = may attend; each axis of size 1 or full. See :mod:`tfm_ref.masks`.
            is_causal: let a token see no later one; aligned at the bottom right. Joined with
                ``mask`` by AND.
            bias: finite numbers added to the scaled scores; each axis of size 1 or full.
            rotation: turns queries and keys by their positions, as
                :meth:`tfm_ref.positions.PositionScheme.rotation` makes it for those of the
                context; the tokens of x are the last of them.
            query_scale: multiplies each query, and with it all its scores, before softcap and
                bias; as :class:`tfm_ref.positions.QueryScaling` makes it.
            cache: remembers the tokens of x, so that later ones find them: keys are all that it
                gives. In cross-attention it remembers the context of the first call, which is
                that of all.

        Returns:
            The mixed tokens, shaped like x.

        Raises:
            ValueError: if x or context has not the shape (batch, length, d_model), is empty, or
                has not the device or (autocast apart) the dtype of the layer, if their batches
                differ, if mask, bias, rotation or query_scale does not fit, or if the cache has
                no room, holds another batch or another length of context, or meets gradients.

        Example:
            >>> x, context = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
            >>> MultiHeadAttention(d_model=8, n_heads=2)(x, context).shape
            torch.Size([2, 3, 8])
        """
        q, k, v = self._project(x, context, rotation, query_scale, cache)
        terms = {"mask": mask, "is_causal": is_causal, "bias": bias, **self._form()}
        dropout = self.dropout if self.training else 0.0
        y = BACKENDS[self.backend](q, k, v, **terms, dropout=dropout)
        y = self._output(y, k.shape[2])
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def attention_weights(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b m d"] | None = None,
        *,
        mask: Bool[Tensor, "#b #h #n #m"] | None = None,
        is_causal: bool = False,
        bias: Float[Tensor, "#b #h #n #m"] | None = None,
        rotation: Callable[[Tensor], Tensor] | None = None,
        query_scale: Float[Tensor, "#b n"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b h n m"]:
        """Show the weights that :meth:`forward` uses, before dropout; its arguments are the same.

        A cache is left as it was.

        Returns:
            Weights of shape (batch, n_heads, len_q, len_k), as
            :func:`tfm_ref.attention.attention_weights` gives.

        Raises:
            ValueError: as :meth:`forward`.
        """
        q, k, _ = self._project(x, context, rotation, query_scale, deepcopy(cache))
        return attention_weights(q, k, mask=mask, is_causal=is_causal, bias=bias, **self._form())

    def _form(self) -> dict[str, object]:
        """Give what of the equation is fixed for the layer."""
        return {"scale": self.scale}

    def _project(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b m d"] | None,
        rotation: Callable[[Tensor], Tensor] | None,
        query_scale: Float[Tensor, "#b n"] | None,
        cache: KVCache | None,
    ) -> tuple[Float[Tensor, "b h n k"], Float[Tensor, "b g m k"], Float[Tensor, "b g m v"]]:
        """Make queries, keys and values, and give each head its own; remember the new tokens."""
        check_tokens("x", x, self.o_proj.weight, axis=0)
        q = self._queries(x, rotation)
        if query_scale is not None:
            check_query_scale(query_scale, q)
            q = (q * query_scale[:, None, :, None]).to(q.dtype)
        if cache is not None and context is not None and cache.length:
            kept = cache.tensors
            if (len(kept[0]), cache.length) != context.shape[:2]:
                raise ValueError(
                    f"the cache holds a context of batch {len(kept[0])} and length "
                    f"{cache.length}; got one of shape {tuple(context.shape)}"
                )
        else:
            if context is not None:
                check_tokens("context", context, self.o_proj.weight, axis=0)
            kept = self._kept(x if context is None else context, rotation)
            kept = kept if cache is None else cache.append(*kept)
        return self._terms(q, *kept)

    def _queries(
        self, x: Float[Tensor, "b n d"], rotation: Callable[[Tensor], Tensor] | None
    ) -> Float[Tensor, "b h n k"]:
        """Make the queries of each head."""
        raise NotImplementedError

    def _kept(
        self, context: Float[Tensor, "b m d"], rotation: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, ...]:
        """Make what has to be kept of each token, as tensors of shape (batch, ..., m, width)."""
        raise NotImplementedError

    def _terms(
        self, q: Tensor, *kept: Tensor
    ) -> tuple[Float[Tensor, "b h n k"], Float[Tensor, "b g m k"], Float[Tensor, "b g m v"]]:
        """Make keys and values of what was kept: they are it, if a layer says nothing else."""
        return q, *kept

    def _output(self, y: Float[Tensor, "b h n v"], len_k: int) -> Float[Tensor, "b h n v"]:
        """Make each head's values of what attention gave: they are it, if nothing else is said."""
        return y


def _split_heads(t: Float[Tensor, "b n d"], n_heads: int) -> Float[Tensor, "b h n k"]:
    """Give each head its numbers; einops would do the same, but decoding has no time for it."""
    return t.view(*t.shape[:2], n_heads, -1).transpose(1, 2)


class MultiHeadAttention(AttentionLayer):
    """Let every token gather information from the tokens of a context, by several heads at once.

    ``head_i = Attention(x W_Q[i], c W_K[i], c W_V[i])``,
    ``output = [head_1, ..., head_h] W_O``, where the context c is x itself in self-attention.

    Args:
        d_model: width of the tokens.
        n_heads: number of query heads.
        n_kv_heads: number of key and value heads, each shared by n_heads / n_kv_heads query
            heads; n_heads (MHA) if not given. 1 is MQA, anything between is GQA.
        head_dim: width of one query and one key; d_model / n_heads if not given.
        v_head_dim: width of one value; head_dim if not given.
        bias: add a bias to all four projections, or to those named, such as "qkv".
        qk_norm: makes a norm when called with head_dim, one for the queries and one for the keys
            of all heads; they are not normalised if not given.
        scale: factor of the dot products; 1/√head_dim if not given.
        softcap: bends the scaled scores into (-softcap, softcap); not with "sdpa" or
            "triton".
        sinks: learn one score per head that takes its share of each softmax and gives nothing.
        dropout: probability with which a weight is set to 0 in training; not with "tiled" or
            "triton".
        backend: how to compute, "sdpa" (PyTorch's fused kernels), "tiled" (FlashAttention in plain
            PyTorch), "naive" (as it is written in the equation) or "triton" (our kernels for the
            GPU, which take no mask, bias, sinks or v_head_dim); the result is the same. "sdpa" if
            not given, but with softcap "naive".

    Raises:
        ValueError: if a size is not an integer of at least 1, n_heads is no multiple of
            n_kv_heads, head_dim is not given and n_heads does not divide d_model, dropout does
            not lie in 0 ≤ dropout < 1, softcap is not above 0, the backend is unknown or lacks
            softcap or dropout where asked for, or bias is unknown.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2; Shazeer 2019, "Fast
        Transformer Decoding: One Write-Head is All You Need" (MQA); Ainslie et al. 2023, "GQA:
        Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints". Heads
        i·r to i·r + r - 1 share key head i, as in the public models. Henry et al. 2020,
        "Query-Key Normalization for Transformers"; norms with a gain, as in Qwen3, before the
        rotation, or without one, as in Llama 4, whose norm stands after it: that is the same.
        Softcap and sinks: see :func:`tfm_ref.attention.attention_weights`.

    Example:
        >>> attention = MultiHeadAttention(d_model=512, n_heads=8)
        >>> attention(torch.randn(2, 50, 512)).shape
        torch.Size([2, 50, 512])
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        bias: bool | str = False,
        qk_norm: Callable[[int], nn.Module] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_size("d_model", d_model)
        check_size("n_heads", n_heads)
        if head_dim is None and d_model % n_heads:
            raise ValueError(
                f"d_model ({d_model}) must be divisible by n_heads ({n_heads}), "
                "or head_dim be given"
            )
        self.d_model, self.n_heads = d_model, n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.head_dim = d_model // n_heads if head_dim is None else head_dim
        self.v_head_dim = self.head_dim if v_head_dim is None else v_head_dim
        for name in "n_kv_heads", "head_dim", "v_head_dim":
            check_size(name, getattr(self, name))
        if n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads ({n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})"
            )
        biased = {True: "qkvo", False: ""}[bias] if isinstance(bias, bool) else bias
        if not isinstance(biased, str) or not set(biased) <= set("qkvo"):
            raise ValueError(f'bias must be True, False or letters of "qkvo"; got {bias!r}')
        check_dropout(dropout)
        if backend is None:
            backend = "sdpa" if softcap is None else "naive"
        if softcap is not None:
            check_softcap(softcap)
        check_backend(backend, dropout=dropout, softcap=softcap)
        self.scale, self.softcap = scale, softcap
        self.dropout, self.backend = dropout, backend

        width, kv_width = n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, width, bias="q" in biased)
        self.k_proj = nn.Linear(d_model, kv_width, bias="k" in biased)
        self.v_proj = nn.Linear(d_model, self.n_kv_heads * self.v_head_dim, bias="v" in biased)
        self.o_proj = nn.Linear(n_heads * self.v_head_dim, d_model, bias="o" in biased)
        self.q_norm = None if qk_norm is None else qk_norm(self.head_dim)
        self.k_norm = None if qk_norm is None else qk_norm(self.head_dim)
        self.sinks = nn.Parameter(torch.zeros(n_heads)) if sinks else None

    @property
    def cache_width(self) -> int:
        """Count the numbers that a cache keeps of each token: its keys and its values."""
        return self.n_kv_heads * (self.head_dim + self.v_head_dim)

    def _form(self) -> dict[str, object]:
        return {**super()._form(), "softcap": self.softcap, "sinks": self.sinks}

    def _queries(
        self, x: Float[Tensor, "b n d"], rotation: Callable[[Tensor], Tensor] | None
    ) -> Float[Tensor, "b h n k"]:
        q = _split_heads(self.q_proj(x), self.n_heads)
        q = q if self.q_norm is None else self.q_norm(q)
        return q if rotation is None else rotation(q)

    def _kept(
        self, context: Float[Tensor, "b m d"], rotation: Callable[[Tensor], Tensor] | None
    ) -> tuple[Float[Tensor, "b g m k"], Float[Tensor, "b g m v"]]:
        k = _split_heads(self.k_proj(context), self.n_kv_heads)
        v = _split_heads(self.v_proj(context), self.n_kv_heads)
        k = k if self.k_norm is None else self.k_norm(k)
        return (k if rotation is None else rotation(k)), v

    def extra_repr(self) -> str:
        """Name what the shapes of the projections do not show."""
        return f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}, backend={self.backend!r}"
