"""How order gets in: every scheme acts on tokens, on queries and keys, or on scores.

RoPE, which acts on queries and keys, has a module of its own: :mod:`tfm_ref.rotary`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Integer
from torch import Tensor, nn

from tfm_ref.validation import check_positions, check_size, check_tokens


class PositionScheme(nn.Module):
    """Tell a stack of attention layers where each token stands; this one tells nothing: NoPE.

    A scheme overrides one of three methods, and the others leave everything as it is. A stack
    asks all three, once for all its layers::

        x = scheme.embed(x, positions)
        rotation, bias = scheme.rotation(positions), scheme.bias(positions, positions)
        for layer in layers:
            x = x + layer(x, is_causal=True, rotation=rotation, bias=bias)

    ``positions`` are integers of shape (batch or 1, length), so that sequences may begin
    anywhere. Tables are computed for the positions asked for: none is stored, none can be too
    short.

    Reference:
        Kazemnejad et al. 2023, "The Impact of Positional Encoding on Length Generalization in
        Transformers" (NoPE).

    Example:
        >>> x, positions = torch.randn(2, 5, 8), torch.arange(5)[None]
        >>> torch.equal(PositionScheme().embed(x, positions), x)
        True
    """

    def embed(
        self, x: Float[Tensor, "b n d"], positions: Integer[Tensor, "#b n"]
    ) -> Float[Tensor, "b n d"]:
        """Add to the tokens what tells their positions.

        Args:
            x: tokens at the entrance of the stack.
            positions: position of each token.

        Returns:
            The tokens, in the dtype of x.

        Raises:
            ValueError: if positions are not integers of shape (batch or 1, length).
        """
        check_positions("positions", positions, (x.shape[0], x.shape[1]))
        return x

    def rotation(
        self, positions: Integer[Tensor, "#b m"]
    ) -> Callable[[Float[Tensor, "b h n k"]], Float[Tensor, "b h n k"]] | None:
        """Give what turns queries and keys by their positions, or None.

        Args:
            positions: position of each key; those of the queries are the last of them.

        Raises:
            ValueError: if positions are not integers of shape (batch or 1, length).
        """
        check_positions("positions", positions)

    def bias(
        self, q_positions: Integer[Tensor, "#b n"], k_positions: Integer[Tensor, "#b m"]
    ) -> Float[Tensor, "#b h n m"] | None:
        """Give what is added to the scores of queries and keys, or None.

        Args:
            q_positions: position of each query.
            k_positions: position of each key.

        Raises:
            ValueError: if positions are not integers of shape (batch or 1, length).
        """
        check_positions("q_positions", q_positions)
        check_positions("k_positions", k_positions)


@dataclass(frozen=True, kw_only=True)
class QueryScaling:
    """Multiply late queries, which have many keys to choose from, by more than early ones.

    A query at position p is multiplied by ``1 + strength ln(1 + floor((p + 1) / length))``: a
    softmax over more keys is flatter, and larger scores sharpen it again.

    Args:
        length: positions on one step; on the first, which is one shorter, the factor is 1.
        strength: how fast the factor grows from step to step.

    Raises:
        ValueError: if length is not an integer of at least 1, or strength is not finite.

    Reference:
        Nakanishi 2025, "Scalable-Softmax Is Superior for Attention", section 2, where scores
        are multiplied by s ln(n) for n keys. In steps, and from 1 on: ``attn_temperature_tuning``
        of Llama 4, in ``models/llama4/model.py`` of meta-llama/llama-models, whose numbers are
        the defaults here.

    Example:
        >>> QueryScaling(length=2)(torch.arange(5)[None])
        tensor([[1.0000, 1.0693, 1.0693, 1.1099, 1.1099]])
    """

    length: int = 8192
    strength: float = 0.1

    def __post_init__(self) -> None:
        check_size("length", self.length)
        if not math.isfinite(self.strength):
            raise ValueError(f"strength must be finite; got {self.strength}")

    def __call__(self, positions: Integer[Tensor, "#b n"]) -> Float[Tensor, "#b n"]:
        """Give the factors, in float32.

        Args:
            positions: position of each query.

        Raises:
            ValueError: if positions are not integers of shape (batch or 1, length).
        """
        check_positions("positions", positions)
        steps = (positions + 1).div(self.length, rounding_mode="floor")
        return 1 + self.strength * steps.to(torch.float32).log1p()


def frequencies(
    width: int, theta: float = 10_000.0, *, device: torch.device | None = None
) -> Float[Tensor, " p"]:
    """Give the angle by which each pair of numbers turns from one position to the next.

    ``frequency_i = theta^(-2i / width)`` for i = 0 ... width/2 - 1; its wavelength, 2π over the
    frequency, is the number of positions in one full turn.

    Args:
        width: numbers to pair, even.
        theta: the base; the slowest wavelength approaches 2π theta as the width grows.
        device: where to make them.

    Returns:
        Frequencies in radians per position, float32.

    Raises:
        ValueError: if the width is not an even integer of at least 2, or theta is not finite and
            above 1.

    Reference:
        Vaswani et al. 2017, section 3.5; Su et al. 2021, "RoFormer", section 3.2.2.

    Example:
        >>> frequencies(4)
        tensor([1.0000, 0.0100])
    """
    check_size("the width that positions pair", width, least=2)
    if width % 2:
        raise ValueError(f"the width that positions pair must be even; got {width}")
    if not 1 < theta < math.inf:
        raise ValueError(f"theta must be finite and above 1; got {theta}")
    pairs = torch.arange(0, width, 2, device=device).to(torch.float32)
    return 1.0 / theta ** (pairs / width)


def sinusoidal_encoding(
    positions: Integer[Tensor, "b n"],
    d_model: int,
    *,
    theta: float = 10_000.0,
    halves: bool = False,
    endpoint: bool = False,
) -> Float[Tensor, "b n d"]:
    """Write each position as sines and cosines of d_model / 2 angles.

    ``encoding[2i] = sin(position · theta^(-2i / d_model))`` and ``encoding[2i + 1]`` its cosine.
    The norm is √(d_model / 2) at every position.

    Args:
        positions: positions.
        d_model: width of the tokens, even.
        theta: the base of the wavelengths.
        halves: put all sines first and then all cosines, as Marian does.
        endpoint: let the frequencies end at exactly 1 / theta,
            ``theta^(-2i / (d_model - 2))``. The code of the paper's authors has both, the paper
            neither.

    Returns:
        Encoding in float32.

    Raises:
        ValueError: if positions are not integers of shape (batch, length), d_model is not an
            even integer of at least 2 (with endpoint, 4), or theta is not finite and above 1.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.5; the authors' code is
        ``get_timing_signal_1d`` of tensor2tensor.

    Example:
        >>> sinusoidal_encoding(torch.tensor([[0, 1]]), 4)
        tensor([[[0.0000, 1.0000, 0.0000, 1.0000],
                 [0.8415, 0.5403, 0.0100, 0.9999]]])
    """
    check_positions("positions", positions)
    turns = frequencies(d_model, theta, device=positions.device)
    if endpoint:
        check_size("d_model with endpoint", d_model, least=4)
        turns = turns ** (d_model / (d_model - 2))
    angles = positions[..., None] * turns
    pattern = "b n (two p)" if halves else "b n (p two)"
    return rearrange([angles.sin(), angles.cos()], f"two b n p -> {pattern}")


class SinusoidalPositions(PositionScheme):
    """Add :func:`sinusoidal_encoding` to the tokens, as the original Transformer does.

    Args:
        d_model: width of the tokens, even.
        theta: the base of the wavelengths.
        halves: put all sines first and then all cosines.
        endpoint: let the frequencies end at exactly 1 / theta.

    Raises:
        ValueError: as :func:`sinusoidal_encoding`.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.5. The paper multiplies the
        embeddings by √d_model before; so must the caller.

    Example:
        >>> x, positions = torch.zeros(1, 3, 8), torch.arange(3)[None]
        >>> SinusoidalPositions(d_model=8).embed(x, positions).norm(dim=-1)
        tensor([[2., 2., 2.]])
    """

    def __init__(
        self,
        *,
        d_model: int,
        theta: float = 10_000.0,
        halves: bool = False,
        endpoint: bool = False,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.form = {"theta": theta, "halves": halves, "endpoint": endpoint}
        sinusoidal_encoding(torch.zeros(1, 1, dtype=torch.long), d_model, **self.form)

    def embed(
        self, x: Float[Tensor, "b n d"], positions: Integer[Tensor, "#b n"]
    ) -> Float[Tensor, "b n d"]:
        """Add the encoding to the tokens. See :meth:`PositionScheme.embed`."""
        check_positions("positions", positions, (x.shape[0], x.shape[1]))
        if x.shape[-1] != self.d_model:
            raise ValueError(f"x must have width d_model ({self.d_model}); got {x.shape[-1]}")
        return x + sinusoidal_encoding(positions, self.d_model, **self.form).to(x.dtype)


class LearnedPositions(PositionScheme):
    """Add a learned vector per position to the tokens, as BERT and GPT-2 do.

    Args:
        max_seq_len: number of positions; there is no vector for any beyond.
        d_model: width of the tokens.

    Raises:
        ValueError: if a size is not an integer of at least 1.

    Reference:
        Gehring et al. 2017, "Convolutional Sequence to Sequence Learning", section 3.1; drawn
        with a standard deviation of 0.02, as BERT does.

    Example:
        >>> positions = LearnedPositions(max_seq_len=4, d_model=8)
        >>> positions.embed(torch.zeros(2, 3, 8), torch.tensor([[1, 2, 3]])).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, *, max_seq_len: int, d_model: int) -> None:
        super().__init__()
        check_size("max_seq_len", max_seq_len)
        check_size("d_model", d_model)
        self.table = nn.Parameter(torch.empty(max_seq_len, d_model))
        nn.init.normal_(self.table, std=0.02)

    def embed(
        self, x: Float[Tensor, "b n d"], positions: Integer[Tensor, "#b n"]
    ) -> Float[Tensor, "b n d"]:
        """Add the vectors of the positions to the tokens. See :meth:`PositionScheme.embed`.

        Raises:
            ValueError: as there, if a position has no vector, or if x has not the shape (batch,
                length, d_model), or not the device or (autocast apart) dtype of the vectors.
        """
        check_tokens("x", x, self.table)
        check_positions("positions", positions, (x.shape[0], x.shape[1]))
        if not (positions.is_meta or torch.compiler.is_compiling()):
            lowest, highest = (int(position) for position in positions.aminmax())
            if lowest < 0 or highest >= len(self.table):
                raise ValueError(
                    f"positions must lie in 0 <= position < max_seq_len ({len(self.table)}); "
                    f"got {lowest} to {highest}"
                )
        return x + F.embedding(positions.long(), self.table)


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
        """Give the biases in the default dtype. See :meth:`PositionScheme.bias`."""
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
        """Give the biases in the dtype of the table. See :meth:`PositionScheme.bias`."""
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
