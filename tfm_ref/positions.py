"""How order gets in: what a scheme of positions is, and what several of them share.

A scheme adds to the tokens (:mod:`tfm_ref.position_embeddings`), turns queries and keys
(:mod:`tfm_ref.rotary`), or adds to their scores (:mod:`tfm_ref.position_biases`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from tfm_ref.validation import check_positions, check_size


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
