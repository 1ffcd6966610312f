"""A stack: blocks on one another, told by their positions, windows and caches what to see."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from tfm_ref.attention_checks import check_mask
from tfm_ref.cache import StackCache
from tfm_ref.config import TransformerConfig
from tfm_ref.masks import chunked_mask, sliding_window_mask


class Stack(nn.Module):
    """Put blocks on one another, with positions at their entrance and a norm at their exit.

    It is causal or not, and has cross-attention or not, as the config says: encoder and decoder
    differ in nothing else.

    Args:
        config: the choices.

    Example:
        >>> config = TransformerConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=16)
        >>> Stack(config)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = c = config
        self.positions, self.local_positions = c.new_positions(), None
        if c.local_rope_theta is not None:
            self.local_positions = c.new_positions(is_local=True)
        self.embedding_norm = c.new_norm(c.d_model) if c.embedding_norm else None
        self.blocks = nn.ModuleList(c.new_block(layer) for layer in range(c.n_layers))
        self.norm = None if c.norm_placement == "post" else c.new_norm(c.d_model)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b m d"] | None = None,
        *,
        mask: Bool[Tensor, "#b #h #n #t"] | None = None,
        positions: Integer[Tensor, "#b n"] | None = None,
        context_mask: Bool[Tensor, "#b #h #n #m"] | None = None,
        cache: StackCache | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Pass the tokens through all blocks.

        Args:
            x: embedded tokens.
            context: what the cross-attention reads, and only it.
            mask: True = may attend; joined by AND with causality and windows.
            positions: position of each token; if not given 0, 1, 2, ... or, with a cache, those
                that follow. After padding on the left, they begin where the tokens do.
            context_mask: of the cross-attention; True = may attend.
            cache: remembers the tokens of x behind those that it holds, and lets x see them.

        Returns:
            The changed tokens, shaped like x.

        Raises:
            ValueError: as :meth:`tfm_ref.layers.Block.forward`, if the positions do not fit, or
                if the stack is not causal and there is a cache.
        """
        terms = {"mask": mask, "positions": positions, "context_mask": context_mask}
        for state in self.states(x, context, **terms, cache=cache):
            x = state
        return x

    def states(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b m d"] | None = None,
        *,
        mask: Bool[Tensor, "#b #h #n #t"] | None = None,
        positions: Integer[Tensor, "#b n"] | None = None,
        context_mask: Bool[Tensor, "#b #h #n #m"] | None = None,
        cache: StackCache | None = None,
    ) -> Iterator[Float[Tensor, "b n d"]]:
        """Yield the tokens before the first block and after each; arguments as of ``forward``.

        What the last block gives is yielded after the norm at the exit, where there is one.
        """
        c = self.config
        if cache is not None:
            if not c.is_causal:
                raise ValueError("a cache needs is_causal = True: new tokens would change old ones")
            if cache.positions.length > cache.length:
                cache.truncate(cache.length)  # what a call that failed on its way has left
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + x.shape[1], device=x.device)[None]
        positions = all_positions = positions + c.first_position
        x = self.positions.embed(x, positions)
        if cache is not None:
            column = positions.expand(len(x), -1)[..., None]
            all_positions = cache.positions.append(column)[0][..., 0]
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        x = F.dropout(x, c.dropout) if self.training else x
        yield x
        terms = {
            is_local: self._terms(x, is_local, mask, positions, all_positions, columns)
            for is_local, columns in self._columns(x, cache).items()
        }
        for layer, block in enumerate(self.blocks):
            caches = None if cache is None else cache.layers[layer]
            terms_here = terms[c.is_local(layer)]
            x = block(x, context, context_mask=context_mask, caches=caches, **terms_here)
            if layer == c.n_layers - 1 and self.norm is not None:
                x = self.norm(x)
            yield x

    def _columns(self, x: Tensor, cache: StackCache | None) -> dict[bool, Tensor | None]:
        """Say for layers with a window, and for those without, which tokens x will find."""
        layers = {self.config.is_local(layer): layer for layer in range(self.config.n_layers)}
        if cache is None:
            return dict.fromkeys(layers)
        n, device = x.shape[1], x.device
        return {
            is_local: cache.layers[layer][0].columns(n, device=device)
            for is_local, layer in layers.items()
        }

    def _terms(
        self,
        x: Tensor,
        is_local: bool,
        mask: Tensor | None,
        positions: Tensor,
        all_positions: Tensor,
        columns: Tensor | None,
    ) -> dict:
        """Give what all layers of a kind, with window or without, tell their attention."""
        c, n, t = self.config, x.shape[1], all_positions.shape[1]
        if is_local:
            if mask is not None:
                check_mask(mask, x.new_empty(()).expand(len(x), c.n_heads, n, t))
            window = self._window(n, t, all_positions, columns)
            if window is not None:
                mask = window if mask is None else mask & window
            if columns is not None:
                all_positions = all_positions[:, columns]
                mask = None if mask is None else mask.expand(-1, -1, -1, t)[..., columns]
        terms = {"mask": mask, "is_causal": c.is_causal}
        if not is_local and c.query_scaling is not None:
            terms["query_scale"] = c.query_scaling(positions - c.first_position)
        if not (is_local or c.global_positions):
            return terms
        scheme = self.local_positions if is_local and self.local_positions else self.positions
        bias = scheme.bias(positions, all_positions)
        terms["bias"] = None if bias is None else bias.to(x.dtype)
        terms["rotation"] = scheme.rotation(positions)
        return terms

    def _window(
        self, n: int, t: int, all_positions: Tensor, columns: Tensor | None
    ) -> Tensor | None:
        """Make the mask of the window over all t tokens; None if it hides nothing."""
        c, device = self.config, all_positions.device
        if c.chunked:
            positions = all_positions - c.first_position
            return chunked_mask(n, t, window=c.window, positions=positions, device=device)
        if t <= c.window + c.n_first or (n == 1 and columns is not None):
            return None  # a cache that rolls has forgotten what the newest token must not see
        return sliding_window_mask(n, t, window=c.window, n_first=c.n_first, device=device)
