"""RoPE: queries and keys turned by their positions, in both pairings, and stretched."""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Integer
from torch import Tensor

from tfm_ref.positions import PositionScheme, frequencies
from tfm_ref.validation import check_positions, check_size


@dataclass(frozen=True)
class Rotation:
    """Turn the pairs of numbers in queries and keys, each by its angle.

    ``(x, y) → (x cos - y sin, x sin + y cos)``, that is ``(x + iy) e^(i angle)``.

    Args:
        cos: cosine of each angle, for each position and pair.
        sin: sine of each angle.
        interleaved: pair neighbours, as RoFormer and Meta's Llama do, (0, 1), (2, 3), ...; else
            pair number i with number i + width/2, as GPT-NeoX and most public weights do.

    Reference:
        Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", section
        3.2.2 and equation (34).

    Example:
        A quarter turn.

        >>> rotation = Rotation(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
        >>> rotation(torch.tensor([[[[1.0, 0.0, 7.0]]]]))
        tensor([[[[0., 1., 7.]]]])
    """

    cos: Float[Tensor, "b m p"]
    sin: Float[Tensor, "b m p"]
    interleaved: bool = False

    def __call__(self, t: Float[Tensor, "b h n k"]) -> Float[Tensor, "b h n k"]:
        """Turn queries or keys.

        Args:
            t: queries or keys. Their n positions are the last n of those that the rotation was
                made for: one new query and all keys take the same rotation. Numbers beyond the
                pairs are left as they are.

        Returns:
            The turned queries or keys, in their dtype; computed in float32 at least.

        Raises:
            ValueError: if t has not four axes, has more positions or fewer numbers than the
                rotation, or another batch where that of the rotation is not 1.
        """
        batch, length, pairs = self.cos.shape
        if (
            t.ndim != 4
            or batch not in (1, t.shape[0])
            or t.shape[2] > length
            or t.shape[3] < 2 * pairs
        ):
            raise ValueError(
                f"a rotation for batch {batch}, {length} positions and {pairs} pairs turns "
                "(batch, heads, length, width) with that batch (any, if 1), no more positions "
                f"and at least {2 * pairs} numbers; got {tuple(t.shape)}"
            )
        cos, sin = (table[:, None, -t.shape[2] :] for table in (self.cos, self.sin))
        paired = "b h n (p two)" if self.interleaved else "b h n (two p)"
        x, y = rearrange(t[..., : 2 * pairs], f"{paired} -> two b h n p", two=2)
        turned = rearrange([x * cos - y * sin, x * sin + y * cos], f"two b h n p -> {paired}")
        return torch.cat([turned.to(t.dtype), t[..., 2 * pairs :]], -1)


@dataclass(frozen=True)
class RopeScaling:
    """Stretch RoPE to sequences longer than those of training; this one does not."""

    def frequencies(
        self, width: int, theta: float, *, device: torch.device | None = None
    ) -> Float[Tensor, " p"]:
        """Give the frequencies, as :func:`tfm_ref.positions.frequencies` does, but stretched."""
        return frequencies(width, theta, device=device)

    @property
    def attention_factor(self) -> float:
        """Say by what queries and keys are multiplied as they are turned."""
        return 1.0


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Position interpolation: turn every pair more slowly, ``frequency / factor``.

    Args:
        factor: how many times longer the sequences are to be.

    Raises:
        ValueError: if the factor is not finite and at least 1.

    Reference:
        Chen et al. 2023, "Extending Context Window of Large Language Models via Positional
        Interpolation", equation (4); positions there are divided, which is the same.

    Example:
        >>> LinearScaling(factor=2.0).frequencies(4, 10_000.0)
        tensor([0.5000, 0.0050])
    """

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def frequencies(
        self, width: int, theta: float, *, device: torch.device | None = None
    ) -> Float[Tensor, " p"]:
        """Give the frequencies, all divided by the factor."""
        return frequencies(width, theta, device=device) / self.factor


@dataclass(frozen=True)
class NTKScaling(RopeScaling):
    """NTK-aware scaling: raise the base, so that the slowest pair alone is slowed by the factor.

    ``theta' = theta · factor^(width / (width - 2))``

    Args:
        factor: how many times longer the slowest wavelength is to be.

    Raises:
        ValueError: if the factor is not finite and at least 1; in ``frequencies``, if the width
            is below 4.

    Reference:
        Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models",
        equation (16). "Dynamic" NTK takes the factor s · length / original_length - (s - 1) anew
        as a sequence grows.

    Example:
        >>> NTKScaling(factor=2.0).frequencies(4, 10_000.0)
        tensor([1.0000, 0.0050])
    """

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def frequencies(
        self, width: int, theta: float, *, device: torch.device | None = None
    ) -> Float[Tensor, " p"]:
        """Give the frequencies of the raised base."""
        check_size("the width that NTK-aware scaling pairs", width, least=4)
        return frequencies(width, theta * self.factor ** (width / (width - 2)), device=device)


@dataclass(frozen=True)
class YaRNScaling(RopeScaling):
    """Keep the fast pairs, slow down the slow ones, blend between, and sharpen the weights.

    Pairs with more than beta_fast turns within the original length keep their frequency; those
    with fewer than beta_slow have it divided by the factor.

    Args:
        factor: how many times longer the sequences are to be.
        original_length: positions in the sequences of training.
        beta_fast: turns from which on a pair is left alone.
        beta_slow: turns below which a pair is slowed by the whole factor.
        truncate: round the bounds of the blend outwards to whole pairs, as the authors' code.
        temperature: multiplies queries and keys as they are turned; 0.1 ln(factor) + 1 if not
            given.

    Raises:
        ValueError: if the factor is not finite and at least 1, original_length is not at least 1,
            or 0 < beta_slow ≤ beta_fast does not hold.

    Reference:
        Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models",
        equations (17) to (22). The blend is linear in the number of the pair, as in the authors'
        code and all public models; the paper's equation (18) is linear in the turns.

    Example:
        >>> YaRNScaling(factor=16.0, original_length=4096).attention_factor
        1.2772588722239782
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    temperature: float | None = None

    def __post_init__(self) -> None:
        _check_blend(self, "beta_slow", "beta_fast")

    def frequencies(
        self, width: int, theta: float, *, device: torch.device | None = None
    ) -> Float[Tensor, " p"]:
        """Give the frequencies, blended."""
        fast = frequencies(width, theta, device=device)
        first, last = (
            width * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        number = torch.arange(width // 2, device=device).to(torch.float32)
        slowed = ((number - first) / max(last - first, 0.001)).clamp(0, 1)
        return fast / self.factor * slowed + fast * (1 - slowed)

    @property
    def attention_factor(self) -> float:
        """Say by what queries and keys are multiplied: scores by its square."""
        return 0.1 * math.log(self.factor) + 1 if self.temperature is None else self.temperature


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Keep the fast pairs, slow down the slow ones by the factor, and blend between.

    Pairs with more than high_freq_factor turns within the original length keep their frequency;
    those with fewer than low_freq_factor have it divided by the factor.

    Args:
        factor: by what the frequency of slow pairs is divided.
        low_freq_factor: turns below which a pair is slowed by the whole factor.
        high_freq_factor: turns from which on a pair is left alone.
        original_length: positions in the sequences of training.

    Raises:
        ValueError: if the factor is not finite and at least 1, original_length is not at least 1,
            or 0 < low_freq_factor ≤ high_freq_factor does not hold.

    Reference:
        Llama 3.1: ``apply_scaling`` in ``models/llama3/model.py`` of meta-llama/llama-models,
        whose numbers are the defaults here. Llama 4 Scout has factor 16 and both bounds at 1: a
        step without a blend.

    Example:
        >>> stretched, plain = Llama3Scaling().frequencies(128, 5e5), frequencies(128, 5e5)
        >>> (stretched / plain)[[0, 63]]
        tensor([1.0000, 0.1250])
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        _check_blend(self, "low_freq_factor", "high_freq_factor")

    def frequencies(
        self, width: int, theta: float, *, device: torch.device | None = None
    ) -> Float[Tensor, " p"]:
        """Give the frequencies, blended."""
        fast = frequencies(width, theta, device=device)
        turns = self.original_length * fast / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / max(high - low, 1e-9)).clamp(0, 1)
        return (1 - kept) * fast / self.factor + kept * fast


def _check_blend(scaling: YaRNScaling | Llama3Scaling, slow: str, fast: str) -> None:
    _check_factor(scaling.factor)
    check_size("original_length", scaling.original_length)
    low, high = getattr(scaling, slow), getattr(scaling, fast)
    if not 0 < low <= high:
        raise ValueError(f"0 < {slow} <= {fast} must hold; got {slow} {low} and {fast} {high}")


def _check_factor(factor: float) -> None:
    if not 1 <= factor < math.inf:
        raise ValueError(f"the factor of a scaling must be finite and at least 1; got {factor}")


class RotaryPositions(PositionScheme):
    """Turn each query and key by angles in proportion to its position: RoPE.

    Position m turns pair i by ``m · theta^(-2i / head_dim)``. A position is absolute in each
    query and key; in their product only the difference is left.

    Args:
        head_dim: numbers to turn, even; all of head_dim, or fewer to leave the rest alone.
        theta: the base of the wavelengths.
        interleaved: pair neighbours; see :class:`Rotation`.
        scaling: how to stretch beyond the training length; not at all if not given.

    Raises:
        ValueError: if head_dim is not an even integer of at least 2, or theta is not finite and
            above 1.

    Reference:
        Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", section
        3.2. Angles are computed in float32, whatever the dtype of the model, and never stored.

    Example:
        >>> q = k = torch.ones(1, 1, 1, 8)
        >>> turn = RotaryPositions(head_dim=8).rotation
        >>> near = turn(torch.tensor([[5]]))(q) @ turn(torch.tensor([[3]]))(k).mT
        >>> far = turn(torch.tensor([[905]]))(q) @ turn(torch.tensor([[903]]))(k).mT
        >>> torch.allclose(near, far, atol=1e-3)
        True
    """

    def __init__(
        self,
        *,
        head_dim: int,
        theta: float = 10_000.0,
        interleaved: bool = False,
        scaling: RopeScaling | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.theta, self.interleaved = head_dim, theta, interleaved
        self.scaling = RopeScaling() if scaling is None else scaling
        self.scaling.frequencies(head_dim, theta)

    def rotation(self, positions: Integer[Tensor, "#b m"]) -> Rotation:
        """Make the rotation for the positions. See :meth:`PositionScheme.rotation`."""
        check_positions("positions", positions)
        turns = self.scaling.frequencies(self.head_dim, self.theta, device=positions.device)
        angles, factor = positions[..., None] * turns, self.scaling.attention_factor
        return Rotation(angles.cos() * factor, angles.sin() * factor, self.interleaved)

    def extra_repr(self) -> str:
        """Name what a rotation depends on."""
        return f"head_dim={self.head_dim}, theta={self.theta}, scaling={self.scaling}"


def halves_from_interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder W_Q or W_K, or its bias, so that halves give what interleaved pairs gave.

    Within each head, number 2i goes to place i and number 2i + 1 to place i + head_dim/2. Both
    W_Q and W_K must be reordered; their products, and so all outputs, then stay the same.

    Args:
        weight: (n_heads · head_dim, d_model) as ``nn.Linear`` stores it, or (n_heads · head_dim,).
        head_dim: width of one head, even, all of it turned.

    Returns:
        A reordered copy.

    Raises:
        ValueError: if head_dim is odd or does not divide the rows.

    Reference:
        The script that turned Meta's Llama weights into the public ones does the same.

    Example:
        >>> halves_from_interleaved(torch.tensor([0, 1, 2, 3, 10, 11, 12, 13]), head_dim=4)
        tensor([ 0,  2,  1,  3, 10, 12, 11, 13])
    """
    return _reorder(weight, head_dim, "(h p two) ... -> (h two p) ...")


def interleaved_from_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Undo :func:`halves_from_interleaved`; arguments and errors are the same.

    Example:
        >>> interleaved_from_halves(torch.tensor([0, 2, 1, 3]), head_dim=4)
        tensor([0, 1, 2, 3])
    """
    return _reorder(weight, head_dim, "(h two p) ... -> (h p two) ...")


def _reorder(weight: Tensor, head_dim: int, pattern: str) -> Tensor:
    check_size("head_dim", head_dim, least=2)
    if head_dim % 2 or len(weight) % head_dim:
        raise ValueError(
            f"head_dim ({head_dim}) must be even and divide the rows of the weight ({len(weight)})"
        )
    return rearrange(weight, pattern, two=2, p=head_dim // 2).clone()
