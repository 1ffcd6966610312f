"""What stands around attention: norms, feed-forwards, and the block that joins them."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tfm_ref.cache import KVCache
from tfm_ref.validation import (
    check_choice,
    check_dropout,
    check_same_kind,
    check_size,
    check_tokens,
)


def _clamped_swish(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Bound x from above by 7, then multiply it by its sigmoid, made 1.702 times as steep."""
    x = x.clamp(max=7)
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swiglu_clamped": _clamped_swish,
}
"""The functions between the projections of a feed-forward, by name."""


def activate(
    activation: str, up: Float[Tensor, "... f"], gate: Float[Tensor, "... f"] | None = None
) -> Float[Tensor, "... f"]:
    """Make what lies between the projections of a feed-forward.

    ``act(up)``, or gated: ``act(gate) * up``.

    Args:
        activation: a name in :data:`ACTIVATIONS`. With "swiglu_clamped" the gate multiplies
            ``up + 1``, where up is held between -7 and 7.
        up: what the projection W_up gives.
        gate: what the projection W_gate gives, where there is one.

    Returns:
        The numbers for W_down, shaped like up.

    Reference:
        Shazeer 2020, "GLU Variants Improve Transformer", equation (5). "swiglu_clamped":
        ``swiglu`` in ``gpt_oss/torch/model.py`` of openai/gpt-oss.

    Example:
        >>> activate("relu", torch.tensor([3.0, 3.0]), torch.tensor([2.0, -2.0]))
        tensor([6., 0.])
    """
    if gate is None:
        return ACTIVATIONS[activation](up)
    if activation == "swiglu_clamped":
        up = up.clamp(-7, 7) + 1
    return ACTIVATIONS[activation](gate) * up


class RMSNorm(nn.Module):
    """Divide each token by its root mean square: LayerNorm without centring and without bias.

    ``y = gain * x / √(mean(x²) + eps)``, the mean over the last axis.

    Args:
        d_model: width of the tokens.
        eps: what keeps a token of zeros from being divided by 0.
        gain: learn the gain; 1 for every number if not.

    Raises:
        ValueError: if d_model is not an integer of at least 1 or eps is negative.

    Reference:
        Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation (4), which has
        no eps. Computed in float32 at least; as in Llama, the result is cast back to the dtype
        of x first and multiplied by the gain after that. ``torch.nn.RMSNorm`` multiplies before
        it casts: in half precision the two differ by one rounding.

    Example:
        >>> RMSNorm(2, eps=0.0)(torch.tensor([1.0, 7.0]))  # 1² + 7² = 2 · 5²
        tensor([0.2000, 1.4000], grad_fn=<MulBackward0>)
    """

    def __init__(self, d_model: int, eps: float = 1e-6, *, gain: bool = True) -> None:
        super().__init__()
        check_size("d_model", d_model)
        if not eps >= 0:
            raise ValueError(f"eps must be at least 0; got {eps}")
        self.d_model, self.eps = d_model, eps
        self.weight = nn.Parameter(torch.ones(d_model)) if gain else None

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Give every token the root mean square of the gain.

        Args:
            x: tokens, with any axes before the last.

        Returns:
            The normalised tokens, shaped like x.

        Raises:
            ValueError: if the last axis of x is not d_model wide, or x has not the device or
                (autocast apart) the dtype of the gain.
        """
        if x.shape[-1:] != (self.d_model,):
            raise ValueError(
                f"the last axis of x must have size d_model = {self.d_model}; got {tuple(x.shape)}"
            )
        if self.weight is not None:
            check_same_kind("the layer", self.weight, "x", x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = wide.square().mean(-1, keepdim=True)
        y = (wide * torch.rsqrt(mean_square + self.eps)).to(x.dtype)
        return y if self.weight is None else self.weight * y

    def extra_repr(self) -> str:
        """Name the settings."""
        return f"{self.d_model}, eps={self.eps}" + (", gain=False" if self.weight is None else "")


class FeedForward(nn.Module):
    """Change each token by itself: two layers, the same for every position.

    ``y = act(x W_up) W_down``, or gated: ``y = (act(x W_gate) * (x W_up)) W_down``.

    Args:
        d_model: width of the tokens.
        d_ff: width between the projections.
        activation: "relu", "gelu", "gelu_tanh" (GELU's approximation by tanh), "silu" or
            "swiglu_clamped" (of gpt-oss; see :func:`activate`).
        gated: multiply x W_up by an activated gate of its own instead of activating it.
        bias: add a bias to every projection.
        dropout: probability with which a number between the projections is set to 0 in training.

    Raises:
        ValueError: if a width is not an integer of at least 1, the activation is unknown, or
            dropout does not lie in 0 ≤ dropout < 1.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.3, equation (2): the default.
        Shazeer 2020, "GLU Variants Improve Transformer", equations (5) and (6): gated, with
        "silu" SwiGLU, without bias; there the gate's matrix is W and the other V.

    Example:
        >>> feed_forward = FeedForward(d_model=512, d_ff=2048)
        >>> sum(p.numel() for p in feed_forward.parameters())
        2099712
    """

    def __init__(
        self,
        *,
        d_model: int,
        d_ff: int,
        activation: str = "relu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_size("d_model", d_model)
        check_size("d_ff", d_ff)
        check_dropout(dropout)
        check_choice("activation", activation, ACTIVATIONS)
        self.d_model, self.d_ff, self.activation, self.dropout = d_model, d_ff, activation, dropout
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias) if gated else None
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Change the tokens.

        Args:
            x: tokens.

        Returns:
            The changed tokens, shaped like x. No token depends on another.

        Raises:
            ValueError: if x has not the shape (batch, length, d_model), is empty, or has not the
                device or (autocast apart) the dtype of the layer.
        """
        check_tokens("x", x, self.up_proj.weight)
        hidden = self.hidden(x)
        return self.down_proj(F.dropout(hidden, self.dropout) if self.training else hidden)

    def hidden(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n f"]:
        """Give what lies between the projections, before dropout."""
        gate = None if self.gate_proj is None else self.gate_proj(x)
        return activate(self.activation, self.up_proj(x), gate)

    def extra_repr(self) -> str:
        """Name what the projections do not show."""
        return f"activation={self.activation!r}, dropout={self.dropout}"


NORM_PLACEMENTS = ("pre", "post", "both")
"""Where the norms of a block stand, by name."""


class Block(nn.Module):
    """Join attention and feed-forward: each adds what it computes to the tokens.

    ==============  ===================================
    norm_placement  each sub-layer in turn
    ==============  ===================================
    pre             ``x = x + sublayer(norm(x))``
    post            ``x = norm(x + sublayer(x))``
    both            ``x = x + norm'(sublayer(norm(x)))``
    ==============  ===================================

    A parallel block takes both steps at once, from one norm:
    ``x = x + attention(norm(x)) + feed_forward(norm(x))``.

    Args:
        attention: a :class:`~tfm_ref.multi_head.MultiHeadAttention`, or what is called like it
            and has its ``d_model`` and ``o_proj``, among the tokens.
        feed_forward: any module of tokens (batch, length, d_model), such as a
            :class:`FeedForward`.
        cross_attention: a second attention, from the tokens to a context, between the two; a
            block without it if not given.
        norm: makes a norm when called with d_model: ``nn.LayerNorm``, :class:`RMSNorm`.
        norm_placement: "pre", "post" or "both". A stack of blocks that are not "post" needs one
            more norm at its end, since no block normalises what it returns.
        parallel: let attention and feed-forward read the same tokens; only with "pre" and
            without cross-attention.
        dropout: probability with which a number that a sub-layer returns is set to 0 in
            training, before it is added.

    Raises:
        ValueError: if d_model of the parts differs, dropout does not lie in 0 ≤ dropout < 1,
            norm_placement is unknown, or parallel meets another placement or a cross-attention.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", sections 3.1 and 5.4: post, with
        cross-attention the decoder's layer. Xiong et al. 2020, "On Layer Normalization in the
        Transformer Architecture", Table 1: post and pre. Gemma Team 2024, "Gemma 2: Improving
        Open Language Models at a Practical Size", section 2: both. Chowdhery et al. 2022, "PaLM:
        Scaling Language Modeling with Pathways", section 2: parallel.

    Example:
        >>> from tfm_ref import MultiHeadAttention
        >>> attention = MultiHeadAttention(d_model=8, n_heads=2)
        >>> block = Block(attention=attention, feed_forward=FeedForward(d_model=8, d_ff=32))
        >>> block(torch.randn(2, 5, 8), is_causal=True).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        *,
        attention: nn.Module,
        feed_forward: nn.Module,
        cross_attention: nn.Module | None = None,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        norm_placement: str = "pre",
        parallel: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        d_model = attention.d_model
        parts = {
            "attention": attention,
            "cross_attention": cross_attention,
            "feed_forward": feed_forward,
        }
        for name, part in parts.items():
            width = getattr(part, "d_model", d_model)
            if width != d_model:
                raise ValueError(
                    f"attention and {name} must have the same d_model; got {d_model} and {width}"
                )
        check_dropout(dropout)
        check_choice("norm_placement", norm_placement, NORM_PLACEMENTS)
        if parallel and (norm_placement != "pre" or cross_attention is not None):
            raise ValueError(
                'a parallel block must have norm_placement "pre" and no cross_attention; got '
                f'"{norm_placement}" and {"one" if cross_attention is not None else "none"}'
            )
        self.d_model, self.dropout = d_model, dropout
        self.norm_placement, self.parallel = norm_placement, parallel
        for name, part in parts.items():
            normed = part is not None and not (parallel and name == "feed_forward")
            both = normed and norm_placement == "both"
            self.add_module(name, part)
            self.add_module(f"{name}_norm", norm(d_model) if normed else None)
            self.add_module(f"{name}_output_norm", norm(d_model) if both else None)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b m d"] | None = None,
        *,
        mask: Bool[Tensor, "#b #h #n #t"] | None = None,
        is_causal: bool = False,
        bias: Float[Tensor, "#b #h #n #t"] | None = None,
        rotation: Callable[[Tensor], Tensor] | None = None,
        query_scale: Float[Tensor, "#b n"] | None = None,
        context_mask: Bool[Tensor, "#b #h #n #m"] | None = None,
        caches: tuple[KVCache, KVCache] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Pass the tokens through every sub-layer.

        Args:
            x: tokens.
            context: tokens for the cross-attention, and only for it.
            mask: of the attention; True = may attend. See :mod:`tfm_ref.masks`.
            is_causal: let a token see no later one. Joined with ``mask`` by AND.
            bias: finite numbers added to the scaled scores of the attention.
            rotation: turns the queries and keys of the attention by their positions, as
                :meth:`tfm_ref.positions.PositionScheme.rotation` makes it.
            query_scale: multiplies each query of the attention.
            context_mask: of the cross-attention; True = may attend.
            caches: what the attention and the cross-attention remember.

        Returns:
            The changed tokens, shaped like x.

        Raises:
            ValueError: if x or context has not the shape (batch, length, d_model), is empty, or
                has not the device or (autocast apart) the dtype of the block, if a term does not
                fit, if there is a cross-attention without context, or a context or its mask
                without cross-attention.

        Example:
            >>> from tfm_ref import MultiHeadAttention
            >>> one, two = (MultiHeadAttention(d_model=8, n_heads=2) for _ in range(2))
            >>> parts = {"attention": one, "cross_attention": two}
            >>> decoder = Block(feed_forward=FeedForward(d_model=8, d_ff=32), **parts)
            >>> decoder(torch.randn(2, 5, 8), torch.randn(2, 7, 8), is_causal=True).shape
            torch.Size([2, 5, 8])
        """
        attention, cross_attention = self.attention, self.cross_attention
        check_tokens("x", x, attention.o_proj.weight, axis=0)
        if cross_attention is not None and context is None:
            raise ValueError("a block with cross_attention needs a context; got None")
        if cross_attention is None and not (context is None and context_mask is None):
            raise ValueError("a block without cross_attention takes no context or context_mask")

        terms = {"mask": mask, "is_causal": is_causal, "bias": bias, "rotation": rotation}
        terms["query_scale"] = query_scale
        cross_terms = {"context": context, "mask": context_mask}
        if caches is not None:
            terms["cache"], cross_terms["cache"] = caches
        attend = partial(attention, **terms)
        if self.parallel:
            return self._add(x, "attention", lambda y: attend(y) + self.feed_forward(y))
        x = self._add(x, "attention", attend)
        if cross_attention is not None:
            x = self._add(x, "cross_attention", partial(cross_attention, **cross_terms))
        return self._add(x, "feed_forward", self.feed_forward)

    def _add(
        self, x: Float[Tensor, "b n d"], name: str, sublayer: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "b n d"]:
        """Add to the tokens what one sub-layer makes of them, with its norms where they stand."""
        norm, output_norm = getattr(self, f"{name}_norm"), getattr(self, f"{name}_output_norm")
        post = self.norm_placement == "post"
        y = sublayer(x if post else norm(x))
        y = y if output_norm is None else output_norm(y)
        y = x + (F.dropout(y, self.dropout) if self.training else y)
        return norm(y) if post else y

    def extra_repr(self) -> str:
        """Name what the parts do not show."""
        kind = f"norm_placement={self.norm_placement!r}, parallel={self.parallel}"
        return f"{kind}, dropout={self.dropout}"
