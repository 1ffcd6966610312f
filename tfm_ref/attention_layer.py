"""What every attention layer does, however it makes its queries, keys and values."""

from collections.abc import Callable
from copy import deepcopy

from jaxtyping import Bool, Float
from torch import Tensor, nn

from tfm_ref.attention import attention_weights
from tfm_ref.attention_checks import check_query_scale
from tfm_ref.backends import BACKENDS
from tfm_ref.cache import KVCache
from tfm_ref.validation import check_tokens


class AttentionLayer(nn.Module):
    """Attend from tokens to tokens, by the queries, keys and values that a subclass makes.

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
            >>> import torch
            >>> from tfm_ref import MultiHeadAttention
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
