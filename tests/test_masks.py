"""Masks against matrices written by hand, their relations, and what they refuse."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfm_ref import causal_mask, chunked_mask, padding_mask, prefix_mask, sliding_window_mask

lengths = st.integers(1, 8)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (causal_mask(3), "100 110 111"),
        (causal_mask(2, 5), "11110 11111"),
        (causal_mask(5, 2), "00 00 00 10 11"),
        (causal_mask(1, 4), "1111"),
        (causal_mask(3, 1), "0 0 1"),
        (sliding_window_mask(4, window=1), "1000 0100 0010 0001"),
        (sliding_window_mask(4, window=2), "1000 1100 0110 0011"),
        (sliding_window_mask(2, 5, window=3), "01110 00111"),
        (sliding_window_mask(5, 2, window=1), "00 00 00 10 01"),
        (sliding_window_mask(5, window=2, n_first=1), "10000 11000 11100 10110 10011"),
        (sliding_window_mask(2, 5, window=1, n_first=2), "11010 11001"),
        (chunked_mask(5, window=2), "10000 11000 00100 00110 00001"),
        (chunked_mask(2, 5, window=3), "00010 00011"),
        (chunked_mask(5, 2, window=1), "00 00 00 10 01"),
        (prefix_mask(4, prefix=2), "1100 1100 1110 1111"),
        (prefix_mask(2, 5, prefix=3), "11110 11111"),
        (prefix_mask(5, 2, prefix=1), "10 10 10 10 11"),
    ],
)
def test_by_hand(mask, expected):
    rows = expected.split()
    assert mask.dtype == torch.bool
    assert mask.shape == (1, 1, len(rows), len(rows[0]))
    assert ["".join(str(int(v)) for v in row) for row in mask[0, 0]] == rows


def test_chunks_follow_the_positions():
    positions = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1], [5, 6, 7, 8]])
    rows = ["1000 1100 0010 0011", "1000 1100 1110 1111", "1000 0100 0110 0001"]
    mask = chunked_mask(4, window=2, positions=positions)
    assert mask.shape == (3, 1, 4, 4)
    for got, expected in zip(mask[:, 0], rows, strict=True):
        assert ["".join(str(int(v)) for v in row) for row in got] == expected.split()
    newest = chunked_mask(2, 4, window=2, positions=positions)
    assert torch.equal(newest, mask[:, :, 2:])
    with pytest.raises(ValueError, match="positions must"):
        chunked_mask(4, window=2, positions=positions[:, :3])


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        ({}, "0000 1000 1100 1110 1111"),
        ({"side": "right"}, "0000 1000 1100 1110 1111"),
        ({"side": "left"}, "0000 0001 0011 0111 1111"),
    ],
)
def test_padding_by_hand(side, expected):
    mask = padding_mask(torch.arange(5), 4, **side)
    assert mask.dtype == torch.bool
    assert mask.shape == (5, 1, 1, 4)
    assert ["".join(str(int(v)) for v in row[0, 0]) for row in mask] == expected.split()


@given(lengths, lengths, st.integers(0, 3))
def test_extremes_are_the_simpler_masks(len_q, len_k, more):
    """A window over all is causal, a prefix of nothing is causal, a prefix of all hides nothing."""
    causal = causal_mask(len_q, len_k)
    window = max(len_q, len_k) + more
    assert torch.equal(sliding_window_mask(len_q, len_k, window=window), causal)
    assert torch.equal(prefix_mask(len_q, len_k, prefix=0), causal)
    assert prefix_mask(len_q, len_k, prefix=len_k).all()


@given(lengths, st.data())
def test_chunks_are_rows_of_the_whole(length, data):
    """Queries start to stop over the keys up to stop get their rows of the square mask."""
    stop = data.draw(st.integers(1, length))
    start = data.draw(st.integers(0, stop - 1))
    window = data.draw(lengths)
    prefix = data.draw(st.integers(0, stop))
    for build, option in (
        (causal_mask, {}),
        (sliding_window_mask, {"window": window}),
        (prefix_mask, {"prefix": prefix}),
    ):
        chunk = build(stop - start, stop, **option)
        assert torch.equal(chunk, build(length, **option)[..., start:stop, :stop])


@given(lengths, lengths, lengths)
def test_window_counts_the_keys_in_sight(len_q, len_k, window):
    """A query at position p sees min(window, p + 1) keys, none if it stands before the first."""
    positions = torch.arange(len_q) + len_k - len_q
    seen = sliding_window_mask(len_q, len_k, window=window).sum(-1).flatten()
    assert torch.equal(seen, (positions + 1).clamp(0, window))


SIZE = "must be an integer of at least 1; got"
PREFIX = "prefix must be an integer from 0 to 3; got"
OUTSIDE = "lengths must lie between 0 and len_k (3); got"
REFUSED = [
    (causal_mask, (0,), {}, f"len_q {SIZE} 0"),
    (causal_mask, (2, 0), {}, f"len_k {SIZE} 0"),
    (causal_mask, (-1, 3), {}, f"len_q {SIZE} -1"),
    (causal_mask, (2.5,), {}, f"len_q {SIZE} 2.5"),
    (sliding_window_mask, (0, 3), {"window": 2}, f"len_q {SIZE} 0"),
    (sliding_window_mask, (3,), {"window": 0}, f"window {SIZE} 0"),
    (sliding_window_mask, (3,), {"window": -2}, f"window {SIZE} -2"),
    (sliding_window_mask, (3,), {"window": 1.5}, f"window {SIZE} 1.5"),
    (
        sliding_window_mask,
        (3,),
        {"window": 1, "n_first": -1},
        "n_first must be an integer of at least 0; got -1",
    ),
    (prefix_mask, (3, 0), {"prefix": 0}, f"len_k {SIZE} 0"),
    (prefix_mask, (3,), {"prefix": 4}, f"{PREFIX} 4"),
    (prefix_mask, (3,), {"prefix": -1}, f"{PREFIX} -1"),
    (prefix_mask, (3,), {"prefix": 1.0}, f"{PREFIX} 1.0"),
    (padding_mask, (torch.tensor([2, 4]), 3), {}, f"{OUTSIDE} [2, 4]"),
    (padding_mask, (torch.tensor([-1]), 3), {}, f"{OUTSIDE} [-1]"),
    (padding_mask, (torch.tensor([0]), 0), {}, f"len_k {SIZE} 0"),
    (
        padding_mask,
        (torch.tensor([1]), 3),
        {"side": "Left"},
        'side must be "right" or "left"; got "Left"',
    ),
    *[
        (
            padding_mask,
            (wrong, 3),
            {},
            "lengths must be a vector of int32 or int64, one per sequence; "
            f"got {wrong.dtype} of shape {tuple(wrong.shape)}",
        )
        for wrong in (
            torch.tensor([[1]]),
            torch.tensor(1),
            torch.ones(2),
            torch.ones(2) > 0,
            torch.ones(2) * 1j,
        )
    ],
]


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(("build", "sizes", "options", "message"), REFUSED)
def test_refused(build, sizes, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build(*sizes, **options)
