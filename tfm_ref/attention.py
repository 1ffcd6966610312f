"""Attention, written so that the code reads like the equation: softmax(QKᵀ/√d_k)V."""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tfm_ref.attention_checks import check_bias, check_mask, check_qkv, check_sinks
from tfm_ref.masks import causal_mask
from tfm_ref.validation import check_dropout, check_size, check_softcap, check_tokens


def attention_weights(
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b g m k"],
    *,
    mask: Bool[Tensor, "#b #h #n #m"] | None = None,
    is_causal: bool = False,
    bias: Float[Tensor, "#b #h #n #m"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h n m"]:
    """Say how much of each value every query takes.

    ``weights = softmax(scale * q kᵀ + bias)`` over the keys that the masks allow.

    Args:
        q: queries.
        k: keys; with fewer heads than q, each key head serves as many query heads as it takes.
        mask: True = may attend; each axis of size 1 or full. See :mod:`tfm_ref.masks`.
        is_causal: let a query see no later key; aligned at the bottom right, so that the last
            query sees the last key. Joined with ``mask`` by AND.
        bias: finite numbers added to the scaled scores; each axis of size 1 or full. What is
            forbidden goes through ``mask``: a row of -inf would give NaN.
        scale: factor of the dot products; 1/√head_dim if not given.
        softcap: bends the scaled scores into (-softcap, softcap), ``softcap tanh(s / softcap)``,
            before the bias is added.
        sinks: one score per head that takes its share of each softmax and gives nothing for it.

    Returns:
        Weights of shape (batch, heads, len_q, len_k). A row is at least 0 everywhere and sums
        to 1, with sinks to less; the row of a query that may attend to nothing is 0, not NaN.

    Raises:
        ValueError: if q or k has not four axes, an axis is empty, batch or width differ, the
            heads of q are no multiple of those of k, devices or (autocast apart) dtypes differ,
            the dtype is not floating, or mask or bias does not fit in dtype, axes or device, if
            softcap is not above 0, or if there is not one sink per head.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1, equation (1). The
        paper says nothing of queries with no key; there we give 0. Gemma Team 2024, "Gemma 2:
        Improving Open Language Models at a Practical Size", section 2 (softcap); ``sdpa`` in
        ``gpt_oss/torch/model.py`` of openai/gpt-oss (sinks).

    Example:
        The scores are 0 and 1, so the weights are 1/(1+e) and e/(1+e).

        >>> q, k = torch.tensor([[0.0, 2**0.5]]), torch.eye(2)
        >>> attention_weights(q[None, None], k[None, None])
        tensor([[[[0.2689, 0.7311]]]])
    """
    check_qkv(q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = einsum(q * scale, _share(k, q.shape[1]), "b h n k, b h m k -> b h n m")
    if softcap is not None:
        check_softcap(softcap)
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        check_bias(bias, scores)
        scores = scores + bias
    if mask is not None:
        check_mask(mask, scores)
    if is_causal:
        causal = causal_mask(*scores.shape[2:], device=q.device)
        mask = causal if mask is None else mask & causal
    if mask is None:
        return _normalise(scores, sinks)
    # A query without any allowed key would get softmax(-inf, ...) = NaN, and pass it back. Its
    # scores are set to 0 before the softmax and its weights to 0 after it.
    blind = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask, -torch.inf).masked_fill(blind, 0.0)
    return _normalise(scores, sinks).masked_fill(~mask, 0.0)


def _normalise(
    scores: Float[Tensor, "b h n m"], sinks: Float[Tensor, " h"] | None
) -> Float[Tensor, "b h n m"]:
    """Turn each row of scores into weights, after the sink has taken its share."""
    if sinks is None:
        return scores.softmax(-1)
    check_sinks(sinks, scores)
    column = sinks[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def scaled_dot_product_attention(
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
    """Give each query the average of the values, weighted by how well the keys match it.

    ``output = dropout(softmax(scale * q kᵀ + bias)) v``. The weights themselves, before dropout,
    come from :func:`attention_weights` with the same arguments.

    Args:
        q: as of :func:`attention_weights`; so is all that is not named here.
        v: values, finite also where masked, since 0 · NaN is NaN; their width v_head_dim may
            differ from head_dim.
        dropout: probability with which a weight is set to 0; the others are divided by
            1 - dropout. For training only: a function cannot know when that is.

    Returns:
        Output of shape (batch, heads, len_q, v_head_dim), 0 for a query that may attend to
        nothing.

    Raises:
        ValueError: as :func:`attention_weights`, if v does not fit k in batch, heads, length,
            dtype or device, or if dropout does not lie in 0 ≤ dropout < 1.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1, equation (1).

    Example:
        >>> q, k = torch.tensor([[0.0, 2**0.5]]), torch.eye(2)
        >>> v = torch.tensor([[10.0], [20.0]])
        >>> scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])
        tensor([[[[17.3106]]]])
    """
    check_qkv(q, k, v)
    check_dropout(dropout)
    terms = {"mask": mask, "is_causal": is_causal, "bias": bias, "scale": scale}
    weights = attention_weights(q, k, **terms, softcap=softcap, sinks=sinks)
    weights = F.dropout(weights, dropout)
    return einsum(weights, _share(v, q.shape[1]), "b h n m, b h m v -> b h n v")


def _share(t: Float[Tensor, "b g m k"], n_heads: int) -> Float[Tensor, "b h m k"]:
    """Give each query head its key or value head: one for every r in a row."""
    r = n_heads // t.shape[1]
    return t if r == 1 else repeat(t, "b g m k -> b (g r) m k", r=r)


class SelfAttention(nn.Module):
    """Let every token of a sequence gather information from every token: one head.

    ``Q = x W_Q, K = x W_K, V = x W_V, output = softmax(QKᵀ/√head_dim) V W_O``.

    Args:
        d_model: width of the tokens.
        head_dim: width of queries and keys; d_model if not given.
        v_head_dim: width of values; head_dim if not given.
        bias: add a bias to the four projections.

    Raises:
        ValueError: if a width is not an integer of at least 1.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", sections 3.2.1 and 3.2.3; with one
        head, section 3.2.2 is this class.

    Example:
        >>> attention = SelfAttention(d_model=512)
        >>> attention(torch.randn(32, 100, 512)).shape
        torch.Size([32, 100, 512])
    """

    def __init__(
        self,
        *,
        d_model: int,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        head_dim = d_model if head_dim is None else head_dim
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        for name, width in dict(d_model=d_model, head_dim=head_dim, v_head_dim=v_head_dim).items():
            check_size(name, width)
        self.d_model = d_model
        self.q_proj = nn.Linear(d_model, head_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, v_head_dim, bias=bias)
        self.o_proj = nn.Linear(v_head_dim, d_model, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        *,
        mask: Bool[Tensor, "#b 1 #n #n"] | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "b n d"]:
        """Mix the tokens.

        Args:
            x: tokens.
            mask: True = may attend; each axis of size 1 or full. See :mod:`tfm_ref.masks`.
            is_causal: let a token see no later one. Joined with ``mask`` by AND.

        Returns:
            The mixed tokens, shaped like x.

        Raises:
            ValueError: if x has not the shape (batch, length, d_model), is empty, has not the
                device or (autocast apart) the dtype of the layer, or the mask does not fit.

        Example:
            >>> x, layer = torch.randn(1, 3, 8), SelfAttention(d_model=8)
            >>> torch.equal(layer(x, is_causal=True)[:, :2], layer(x[:, :2], is_causal=True))
            True
        """
        q, k, v = self._project(x)
        y = scaled_dot_product_attention(q, k, v, mask=mask, is_causal=is_causal)
        return self.o_proj(rearrange(y, "b 1 n v -> b n v"))

    def attention_weights(
        self,
        x: Float[Tensor, "b n d"],
        *,
        mask: Bool[Tensor, "#b 1 #n #n"] | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "b 1 n n"]:
        """Show the weights that :meth:`forward` uses; its arguments are the same.

        Returns:
            Weights of shape (batch, 1, length, length), as :func:`attention_weights` gives.

        Raises:
            ValueError: as :meth:`forward`.
        """
        q, k, _ = self._project(x)
        return attention_weights(q, k, mask=mask, is_causal=is_causal)

    def _project(self, x: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Make queries, keys and values, each with a heads axis of size 1."""
        check_tokens("x", x, self.q_proj.weight)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return q[:, None], k[:, None], v[:, None]
