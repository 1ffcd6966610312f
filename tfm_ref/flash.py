"""Exact attention by tiles: the n × m weights are never stored, only what a softmax adds up to."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from tfm_ref.attention_checks import check_qkv, check_terms
from tfm_ref.validation import check_dropout, check_size, check_softcap


class PartialSoftmax(NamedTuple):
    """What a softmax over keys j adds up to, as far as it has read them.

    ``top = max s_j``, ``total = Σ e^(s_j - top)``, ``mixed = Σ e^(s_j - top) v_j``. Two
    results that differ by a factor e^c in total and mixed, and by c in top, are the same.

    Attributes:
        top: the largest score m; the lowest number of the dtype before the first key.
        total: the sum l of what follows the softmax's exponential, 0 or at least 1.
        mixed: the output o, not yet divided by total.
    """

    top: Float[Tensor, "... n 1"]
    total: Float[Tensor, "... n 1"]
    mixed: Float[Tensor, "... n v"]

    @property
    def output(self) -> Float[Tensor, "*b n v"]:
        """Give the values averaged by the softmax; 0 for a query that has read no key."""
        return self.mixed / self.total.clamp(min=1)

    @property
    def lse(self) -> Float[Tensor, "*b n"]:
        """Give the log-sum-exp of the scores, ``log Σ e^s_j``; -inf where no key was read."""
        return (self.top + self.total.log()).squeeze(-1)

    @classmethod
    def empty(cls, like: Float[Tensor, "*b n k"], v_head_dim: int) -> "PartialSoftmax":
        """Begin: no key read, no sum, no output. The lowest number serves as -inf, without NaN.

        Args:
            like: has a row for each query, and the dtype and device of the scores to come.
            v_head_dim: width of the values to come.
        """
        top = torch.full_like(like[..., :1], torch.finfo(like.dtype).min)
        zeros = like.new_zeros(*like.shape[:-1], v_head_dim)
        return cls(top, torch.zeros_like(top), zeros)

    @classmethod
    def of(cls, output: Float[Tensor, "*b n v"], lse: Float[Tensor, "*b n"]) -> "PartialSoftmax":
        """Take up what an attention over some of the keys gave, such as a part of a cache.

        Args:
            output: the values averaged by the softmax.
            lse: the log-sum-exp of its scores; -inf where it had no key.

        Returns:
            A result that :func:`merge` joins with those of the other keys.
        """
        lse = lse[..., None]
        return cls(lse.clamp(min=torch.finfo(lse.dtype).min), (lse > -torch.inf).to(lse), output)


def extend(
    so_far: PartialSoftmax, scores: Float[Tensor, "*b n m"], values: Float[Tensor, "*b m v"]
) -> PartialSoftmax:
    """Read more keys: one step of the online softmax.

    ``m' = max(m, max s_j)``, ``l' = e^(m - m') l + Σ e^(s_j - m')``,
    ``o' = e^(m - m') o + Σ e^(s_j - m') v_j``.

    Args:
        so_far: what was read before.
        scores: scores of the new keys; -inf where a query may not attend.
        values: their values.

    Returns:
        The same for all keys, those before and the new ones.

    Reference:
        Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", Algorithm 3
        (top and total, a number at a time); Dao et al. 2022, "FlashAttention: Fast and
        Memory-Efficient Exact Attention with IO-Awareness", section 3.1 (by blocks, and the
        output); Dao 2023, "FlashAttention-2", section 3.1.1 (divided only at the end).

    Example:
        >>> scores, values = torch.randn(2, 7), torch.randn(7, 3)
        >>> half = extend(PartialSoftmax.empty(scores, 3), scores[:, :4], values[:4])
        >>> whole = extend(half, scores[:, 4:], values[4:])
        >>> torch.allclose(whole.output, scores.softmax(-1) @ values, atol=1e-6)
        True
    """
    top = torch.maximum(so_far.top, scores.amax(-1, keepdim=True))
    weights, decay = (scores - top).exp_(), (so_far.top - top).exp_()
    total = decay * so_far.total + weights.sum(-1, keepdim=True)
    return PartialSoftmax(top, total, decay * so_far.mixed + weights @ values)


def online_softmax(
    scores: Float[Tensor, "*b n m"], values: Float[Tensor, "*b m v"], *, block: int = 1
) -> Iterator[PartialSoftmax]:
    """Read scores and values from left to right, once, and give what is known after each block.

    ``top = max s_i``, ``total = Σ e^(s_i - top)``, ``mixed = Σ e^(s_i - top) v_i`` over the keys
    i read so far holds at each step; the last ``output`` is ``softmax(scores) values``.

    Args:
        scores: scores of all keys.
        values: their values.
        block: number of keys to read at each step.

    Yields:
        What is known after the block.

    Raises:
        ValueError: if block is not an integer of at least 1.

    Reference:
        See :func:`extend`.

    Example:
        >>> scores, values = torch.tensor([[0.0, 2.0, 1.0]]), torch.eye(3)
        >>> [step.top.item() for step in online_softmax(scores, values)]
        [0.0, 2.0, 2.0]
    """
    check_size("block", block)
    step = PartialSoftmax.empty(scores, values.shape[-1])
    for some, theirs in zip(scores.split(block, -1), values.split(block, -2), strict=True):
        yield (step := extend(step, some, theirs))


def merge(first: PartialSoftmax, second: PartialSoftmax) -> PartialSoftmax:
    """Join what was read of some keys with what was read of others.

    ``m = max(m_1, m_2)``, ``l = e^(m_1 - m) l_1 + e^(m_2 - m) l_2``, and o as l. The order does not
    matter, nor which are joined first: keys can be read in parts, at once, anywhere.

    Args:
        first: of some keys; from an output and its log-sum-exp, by :meth:`PartialSoftmax.of`.
        second: of others, for the same queries.

    Returns:
        The same for the keys of both.

    Reference:
        Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", section 3.1.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 8, 4)
        >>> left = tiled_attention(q, k[:, :, :5], v[:, :, :5], return_lse=True)
        >>> right = tiled_attention(q, k[:, :, 5:], v[:, :, 5:], return_lse=True)
        >>> whole = merge(PartialSoftmax.of(*left), PartialSoftmax.of(*right)).output
        >>> torch.allclose(whole, tiled_attention(q, k, v), atol=1e-6)
        True
    """
    top = torch.maximum(first.top, second.top)
    one, two = (first.top - top).exp(), (second.top - top).exp()
    total = one * first.total + two * second.total
    return PartialSoftmax(top, total, one * first.mixed + two * second.mixed)


def tiled_attention(
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b g m k"],
    v: Float[Tensor, "b g m v"],
    *,
    mask: Bool[Tensor, "#b #h #n #m"] | None = None,
    is_causal: bool = False,
    window: int | None = None,
    bias: Float[Tensor, "#b #h #n #m"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    dropout: float = 0.0,
    block_q: int = 64,
    block_k: int = 256,
    return_lse: bool = False,
) -> Float[Tensor, "b h n v"] | tuple[Float[Tensor, "b h n v"], Float[Tensor, "b h n"]]:
    """Compute :func:`~tfm_ref.attention.scaled_dot_product_attention` by tiles of the scores.

    A block of queries reads the keys block by block, by :func:`extend`; its sinks, if any, are
    read before the first. Tiles that ``is_causal`` or ``window`` forbid as a whole are skipped.
    The backward keeps no weights but computes them again, from the log-sum-exp L of each row:
    ``P = e^(S - L)``, ``dV = Pᵀ dO``, ``dS = P ∘ (dO Vᵀ - D)`` with ``D = rowsum(dO ∘ O)``,
    ``dQ = scale · dS K``, ``dK = scale · dSᵀ Q``. So memory grows as n + m, not as n · m.

    Args:
        q: queries.
        k: keys; with fewer heads than q, each key head serves as many query heads as it takes.
        v: values, finite also where masked; their width v_head_dim may differ from head_dim.
        mask: True = may attend; each axis of size 1 or full. See :mod:`tfm_ref.masks`.
        is_causal: let a query see no later key; aligned at the bottom right. Joined with ``mask``
            by AND.
        window: let a query see its own position and the window - 1 before it, as
            :func:`~tfm_ref.masks.sliding_window_mask` does; all that came before if not given.
        bias: finite numbers added to the scaled scores; each axis of size 1 or full.
        scale: factor of the dot products; 1/√head_dim if not given.
        softcap: bends the scaled scores into (-softcap, softcap) before the bias is added.
        sinks: one score per head that takes its share of each softmax and gives nothing for it.
        dropout: must be 0.
        block_q: number of queries in a tile.
        block_k: number of keys in a tile.
        return_lse: give the log-sum-exp, too.

    Returns:
        Output of shape (batch, heads, len_q, v_head_dim), 0 for a query that may attend to
        nothing; and if asked for the log-sum-exp of its scores, the sink's among them, of shape
        (batch, heads, len_q), -inf for such a query. Sums are in float32 at least, and so is the
        log-sum-exp. Gradients go once through both, not twice.

    Raises:
        ValueError: as :func:`~tfm_ref.attention.scaled_dot_product_attention`, if dropout is not
            0, or if window or a block is not an integer of at least 1.

    Reference:
        Dao et al. 2022, "FlashAttention: Fast and Memory-Efficient Exact Attention with
        IO-Awareness", Algorithms 1 and 4; Dao 2023, "FlashAttention-2: Faster Attention with
        Better Parallelism and Work Partitioning", Algorithms 1 and 2, whose outer loop in the
        forward, over queries, serves here in the backward, too.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 50, 8)
        >>> from tfm_ref import scaled_dot_product_attention
        >>> expected = scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> y = tiled_attention(q, k, v, is_causal=True, block_q=16, block_k=16)
        >>> torch.allclose(y, expected, atol=1e-6)
        True
    """
    check_qkv(q, k, v)
    check_dropout(dropout)
    if dropout:
        raise ValueError(f'tiles have no dropout; got {dropout}. Use "naive" or "sdpa".')
    check_terms(q, k, mask=mask, bias=bias, sinks=sinks)
    if softcap is not None:
        check_softcap(softcap)
    for name, size in {"window": window, "block_q": block_q, "block_k": block_k}.items():
        if size is not None:
            check_size(name, size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    is_causal, window = is_causal or window is not None, window or k.shape[2]
    form = is_causal, window, scale, softcap, block_q, block_k
    grid = _Grid(q.shape[2], k.shape[2], k.shape[1], *form)
    device = "cpu" if q.is_meta else q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        q, k, v = (t.to(torch.get_autocast_dtype(device)) for t in (q, k, v))
    with torch.autocast(device, enabled=False):
        y, lse = _Tiled.apply(q, k, v, bias, sinks, mask, grid)
    return (y, lse) if return_lse else y


class _Grid(NamedTuple):
    """How the scores are cut into tiles, and what each number of a tile goes through."""

    len_q: int
    len_k: int
    n_kv_heads: int
    is_causal: bool
    window: int
    scale: float
    softcap: float | None
    block_q: int
    block_k: int

    def tiles(self) -> Iterator[tuple[slice, list[slice]]]:
        """Give each block of queries, with the blocks of keys that one of them may see."""
        past = self.len_k - self.len_q
        for start in range(0, self.len_q, self.block_q):
            rows = slice(start, min(start + self.block_q, self.len_q))
            first = max(0, start + past + 1 - self.window)
            end = min(self.len_k, rows.stop + past) if self.is_causal else self.len_k
            steps = range(first, end, self.block_k)
            yield rows, [slice(step, min(step + self.block_k, end)) for step in steps]

    def fold(self, t: Float[Tensor, "b h n k"], rows: slice) -> Tensor:
        """Put the queries of all heads that share a key head below each other, as if of one."""
        return t[:, :, rows].unflatten(1, (self.n_kv_heads, -1)).flatten(2, 3)

    def by_group(self, t: Tensor, rows: slice) -> Tensor:
        """Part them again, by the query heads of each key head."""
        return t.unflatten(2, (-1, rows.stop - rows.start))

    def cut(self, t: Tensor, rows: slice, keys: slice) -> Shaped[Tensor, "#b #g #r #n #m"]:
        """Cut a tile out of a mask, a bias or its gradient."""
        every = slice(None)
        t = t[:, :, rows if t.shape[2] > 1 else every, keys if t.shape[3] > 1 else every]
        return t.unflatten(1, (self.n_kv_heads, -1) if t.shape[1] > 1 else (1, 1))

    def bent(
        self, q: Float[Tensor, "b g n k"], k: Float[Tensor, "b g m k"]
    ) -> Float[Tensor, "b g n m"]:
        """Score queries, scaled before, against the keys of a tile, and bend the scores."""
        scores = q @ k.mT
        return scores if self.softcap is None else self.softcap * (scores / self.softcap).tanh()

    def admitted(
        self,
        scores: Float[Tensor, "b g n m"],
        bias: Tensor | None,
        mask: Tensor | None,
        rows: slice,
        keys: slice,
    ) -> Float[Tensor, "b g n m"]:
        """Add the bias to the scores of a tile, and put -inf where a query may not attend."""
        tile = self.by_group(scores, rows)
        if bias is not None:
            tile = tile + self.cut(bias, rows, keys)
        if mask is not None:
            tile = tile.masked_fill(~self.cut(mask, rows, keys), -torch.inf)
        past = self.len_k - self.len_q
        first, last = rows.start + past, rows.stop - 1 + past
        if self.is_causal and not (keys.stop - 1 <= first and keys.start > last - self.window):
            i = torch.arange(first, last + 1, device=scores.device)[:, None]
            j = torch.arange(keys.start, keys.stop, device=scores.device)
            tile = tile.masked_fill((j > i) | (j <= i - self.window), -torch.inf)
        return tile.flatten(2, 3)


class _Tiled(torch.autograd.Function):
    """The forward keeps its inputs, its output and the log-sum-exp; the backward recomputes."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        mask: Tensor | None,
        grid: _Grid,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(q.dtype, torch.float32)
        y = q.new_empty(*q.shape[:3], v.shape[3])
        lse = torch.empty(q.shape[:3], dtype=exact, device=q.device)
        for rows, blocks in grid.tiles():
            queries = grid.fold(q, rows).to(exact) * grid.scale
            seen = PartialSoftmax.empty(queries, v.shape[-1])
            if sinks is not None:
                top = sinks.to(exact)[:, None, None].expand(len(q), -1, rows.stop - rows.start, 1)
                top = grid.fold(top, slice(None))
                seen = seen._replace(top=top, total=torch.ones_like(top))
            for keys in blocks:
                scores = grid.bent(queries, k[:, :, keys].to(exact))
                scores = grid.admitted(scores, bias, mask, rows, keys)
                seen = extend(seen, scores, v[:, :, keys].to(exact))
            y[:, :, rows] = grid.by_group(seen.output, rows).flatten(1, 2)
            lse[:, :, rows] = grid.by_group(seen.lse, rows).flatten(1, 2)
        ctx.save_for_backward(q, k, v, bias, sinks, mask, y, lse)
        ctx.grid = grid
        return y, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, sinks, mask, y, lse = ctx.saved_tensors
        grid, exact = ctx.grid, lse.dtype
        dq, dk, dv = torch.empty_like(q), *(torch.zeros_like(t, dtype=exact) for t in (k, v))
        dbias = torch.zeros_like(bias, dtype=exact) if ctx.needs_input_grad[3] else None
        # A row that sees nothing has weights e^(S - inf) = 0. Raising L by c raises S by P c.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]
        d = (dy.to(exact) * y).sum(-1, keepdim=True) - dlse[..., None]
        for rows, blocks in grid.tiles():
            queries = grid.fold(q, rows).to(exact) * grid.scale
            dys, ds, lses = (grid.fold(t, rows).to(exact) for t in (dy, d, lse))
            dqs = torch.zeros_like(queries)
            for keys in blocks:
                some, values = k[:, :, keys].to(exact), v[:, :, keys].to(exact)
                bent = grid.bent(queries, some)
                weights = (grid.admitted(bent, bias, mask, rows, keys) - lses).exp_()
                dscores = weights * (dys @ values.mT - ds)
                if dbias is not None:
                    of_bias = grid.cut(dbias, rows, keys)
                    of_bias += grid.by_group(dscores, rows).sum_to_size(of_bias.shape)
                if grid.softcap is not None:
                    dscores = dscores * (1 - (bent / grid.softcap).square())
                dqs += dscores @ some
                dk[:, :, keys] += dscores.mT @ queries
                dv[:, :, keys] += weights.mT @ dys
            dq[:, :, rows] = grid.by_group(dqs * grid.scale, rows).flatten(1, 2)
        dsinks = None
        if ctx.needs_input_grad[4]:
            dsinks = -((sinks[:, None, None] - lse).exp() * d).sum((0, 2, 3)).to(sinks.dtype)
        dbias = None if dbias is None else dbias.to(bias.dtype)
        return dq, dk.to(k.dtype), dv.to(v.dtype), dbias, dsinks, None, None
