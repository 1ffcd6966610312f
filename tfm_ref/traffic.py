"""Attention on a memory of two levels, where every number that moves between them is counted."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor

from tfm_ref.flash import PartialSoftmax, extend
from tfm_ref.validation import check_choice, check_size


class Memory:
    """A large slow memory (HBM) beside a small fast one (SRAM), with a counter between them.

    Tensors lie in the slow memory. What is computed with is first loaded into the fast one, and
    stays there until the ``with`` block ends in which it was loaded or made.

    Args:
        sram: how many numbers the fast memory holds.

    Attributes:
        loaded: numbers read from the slow memory so far.
        stored: numbers written to it so far.
        held: numbers that lie in the fast memory now.

    Raises:
        ValueError: if sram is not an integer of at least 1, or, from :meth:`load` and
            :meth:`hold`, if what is to lie in the fast memory has no room there.

    Example:
        >>> memory, x, y = Memory(sram=8), torch.ones(6), torch.zeros(6)
        >>> with memory.room():
        ...     memory.store(2 * memory.load(x), y)
        >>> memory.loaded, memory.stored, memory.held
        (6, 6, 0)
    """

    def __init__(self, *, sram: int) -> None:
        check_size("sram", sram)
        self.sram = sram
        self.loaded = self.stored = self.held = 0

    @property
    def traffic(self) -> int:
        """Count the numbers that moved; times the bytes of one, the bytes."""
        return self.loaded + self.stored

    @contextmanager
    def room(self) -> Iterator[None]:
        """Free at the end what was loaded or made inside."""
        before = self.held
        yield
        self.held = before

    def load(self, t: Tensor) -> Tensor:
        """Copy a part of a tensor from the slow memory to the fast one."""
        self.loaded += t.numel()
        return self.hold(t.clone())

    def hold(self, t: Tensor) -> Tensor:
        """Take room for what was made in the fast memory."""
        if self.held + t.numel() > self.sram:
            raise ValueError(
                f"the fast memory holds {self.sram} numbers, {self.held} of them taken; "
                f"got {t.numel()} more"
            )
        self.held += t.numel()
        return t

    def store(self, t: Tensor, where: Tensor) -> None:
        """Copy a tensor from the fast memory into a part of one in the slow memory."""
        self.stored += t.numel()
        where.copy_(t)


def block_size(d: int, sram: int) -> int:
    """Give how many vectors a large block may have, beside small ones of at most d.

    ``B = ⌊sram / (5 d + 2)⌋``: four blocks of vectors, B · d scores, and two numbers a query.

    Args:
        d: width of a query, a key and a value.
        sram: how many numbers the fast memory holds.

    Returns:
        The size of a large block.

    Raises:
        ValueError: if d is not an integer of at least 1, or not even a block of 1 has room.

    Reference:
        Dao et al. 2022, "FlashAttention", Algorithm 1, line 1, has ⌈sram / 4 d⌉, which leaves no
        room for the scores: a factor that Θ does not see.

    Example:
        >>> block_size(64, 100_000)
        310
    """
    check_size("d", d)
    check_size("sram", sram, least=5 * d + 2)
    return sram // (5 * d + 2)


def naive_attention(
    memory: Memory, q: Float[Tensor, "n k"], k: Float[Tensor, "n k"], v: Float[Tensor, "n k"]
) -> Float[Tensor, "n k"]:
    """Compute attention in three passes: write the scores, make weights of them, mix the values.

    Moves ``4 N² + 2 N d + 2 T N d`` numbers, T = ⌈N / B⌉, so Θ(N d + N²) if sram is at least d².

    Args:
        memory: what counts; it must hold a row of the scores.
        q: queries of one head, N vectors of width d.
        k: keys, as many.
        v: values, as wide.

    Returns:
        The output.

    Raises:
        ValueError: if the fast memory is too small.

    Reference:
        Dao et al. 2022, "FlashAttention", Algorithm 0 and Theorem 2.
    """
    large, small = _blocks(q, memory.sram)
    scores, weights = q.new_empty(2, len(q), len(q))
    y = torch.empty_like(q)
    for rows in large:
        with memory.room():
            queries = memory.load(q[rows]) * q.shape[1] ** -0.5
            for keys in small:
                with memory.room():
                    memory.store(memory.hold(queries @ memory.load(k[keys]).T), scores[rows, keys])
    for row in range(len(q)):
        with memory.room():
            memory.store(memory.load(scores[row]).softmax(-1), weights[row])
    for rows in large:
        with memory.room():
            mixed = memory.hold(torch.zeros_like(q[rows]))
            for keys in small:
                with memory.room():
                    mixed += memory.load(weights[rows, keys]) @ memory.load(v[keys])
            memory.store(mixed, y[rows])
    return y


def flash_attention(
    memory: Memory, q: Float[Tensor, "n k"], k: Float[Tensor, "n k"], v: Float[Tensor, "n k"]
) -> Float[Tensor, "n k"]:
    """Compute attention by tiles, keys outside: each block of keys passes over all queries.

    Moves ``N (3 d + 2) + T N (3 d + 4)`` numbers, T = ⌈N / B⌉, so Θ(N² d² / sram).

    Args:
        memory: what counts.
        q: queries of one head, N vectors of width d.
        k: keys, as many.
        v: values, as wide.

    Returns:
        The output.

    Raises:
        ValueError: if the fast memory is too small.

    Reference:
        Dao et al. 2022, "FlashAttention", Algorithm 1 and Theorem 2; with O divided at the end by
        the last block alone, as in FlashAttention-2.
    """
    large, small = _blocks(q, memory.sram)
    kept = PartialSoftmax.empty(q, v.shape[1])
    memory.stored += sum(t.numel() for t in kept)  # where they begin has to be written, too
    for keys in large:
        with memory.room():
            some, values = memory.load(k[keys]), memory.load(v[keys])
            for rows in small:
                with memory.room():
                    queries = memory.load(q[rows]) * q.shape[1] ** -0.5
                    seen = PartialSoftmax(*(memory.load(t[rows]) for t in kept))
                    seen = extend(seen, memory.hold(queries @ some.T), values)
                    if keys is large[-1]:
                        seen = seen._replace(mixed=seen.output)
                    for t, where in zip(seen, kept, strict=True):
                        memory.store(t, where[rows])
    return kept.mixed


def flash2_attention(
    memory: Memory, q: Float[Tensor, "n k"], k: Float[Tensor, "n k"], v: Float[Tensor, "n k"]
) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
    """Compute attention by tiles, queries outside: what a query has read never leaves the SRAM.

    Moves ``N (2 d + 1) + 2 T N d`` numbers, T = ⌈N / B⌉: about 2/3 of :func:`flash_attention`.

    Args:
        memory: what counts.
        q: queries of one head, N vectors of width d.
        k: keys, as many.
        v: values, as wide.

    Returns:
        The output, and the log-sum-exp of each query's scores.

    Raises:
        ValueError: if the fast memory is too small.

    Reference:
        Dao 2023, "FlashAttention-2", Algorithm 1.
    """
    large, small = _blocks(q, memory.sram)
    y, lse = torch.empty_like(q), q.new_empty(len(q))
    for rows in large:
        with memory.room():
            queries = memory.load(q[rows]) * q.shape[1] ** -0.5
            seen = PartialSoftmax.empty(queries, v.shape[1])
            for t in seen:
                memory.hold(t)
            for keys in small:
                with memory.room():
                    some, values = memory.load(k[keys]), memory.load(v[keys])
                    seen = extend(seen, memory.hold(queries @ some.T), values)
            memory.store(seen.output, y[rows])
            memory.store(seen.lse, lse[rows])
    return y, lse


def flash_backward(
    memory: Memory,
    q: Float[Tensor, "n k"],
    k: Float[Tensor, "n k"],
    v: Float[Tensor, "n k"],
    y: Float[Tensor, "n k"],
    lse: Float[Tensor, " n"],
    dy: Float[Tensor, "n k"],
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Compute the gradients by tiles, keys outside, from weights that are computed again.

    Moves ``5 N d + T N (5 d + 1)`` numbers, T = ⌈N / B⌉ with B for half the sram, since twice as
    many vectors and scores lie in it.

    Args:
        memory: what counts.
        q: queries of one head, N vectors of width d.
        k: keys, as many.
        v: values, as wide.
        y: the output.
        lse: the log-sum-exp of each query's scores.
        dy: gradient of the output.

    Returns:
        Gradients of q, k and v.

    Raises:
        ValueError: if the fast memory is too small.

    Reference:
        Dao et al. 2022, "FlashAttention", Algorithm 4 and Theorem 5, with the log-sum-exp for
        its two statistics, as in FlashAttention-2.
    """
    large, small = _blocks(q, memory.sram // 2)
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    memory.stored += dq.numel()
    for keys in large:
        with memory.room():
            some, values = memory.load(k[keys]), memory.load(v[keys])
            dsome, dvalues = (memory.hold(torch.zeros_like(t)) for t in (some, values))
            for rows in small:
                with memory.room():
                    parts = (memory.load(t[rows]) for t in (q, y, dy, dq, lse[:, None]))
                    queries, mixed, dmixed, dqueries, top = parts
                    queries = queries * q.shape[1] ** -0.5
                    weights = memory.hold((queries @ some.T - top).exp())
                    own = memory.hold((dmixed * mixed).sum(-1, keepdim=True))
                    dscores = memory.hold(weights * (dmixed @ values.T - own))
                    dvalues += weights.T @ dmixed
                    dsome += dscores.T @ queries
                    memory.store(dqueries + dscores @ some * q.shape[1] ** -0.5, dq[rows])
            memory.store(dsome, dk[keys])
            memory.store(dvalues, dv[keys])
    return dq, dk, dv


FORMS = ("naive", "flash", "flash2", "backward")
"""What :func:`numbers_moved` knows."""


def numbers_moved(form: str, *, n: int, d: int, sram: int) -> int:
    """Say how many numbers an algorithm moves, without running it.

    Args:
        form: "naive" for :func:`naive_attention`, "flash" for :func:`flash_attention`, "flash2"
            for :func:`flash2_attention`, "backward" for :func:`flash_backward`.
        n: number of queries, and of keys.
        d: width of a query, a key and a value.
        sram: how many numbers the fast memory holds.

    Returns:
        Numbers loaded and stored, as their docstrings state.

    Raises:
        ValueError: if the form is unknown, n or d is not an integer of at least 1, or the fast
            memory is too small.

    Example:
        >>> sizes = {"n": 4096, "d": 64, "sram": 50_000}
        >>> numbers_moved("naive", **sizes) / numbers_moved("flash2", **sizes)
        5.569874476987447
    """
    check_choice("form", form, FORMS)
    check_size("n", n)
    t = ceil(n / block_size(d, sram // 2 if form == "backward" else sram))
    return {
        "naive": 4 * n * n + 2 * n * d + 2 * t * n * d,
        "flash": n * (3 * d + 2) + t * n * (3 * d + 4),
        "flash2": n * (2 * d + 1) + 2 * t * n * d,
        "backward": 5 * n * d + t * n * (5 * d + 1),
    }[form]


def crossover(*, n: int, d: int) -> int:
    """Find the smallest fast memory in which :func:`flash_attention` moves less than the naive.

    With queries outside there is no such size: :func:`flash2_attention` reads keys and values as
    often as the naive form, and never a score.

    Args:
        n: number of queries, and of keys.
        d: width of a query, a key and a value.

    Returns:
        How many numbers it holds: about 5 d² / 4.

    Raises:
        ValueError: if n or d is not an integer of at least 1.

    Example:
        >>> crossover(n=4096, d=64)
        5796
    """
    check_size("d", d)
    sizes = {"n": n, "d": d, "sram": 5 * d + 2}
    while numbers_moved("flash", **sizes) >= numbers_moved("naive", **sizes):
        sizes["sram"] += 5 * d + 2
    return sizes["sram"]


def _blocks(q: Float[Tensor, "n k"], sram: int) -> tuple[list[slice], list[slice]]:
    """Cut all positions into large blocks, and into small ones, of at most the width."""
    n, d = q.shape
    large = block_size(d, sram)
    return tuple(
        [slice(start, min(start + size, n)) for start in range(0, n, size)]
        for size in (large, min(large, d))
    )
