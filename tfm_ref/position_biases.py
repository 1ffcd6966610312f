"""Positions that are added to the scores of queries and keys: ALiBi, and the buckets of T5."""

import math

import torch
from einops import rearrange
from jaxtyping import Float, Integer
from torch import Tensor, nn

from tfm_ref.positions import PositionScheme
from tfm_ref.validation import check_positions, check_size


def alibi_slopes(n_heads: int) -> Float[Tensor, " h"]:
    """Give each head the slope by which its scores fall with distance.

    ``slope_i = 2^(-8i / n_heads)`` for i = 1 ... n_heads if n_heads is a power of two; else those
    of the power below, and then every other one of the power above.

    Args:
        n_heads: number of heads.

    Returns:
        Slopes, steepest first within each of the two sequences, in the default dtype.

    Raises:
        ValueError: if n_heads is not an integer of at least 1.

    Reference:
        Press et al. 2022, "Train Short, Test Long", section 3; other numbers of heads as in the
        authors' code, ``get_slopes``.

    Example:
        >>> alibi_slopes(4)
        tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    check_size("n_heads", n_heads)
    below = 1 << (n_heads.bit_length() - 1)
    steps = [i / below for i in range(1, below + 1)]
    steps += [i / (2 * below) for i in range(1, 2 * below, 2)]
    return 2.0 ** (-8 * torch.tensor(steps[:n_heads]))


class ALiBi(PositionScheme):
    """Lower each score in proportion to the distance between query and key.

    ``bias[i, j] = -slope · |i - j|``, with one fixed slope per head: nothing is learned.

    Args:
        n_heads: number of query heads.

    Raises:
        ValueError: if n_heads is not an integer of at least 1.

    Reference:
        Press et al. 2022, "Train Short, Test Long: Attention with Linear Biases Enables Input
        Length Extrapolation", section 3. The paper has causal attention only, where the key is
        never the later one; to the right of a query ours falls off in the same way.

    Example:
        >>> positions = torch.arange(3)[None]
        >>> ALiBi(n_heads=8).bias(positions, positions)[0, 0]
        tensor([[-0.0000, -0.5000, -1.0000],
                [-0.5000, -0.0000, -0.5000],
                [-1.0000, -0.5000, -0.0000]])
    """

    def __init__(self, *, n_heads: int) -> None:
        super().__init__()
        check_size("n_heads", n_heads)
        self.n_heads = n_heads

    def bias(
        self, q_positions: Integer[Tensor, "#b n"], k_positions: Integer[Tensor, "#b m"]
    ) -> Float[Tensor, "#b h n m"]:
        """Give the biases in the default dtype.

        See :meth:`~tfm_ref.positions.PositionScheme.bias`.
        """
        slopes = alibi_slopes(self.n_heads).to(q_positions.device)
        distance = _relative(q_positions, k_positions).abs()
        return -slopes[:, None, None] * distance[:, None]


def t5_bucket(
    relative: Integer[Tensor, "b n m"],
    *,
    n_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = False,
) -> Integer[Tensor, "b n m"]:
    """Sort relative positions into buckets: one each for near ones, ever wider ones for far.

    Half of the buckets hold one distance each, from 0 on; the others grow like a power up to
    max_distance, and the last holds all beyond. Of a bidirectional bias, bucket n_buckets / 2
    stays empty: no later key is at distance 0.

    Args:
        relative: position of the key less that of the query.
        n_buckets: number of buckets.
        max_distance: the distance from which on all share one bucket.
        bidirectional: use half of the buckets for later keys; else they share bucket 0.

    Returns:
        Number of the bucket, from 0 to n_buckets - 1.

    Raises:
        ValueError: if n_buckets is not an integer of at least 2 (4 and even if bidirectional),
            or max_distance does not exceed the distances that have a bucket each.

    Reference:
        Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified
        Text-to-Text Transformer", section 2.1; the bounds as in the authors' code,
        ``_relative_position_bucket``.

    Example:
        >>> t5_bucket(torch.tensor([[[0, -1, -15, -16, -127, -128, -9999, 5]]]))
        tensor([[[ 0,  1, 15, 16, 31, 31, 31,  0]]])
    """
    check_size("n_buckets", n_buckets, least=4 if bidirectional else 2)
    if bidirectional and n_buckets % 2:
        raise ValueError(f"n_buckets of a bidirectional bias must be even; got {n_buckets}")
    if bidirectional:
        n_buckets //= 2
        first, distance = n_buckets * (relative > 0), relative.abs()
    else:
        first, distance = torch.zeros_like(relative), (-relative).clamp(min=0)
    exact = n_buckets // 2
    check_size("max_distance", max_distance, least=exact + 1)
    growth = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    far = exact + (growth * (n_buckets - exact)).long()
    return first + torch.where(distance < exact, distance, far.clamp(max=n_buckets - 1))


class T5Bias(PositionScheme):
    """Add to each score a learned number for its head and for the bucket of its distance.

    ``bias[head, i, j] = table[bucket(j - i), head]``, shared by all layers of a stack.

    Args:
        n_heads: number of query heads.
        n_buckets: number of buckets.
        max_distance: the distance from which on all share one bucket.
        bidirectional: tell later keys apart, as an encoder needs.

    Raises:
        ValueError: as :func:`t5_bucket`, or if n_heads is not an integer of at least 1.

    Reference:
        Raffel et al. 2020, section 2.1. T5 does not divide its scores by √head_dim. The table
        starts at 0, as if there were no positions; T5 draws it.

    Example:
        >>> positions = torch.arange(5)[None]
        >>> T5Bias(n_heads=2).bias(positions, positions).shape
        torch.Size([1, 2, 5, 5])
    """

    def __init__(
        self,
        *,
        n_heads: int,
        n_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        check_size("n_heads", n_heads)
        self.n_heads = n_heads
        self.buckets = {
            "n_buckets": n_buckets,
            "max_distance": max_distance,
            "bidirectional": bidirectional,
        }
        t5_bucket(torch.zeros(1, 1, 1, dtype=torch.long), **self.buckets)
        self.table = nn.Parameter(torch.zeros(n_buckets, n_heads))

    def bias(
        self, q_positions: Integer[Tensor, "#b n"], k_positions: Integer[Tensor, "#b m"]
    ) -> Float[Tensor, "#b h n m"]:
        """Give the biases in the dtype of the table.

        See :meth:`~tfm_ref.positions.PositionScheme.bias`.
        """
        bucket = t5_bucket(_relative(q_positions, k_positions), **self.buckets)
        return rearrange(self.table[bucket], "b n m h -> b h n m")


def _relative(
    q_positions: Integer[Tensor, "#b n"], k_positions: Integer[Tensor, "#b m"]
) -> Integer[Tensor, "#b n m"]:
    """Give the position of each key less that of each query."""
    check_positions("q_positions", q_positions)
    check_positions("k_positions", k_positions)
    batch = max(q_positions.shape[0], k_positions.shape[0])
    check_positions("q_positions", q_positions, (batch, None))
    check_positions("k_positions", k_positions, (batch, None))
    return k_positions.long()[:, None, :] - q_positions.long()[:, :, None]
