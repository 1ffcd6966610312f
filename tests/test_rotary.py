"""RoPE against the public implementations, as algebra, and what it refuses."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tfm_ref import (
    LinearScaling,
    Llama3Scaling,
    MultiHeadAttention,
    NTKScaling,
    RotaryPositions,
    YaRNScaling,
)
from tfm_ref.rotary import RopeScaling, Rotation, halves_from_interleaved, interleaved_from_halves

WIDTH, LENGTH = 64, 2048
FACTOR = {"factor": 8.0}
TYPES = {  # ours, and the public configuration
    "default": (None, {}),
    "linear": (LinearScaling(factor=8.0), FACTOR),
    "yarn": (
        YaRNScaling(factor=8.0, original_length=LENGTH),
        {**FACTOR, "original_max_position_embeddings": LENGTH},
    ),
    "yarn, all settings": (
        YaRNScaling(
            factor=40.0,
            original_length=1024,
            beta_fast=16,
            beta_slow=2,
            truncate=False,
            temperature=1.25,
        ),
        {
            "factor": 40.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
            "attention_factor": 1.25,
        },
    ),
    "yarn, short": (  # even the fastest pair turns less than beta_fast times
        YaRNScaling(factor=8, original_length=64),
        {**FACTOR, "original_max_position_embeddings": 64},
    ),
    "llama3": (
        Llama3Scaling(original_length=LENGTH),
        {
            **FACTOR,
            "original_max_position_embeddings": LENGTH,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    "llama3, Scout": (
        Llama3Scaling(factor=16.0, high_freq_factor=1.5, original_length=LENGTH),
        {
            "factor": 16.0,
            "original_max_position_embeddings": LENGTH,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.5,
        },
    ),
}
SCALINGS = [ours for ours, _ in TYPES.values() if ours]


def public(name: str, theta: float = 10_000.0) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * WIDTH,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        rope_parameters={
            "rope_type": name.split(",")[0],
            "rope_theta": theta,
            **TYPES.get(name, (None, FACTOR))[1],
        },
    )


# --- against the public implementation, past the original length


@pytest.mark.parametrize("theta", [100.0, 10_000.0, 500_000.0])
@pytest.mark.parametrize("name", TYPES)
def test_equals_the_public_implementation(name, theta):
    """Queries and keys agree at every position to five times the original length."""
    theirs = LlamaRotaryEmbedding(public(name, theta))
    ours = RotaryPositions(head_dim=WIDTH, theta=theta, scaling=TYPES[name][0])
    q, k = torch.randn(2, 2, 4, 5 * LENGTH, WIDTH)
    positions = torch.stack([torch.arange(5 * LENGTH), torch.arange(5 * LENGTH) + 7])
    rotation = ours.rotation(positions)
    expected = apply_rotary_pos_emb(q, k, *theirs(q, positions))
    assert_close((rotation(q), rotation(k)), expected, atol=2e-3, rtol=0)
    near = (positions < 100)[:, None, :, None]
    assert_close(rotation(q) * near, expected[0] * near, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TYPES)
def test_frequencies_equal_the_public_ones(name):
    ours = TYPES[name][0] or RopeScaling()
    if name == "default":
        theirs, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(public(name))
    else:
        theirs, factor = ROPE_INIT_FUNCTIONS[name.split(",")[0]](public(name), "cpu")
    assert_close(ours.frequencies(WIDTH, 10_000.0), theirs, atol=0, rtol=2e-6)
    assert ours.attention_factor == pytest.approx(factor)


@pytest.mark.parametrize("length", [1, LENGTH, 3 * LENGTH, 40 * LENGTH])
def test_dynamic_ntk_is_ntk_with_a_factor_of_the_length(length):
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](public("dynamic"), "cpu", seq_len=length)
    ours = NTKScaling(factor=8.0 * max(length / LENGTH, 1) - 7)
    assert_close(ours.frequencies(WIDTH, 10_000.0), theirs)


def test_interleaved_pairs_are_complex_numbers():
    """As Meta's Llama computes it: neighbours are one complex number each."""
    q, positions = torch.randn(2, 3, 5, 8), torch.randint(999, (2, 5))
    angles = positions[..., None] * 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.view_as_real(torch.view_as_complex(q.unflatten(-1, (4, 2))) * turn).flatten(-2)
    rotation = RotaryPositions(head_dim=8, interleaved=True).rotation(positions)
    assert_close(rotation(q), expected, atol=2e-4, rtol=0)


# --- as algebra


@pytest.mark.parametrize("interleaved", [False, True])
@given(shift=st.integers(0, 5_000), distance=st.integers(0, 50))
def test_products_depend_on_the_distance_alone(interleaved, shift, distance):
    q, k = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(shift)).double()
    turn = RotaryPositions(head_dim=32, interleaved=interleaved).rotation

    def score(i, j):
        return turn(torch.tensor([[i]]))(q) @ turn(torch.tensor([[j]]))(k).mT

    assert_close(score(shift + distance, shift), score(distance, 0), atol=0.02, rtol=0)
    assert_close(turn(torch.tensor([[shift]]))(q).norm(), q.norm(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (4, 2)])
def test_weights_reordered_give_the_other_pairing(n_heads, n_kv_heads):
    """The theorem: halves with reordered W_Q and W_K (and biases) = interleaved pairs."""
    settings = dict(d_model=12, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=6, bias="qk")
    neighbours, halves = MultiHeadAttention(**settings), MultiHeadAttention(**settings)
    halves.load_state_dict(
        {
            name: halves_from_interleaved(t, 6) if name[:6] in ("q_proj", "k_proj") else t
            for name, t in neighbours.state_dict().items()
        }
    )
    x, positions = torch.randn(2, 9, 12), torch.arange(9)[None]
    apart, near = (
        RotaryPositions(head_dim=6, interleaved=interleaved).rotation(positions)
        for interleaved in (False, True)
    )
    expected = neighbours(x, is_causal=True, rotation=near)
    assert_close(halves(x, is_causal=True, rotation=apart), expected)
    assert not torch.allclose(halves(x, is_causal=True, rotation=near), expected, atol=1e-3)
    assert not torch.allclose(neighbours(x, is_causal=True, rotation=apart), expected, atol=1e-3)


def test_reordering_is_undone():
    for weight in torch.randn(12, 5), torch.randn(12):
        reordered = halves_from_interleaved(weight, 6)
        assert not torch.equal(reordered, weight)
        assert torch.equal(interleaved_from_halves(reordered, 6), weight)


def test_a_reordered_weight_is_a_copy():
    weight = torch.zeros(2, 3)
    halves_from_interleaved(weight, 2).add_(1)
    assert not weight.any()


@pytest.mark.parametrize("head_dim", [3, 8])
def test_reordering_refuses(head_dim):
    message = rf"head_dim \({head_dim}\) must be even and divide the rows of the weight \(12\)"
    for reorder in halves_from_interleaved, interleaved_from_halves:
        with pytest.raises(ValueError, match=message):
            reorder(torch.zeros(12, 3), head_dim)


@pytest.mark.parametrize("interleaved", [False, True])
def test_numbers_beyond_the_pairs_stay(interleaved):
    """Partial RoPE: GPT-NeoX turns the first quarter of a head."""
    q, scheme = torch.randn(1, 2, 5, 16), RotaryPositions(head_dim=4, interleaved=interleaved)
    rotation = scheme.rotation(torch.arange(5)[None])
    assert torch.equal(rotation(q)[..., 4:], q[..., 4:])
    assert_close(rotation(q)[..., :4], rotation(q[..., :4].contiguous()))


def test_fewer_queries_take_the_last_positions():
    q, rotation = (
        torch.randn(2, 3, 6, 8),
        RotaryPositions(head_dim=8).rotation(torch.arange(6)[None]),
    )
    for n in 1, 4:
        assert torch.equal(rotation(q[:, :, -n:]), rotation(q)[:, :, -n:])


def test_each_example_has_its_own_positions():
    """Also where batch = heads: positions never go to the heads."""
    q, positions = torch.randn(3, 3, 5, 8), torch.randint(100, (3, 5))
    scheme = RotaryPositions(head_dim=8)
    alone = [scheme.rotation(positions[b : b + 1])(q[b : b + 1]) for b in range(3)]
    assert_close(scheme.rotation(positions)(q), torch.cat(alone))


def test_bfloat16_queries_are_turned_in_float32():
    """The only error is that of the result's own rounding: half a unit in the last place."""
    q, scheme = torch.randn(1, 1, 4096, 8).bfloat16(), RotaryPositions(head_dim=8).bfloat16()
    rotation = scheme.rotation(torch.arange(4096)[None])
    exact = rotation(q.double())
    assert ((rotation(q).double() - exact).abs() <= exact.abs() * 2**-8).all()


def test_positions_have_no_end():
    far = RotaryPositions(head_dim=8).rotation(torch.tensor([[10**6]]))
    assert_close(far.cos[0, 0, 1].item(), math.cos(10**5), atol=0.01, rtol=0)


@pytest.mark.parametrize("shape", [(2, 1, 3, 8), (1, 1, 4, 8), (1, 1, 3, 6), (1, 3, 8)], ids=str)
@pytest.mark.usefixtures("no_shape_checks")
def test_rotation_refuses(shape):
    if shape[0] == 2:
        rotation, batch = RotaryPositions(head_dim=8).rotation(torch.zeros(3, 3).long()), 3
    else:
        rotation, batch = RotaryPositions(head_dim=8).rotation(torch.arange(3)[None]), 1
    message = re.escape(
        f"a rotation for batch {batch}, 3 positions and 4 pairs turns (batch, heads, length, "
        f"width) with that batch (any, if 1), no more positions and at least 8 numbers; got {shape}"
    )
    with pytest.raises(ValueError, match=message):
        rotation(torch.zeros(shape))


def test_rotation_turns_by_the_angle():
    """By hand: (1, 0) turned by 60 degrees."""
    third = torch.tensor(math.pi / 3)[None, None, None]
    x, y = Rotation(third.cos(), third.sin())(torch.tensor([[[[1.0, 0.0]]]])).flatten().tolist()
    assert (x, y) == pytest.approx((0.5, math.sqrt(3) / 2))


def test_gradients_flow_through_a_rotation():
    q = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    for interleaved in False, True:
        scheme = RotaryPositions(head_dim=4, interleaved=interleaved)
        assert torch.autograd.gradcheck(scheme.rotation(torch.arange(3)[None]), q)


# --- scalings


@pytest.mark.parametrize("scaling", [*SCALINGS, NTKScaling(factor=8)], ids=str)
def test_a_scaling_slows_pairs_by_1_to_its_factor(scaling):
    """The slowest pair by the whole factor, no pair by more, and the slower the more."""
    slowed = RopeScaling().frequencies(128, 1e4) / scaling.frequencies(128, 1e4)
    assert slowed[-1].item() == pytest.approx(scaling.factor, rel=1e-4)
    assert (slowed.diff() >= -1e-4).all()
    first = scaling.factor if isinstance(scaling, LinearScaling) else 1.0
    assert_close(slowed[0].item(), first)


@pytest.mark.parametrize(
    "scaling",
    [
        LinearScaling(factor=1.0),
        NTKScaling(factor=1.0),
        YaRNScaling(factor=1.0, original_length=2048),
        Llama3Scaling(factor=1.0),
    ],
    ids=str,
)
def test_a_factor_of_1_changes_nothing(scaling):
    assert_close(scaling.frequencies(64, 1e4), RopeScaling().frequencies(64, 1e4))
    assert scaling.attention_factor == 1.0


def test_yarn_without_any_blend():
    """Where no pair turns even once, all but the fastest are slowed by the whole factor."""
    scaling = YaRNScaling(factor=2, original_length=6)
    slowed = RopeScaling().frequencies(8, 1e4) / scaling.frequencies(8, 1e4)
    assert slowed.tolist() == [1, 2, 2, 2]


def test_llama_31_by_wavelength():
    """Below 2,048 unchanged, above 8,192 divided by 8, between them in between."""
    plain, scaled = (s.frequencies(128, 5e5) for s in (RopeScaling(), Llama3Scaling()))
    wavelength, slowed = 2 * math.pi / plain, plain / scaled
    assert_close(slowed[wavelength < 2048], torch.ones(int((wavelength < 2048).sum())))
    assert_close(slowed[wavelength > 8192], torch.full_like(slowed[wavelength > 8192], 8.0))
    between = slowed[(wavelength > 2048) & (wavelength < 8192)]
    assert len(between) > 0
    assert ((between > 1) & (between < 8)).all()


def test_yarn_temperature_acts_on_scores_squared():
    scaling = YaRNScaling(factor=16.0, original_length=64)
    q = torch.randn(1, 1, 1, 8)
    turned = RotaryPositions(head_dim=8, scaling=scaling).rotation(torch.tensor([[3]]))(q)
    assert_close((turned @ turned.mT), (0.1 * math.log(16) + 1) ** 2 * (q @ q.mT))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        *[
            (build, "the factor of a scaling must be finite and at least 1; got 0.5")
            for build in (
                lambda: LinearScaling(factor=0.5),
                lambda: NTKScaling(factor=0.5),
                lambda: YaRNScaling(factor=0.5, original_length=64),
                lambda: Llama3Scaling(factor=0.5),
            )
        ],
        (lambda: LinearScaling(factor=math.inf), "must be finite and at least 1; got inf"),
        (
            lambda: YaRNScaling(factor=2.0, original_length=0),
            "original_length must be an integer of at least 1; got 0",
        ),
        (
            lambda: Llama3Scaling(original_length=0),
            "original_length must be an integer of at least 1; got 0",
        ),
        (
            lambda: YaRNScaling(factor=2.0, original_length=64, beta_slow=33),
            "0 < beta_slow <= beta_fast must hold; got beta_slow 33 and beta_fast 32.0",
        ),
        (
            lambda: Llama3Scaling(low_freq_factor=0.0),
            "must hold; got low_freq_factor 0.0 and high_freq_factor 4.0",
        ),
        (
            lambda: Llama3Scaling(low_freq_factor=5.0),
            "must hold; got low_freq_factor 5.0 and high_freq_factor 4.0",
        ),
        (
            lambda: RotaryPositions(head_dim=2, scaling=NTKScaling(factor=2.0)),
            "NTK-aware scaling pairs must be an integer of at least 4; got 2",
        ),
    ],
)
def test_scalings_refuse(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_attention_passes_gradients_to_turned_queries_and_keys():
    attention = MultiHeadAttention(d_model=8, n_heads=2)
    rotation = RotaryPositions(head_dim=4).rotation(torch.arange(3)[None])
    attention(torch.randn(1, 3, 8), rotation=rotation).sum().backward()
    for projection in attention.q_proj, attention.k_proj:
        assert projection.weight.grad.abs().sum() > 0
