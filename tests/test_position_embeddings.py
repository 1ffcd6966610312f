"""Sines, cosines and learned vectors against their formulas and the public library."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tfm_ref import LearnedPositions, SinusoidalPositions, sinusoidal_encoding

D = 8


def row(*positions):
    return torch.tensor([positions])


# --- sinusoidal


def test_sinusoidal_by_the_papers_formula():
    d, encoding = 512, sinusoidal_encoding(row(0, 1, 77), 512)[0]
    for r, position in enumerate((0, 1, 77)):
        for i in 0, 1, 100, 255:
            angle = position / 10_000 ** (2 * i / d)
            assert encoding[r, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert encoding[r, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_halves_are_those_of_marian():
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    theirs = MarianSinusoidalPositionalEmbedding(99, 64)
    ours = sinusoidal_encoding(torch.arange(99)[None], 64, halves=True)
    assert_close(ours[0], theirs.create_weight(), atol=2e-5, rtol=0)


def test_endpoint_by_the_authors_formula():
    """tensor2tensor: scales of a geometric row from 1 to exactly 1/10000; sines, then cosines."""
    d, position = 512, 77
    scales = [math.exp(-i * math.log(10_000) / (d // 2 - 1)) for i in range(d // 2)]
    expected = [f(position * s) for f in (math.sin, math.cos) for s in scales]
    encoding = sinusoidal_encoding(row(position), d, halves=True, endpoint=True)[0, 0]
    assert_close(encoding.double(), torch.tensor(expected).double(), atol=2e-5, rtol=0)


def test_an_endpoint_of_one_scale_is_refused():
    with pytest.raises(ValueError, match="d_model with endpoint must be an integer of at least 4"):
        sinusoidal_encoding(row(0), 2, endpoint=True)


@given(st.integers(0, 10**6), st.integers(2, 64), st.booleans(), st.booleans())
def test_sinusoidal_norm(position, half, halves, endpoint):
    form = {"halves": halves, "endpoint": endpoint}
    norm = sinusoidal_encoding(row(position), 2 * half, **form).norm().item()
    assert norm == pytest.approx(math.sqrt(half), rel=1e-5)


@pytest.mark.usefixtures("no_shape_checks")
def test_sinusoidal_refuses_another_width():
    with pytest.raises(ValueError, match=r"x must have width d_model \(8\); got 6"):
        SinusoidalPositions(d_model=8).embed(torch.zeros(1, 2, 6), row(0, 1))


# --- learned


def test_learned_positions_are_rows_of_the_table():
    scheme = LearnedPositions(max_seq_len=1000, d_model=64)
    assert scheme.table.std().item() == pytest.approx(0.02, rel=0.02)
    positions = torch.tensor([[0, 1, 2], [997, 998, 999]])
    y = scheme.embed(torch.zeros(2, 3, 64), positions)
    assert_close(y, scheme.table[positions])
    assert scheme.table.numel() == 64_000


@pytest.mark.parametrize("positions", [row(0, 4), row(-1, 0)], ids=str)
def test_learned_positions_end(positions):
    lowest, highest = positions.aminmax()
    message = rf"0 <= position < max_seq_len \(4\); got {lowest} to {highest}"
    with pytest.raises(ValueError, match=message):
        LearnedPositions(max_seq_len=4, d_model=D).embed(torch.zeros(1, 2, D), positions)


@pytest.mark.usefixtures("no_shape_checks")
def test_learned_positions_refuse_tokens_that_do_not_fit():
    scheme = LearnedPositions(max_seq_len=4, d_model=D)
    with pytest.raises(ValueError, match=r"d_model = 8\) and not be empty; got \(1, 2, 6\)"):
        scheme.embed(torch.zeros(1, 2, 6), row(0, 1))
    with pytest.raises(ValueError, match="same dtype and device"):
        scheme.embed(torch.zeros(1, 2, D).double(), row(0, 1))
    for name in "max_seq_len", "d_model":
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1; got 0"):
            LearnedPositions(**{"max_seq_len": 4, "d_model": D, name: 0})
