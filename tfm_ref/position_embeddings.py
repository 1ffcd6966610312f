"""Positions that are added to the tokens: sines and cosines, or learned vectors."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Integer
from torch import Tensor, nn

from tfm_ref.positions import PositionScheme, frequencies
from tfm_ref.validation import check_positions, check_size, check_tokens


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
        """Add the encoding to the tokens.

        See :meth:`~tfm_ref.positions.PositionScheme.embed`.
        """
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
        """Add the vectors of the positions to the tokens.

        See :meth:`~tfm_ref.positions.PositionScheme.embed`.

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
