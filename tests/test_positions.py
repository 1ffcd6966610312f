"""What holds for every scheme of positions, and what several share."""

import math
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tfm_ref import (
    ALiBi,
    LearnedPositions,
    MultiHeadAttention,
    PositionScheme,
    QueryScaling,
    RotaryPositions,
    SinusoidalPositions,
    T5Bias,
    sinusoidal_encoding,
)
from tfm_ref.positions import frequencies

D, H = 8, 4
ADDED = {
    "sinusoidal": lambda: SinusoidalPositions(d_model=D),
    "sinusoidal, as the authors": lambda: SinusoidalPositions(
        d_model=D, halves=True, endpoint=True
    ),
    "learned": lambda: LearnedPositions(max_seq_len=64, d_model=D),
}
OTHERS = {
    "none": PositionScheme,
    "rotary": lambda: RotaryPositions(head_dim=D),
    "ALiBi": lambda: ALiBi(n_heads=H),
    "T5": lambda: T5Bias(n_heads=H),
}
SCHEMES = {**ADDED, **OTHERS}


# --- one interface


@pytest.mark.parametrize("name", SCHEMES)
def test_each_scheme_acts_at_one_place(name):
    scheme, x = SCHEMES[name](), torch.randn(2, 5, D)
    if name == "T5":
        nn.init.normal_(scheme.table)
    acts = {
        "tokens": not torch.equal(scheme.embed(x, torch.arange(5)[None]), x),
        "queries and keys": scheme.rotation(torch.arange(5)[None]) is not None,
        "scores": scheme.bias(torch.arange(5)[None], torch.arange(5)[None]) is not None,
    }
    place = {"none": None, "rotary": "queries and keys", "ALiBi": "scores", "T5": "scores"}
    assert [where for where, act in acts.items() if act] == [
        where for where in [place.get(name, "tokens")] if where
    ]


@pytest.mark.parametrize("name", SCHEMES)
def test_only_what_is_learned_is_saved(name):
    scheme = SCHEMES[name]()
    tables = {"learned": ["table"], "T5": ["table"]}
    assert list(scheme.state_dict()) == tables.get(name, [])
    assert list(scheme.buffers()) == []


@pytest.mark.parametrize("name", ADDED)
def test_what_is_added_depends_on_the_position_alone(name):
    """Offsets, positions of each example, batch = length: a row per position, wherever it is."""
    scheme, x = SCHEMES[name](), torch.randn(5, 5, D)
    codes = scheme.embed(torch.zeros(1, 64, D), torch.arange(64)[None])[0]
    positions = torch.randint(64, (5, 5))
    assert_close(scheme.embed(x, positions), x + codes[positions])
    assert_close(scheme.embed(x, positions[:1]), x + codes[positions[0]])


@pytest.mark.parametrize("name", ["ALiBi", "T5"])
def test_biases_depend_on_the_distance_alone(name):
    """Offsets, positions of each example, one query against many keys."""
    scheme = SCHEMES[name]()
    if name == "T5":
        nn.init.normal_(scheme.table)
    k = torch.stack([torch.arange(7), torch.arange(7) + 500, torch.arange(7) * 3])
    bias = scheme.bias(k, k)
    assert bias.shape == (3, H, 7, 7)
    assert_close(bias[0], bias[1])
    assert_close(scheme.bias(k[:, -1:], k), bias[:, :, -1:])
    assert_close(scheme.bias(k[2:], k[2:])[0], bias[2])
    assert not torch.allclose(bias[0], bias[2])


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_of_the_tokens_is_kept(name, dtype):
    scheme, x = SCHEMES[name]().to(dtype), torch.randn(2, 5, D, dtype=dtype)
    positions = torch.arange(5)[None]
    assert scheme.embed(x, positions).dtype == dtype
    rotation = scheme.rotation(positions)
    assert rotation is None or rotation(x[:, None]).dtype == dtype


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_survives_the_meta_device(name):
    """Nothing is lost where parameters are made later: there is no table to fill."""
    with torch.device("meta"):
        scheme = SCHEMES[name]()
    scheme.to_empty(device="cpu").load_state_dict(SCHEMES[name]().state_dict())
    q = torch.randn(1, H, 3, D)
    if (rotation := scheme.rotation(torch.arange(3)[None])) is not None:
        assert_close(rotation(q), SCHEMES[name]().rotation(torch.arange(3)[None])(q))


@pytest.mark.parametrize("name", SCHEMES)
def test_decoding_token_by_token(name):
    """One query against n keys gives the last row of the whole, whatever the sequence's start."""
    scheme, attention = SCHEMES[name](), MultiHeadAttention(d_model=D, n_heads=H, head_dim=D)
    x, positions = torch.randn(2, 6, D), torch.stack([torch.arange(6), torch.arange(6) + 40])
    x = scheme.embed(x, positions)
    rotation, bias = scheme.rotation(positions), scheme.bias(positions, positions)
    whole = attention(x, is_causal=True, rotation=rotation, bias=bias)
    for i in range(6):
        so_far = positions[:, : i + 1]
        step = attention(
            x[:, i : i + 1],
            context=x[:, : i + 1],
            rotation=scheme.rotation(so_far),
            bias=scheme.bias(positions[:, i : i + 1], so_far),
        )
        assert_close(step, whole[:, i : i + 1])


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(
    "positions", [torch.arange(5), torch.arange(5.0)[None], torch.ones(1, 5).bool()], ids=str
)
@pytest.mark.usefixtures("no_shape_checks")
def test_positions_must_be_integers_with_two_axes(name, positions):
    scheme, good = SCHEMES[name](), torch.arange(5)[None]
    message = re.escape(
        f"must be integers of shape (batch or 1, length); got {positions.dtype} of shape "
        f"{tuple(positions.shape)}"
    )
    for ask in (
        lambda: scheme.embed(torch.zeros(2, 5, D), positions),
        lambda: scheme.rotation(positions),
        lambda: scheme.bias(positions, good),
        lambda: scheme.bias(good, positions),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(1, 4), (3, 5), (2, 1)], ids=str)
@pytest.mark.usefixtures("no_shape_checks")
def test_positions_must_fit_the_tokens(name, shape):
    message = re.escape(f"positions must fit batch 2 and length 5; got shape {shape}")
    with pytest.raises(ValueError, match=message):
        SCHEMES[name]().embed(torch.zeros(2, 5, D), torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.usefixtures("no_shape_checks")
def test_positions_must_not_be_empty(name):
    with pytest.raises(ValueError, match=r"positions must not be empty; got shape \(1, 0\)"):
        SCHEMES[name]().rotation(torch.zeros(1, 0).long())


@pytest.mark.parametrize("name", ["ALiBi", "T5"])
@pytest.mark.usefixtures("no_shape_checks")
def test_batches_of_queries_and_keys_must_fit(name):
    scheme, two, three = SCHEMES[name](), torch.zeros(2, 1).long(), torch.zeros(3, 4).long()
    with pytest.raises(ValueError, match=r"q_positions must fit batch 3; got shape \(2, 1\)"):
        scheme.bias(two, three)
    with pytest.raises(ValueError, match=r"k_positions must fit batch 3; got shape \(2, 1\)"):
        scheme.bias(three, two)
    assert scheme.bias(two[:1], three).shape == (3, H, 1, 4)
    assert scheme.bias(three, two[:1]).shape == (3, H, 4, 1)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_any_integers_are_positions(name, dtype):
    scheme, x, positions = SCHEMES[name](), torch.zeros(1, 5, D), torch.arange(5)[None]
    few = positions.to(dtype)
    assert torch.equal(scheme.embed(x, few), scheme.embed(x, positions))
    if (rotation := scheme.rotation(few)) is not None:
        assert torch.equal(rotation.cos, scheme.rotation(positions).cos)
    if (bias := scheme.bias(few, few)) is not None:
        assert torch.equal(bias, scheme.bias(positions, positions))


def test_tables_are_float32_under_any_default():
    torch.set_default_dtype(torch.float64)
    try:
        assert (
            frequencies(8).dtype
            == sinusoidal_encoding(torch.tensor([[1]]), 8).dtype
            == torch.float32
        )
        assert RotaryPositions(head_dim=8).rotation(torch.tensor([[1]])).cos.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("width", "theta", "message"),
    [
        (0, 1e4, "must be an integer of at least 2; got 0"),
        (7, 1e4, "must be even; got 7"),
        (8, 1.0, "theta must be finite and above 1; got 1.0"),
        (8, math.nan, "theta must be finite and above 1; got nan"),
        (8, math.inf, "theta must be finite and above 1; got inf"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_frequencies_refuse(width, theta, message):
    for build in (
        lambda: frequencies(width, theta),
        lambda: SinusoidalPositions(d_model=width, theta=theta),
        lambda: RotaryPositions(head_dim=width, theta=theta),
    ):
        with pytest.raises(ValueError, match=message):
            build()


# --- query scaling


def test_query_scaling_by_hand():
    """1 up to the position before the last of a step, then 1 + s ln 2, 1 + s ln 3."""
    factors = QueryScaling(length=3, strength=10.0)(torch.tensor([[0, 1, 2, 4, 5, 8]]))
    two, three = 1 + 10 * math.log(2), 1 + 10 * math.log(3)
    assert_close(factors, torch.tensor([[1, 1, two, two, three, 1 + 10 * math.log(4)]]))
    assert factors.dtype == torch.float32
    assert QueryScaling() == QueryScaling(length=8192, strength=0.1)


@pytest.mark.usefixtures("no_shape_checks")
def test_query_scaling_refusals():
    with pytest.raises(ValueError, match="length must be an integer of at least 1; got 0"):
        QueryScaling(length=0)
    for strength in math.inf, math.nan:
        with pytest.raises(ValueError, match=f"strength must be finite; got {strength}"):
            QueryScaling(strength=strength)
    with pytest.raises(ValueError, match=r"positions must be integers of shape \(batch or 1, len"):
        QueryScaling()(torch.arange(3))
