"""Several attentions side by side: one class for MHA, GQA and MQA, for self and cross."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfm_ref.attention_layer import AttentionLayer
from tfm_ref.backends import check_backend
from tfm_ref.validation import check_dropout, check_size, check_softcap


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
