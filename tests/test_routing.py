"""Routers against their definitions and by hand, and what they refuse."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import ROUTER, SIZES, B, D, E, K, N, refused, settle
from oracles import draw, redraw
from torch.testing import assert_close

from tfm_ref import MoELayer, Router
from tfm_ref.routing import SCORES, ExpertChoiceRouter, expert_capacity

# --- the router by hand


def router(logits, **settings):
    """Build a router that gives these logits to the tokens of the unit matrix."""
    logits = torch.tensor(logits)
    router = Router(d_model=len(logits), n_experts=logits.shape[1], **settings)
    router.proj.weight.data = logits.T.contiguous()
    return router(torch.eye(len(logits))[None])


LOGS = [[math.log(p) for p in (1, 2, 3, 4)], [math.log(p) for p in (5, 3, 1, 1)]]


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, [[4 / 7, 3 / 7], [5 / 8, 3 / 8]]),
        ({"normalise": False}, [[0.4, 0.3], [0.5, 0.3]]),
        ({"normalise": False, "scale": 2.5}, [[1.0, 0.75], [1.25, 0.75]]),
        ({"scale": 7.0}, [[4.0, 3.0], [35 / 8, 21 / 8]]),
        ({"score": "sigmoid", "normalise": False}, [[4 / 5, 3 / 4], [5 / 6, 3 / 4]]),
        ({"score": "sigmoid"}, [[16 / 31, 15 / 31], [10 / 19, 9 / 19]]),
    ],
)
def test_weights_by_hand(settings, weights):
    """The scores are tenths, or p/(1 + p); the two best are chosen, best first."""
    routing = router(LOGS, top_k=2, **settings)
    assert routing.indices.tolist() == [[[3, 2], [0, 1]]]
    assert_close(routing.weights[0], torch.tensor(weights))
    assert_close(routing.logits[0], torch.tensor(LOGS))
    odds = routing.logits.exp()
    sigmoid = settings.get("score") == "sigmoid"
    assert_close(routing.scores, odds / (1 + odds) if sigmoid else odds / 10)


def test_softmax_over_the_chosen_is_softmax_over_all_normalised():
    """What the docstring says of gpt-oss."""
    layer = settle(Router(**ROUTER, bias=True))
    routing = layer(draw(B, N, D))
    chosen, indices = routing.logits.topk(K)
    assert torch.equal(routing.indices, indices)
    assert_close(routing.weights, chosen.softmax(-1))
    assert_close(routing.logits, layer.proj(draw(B, N, D)))


@pytest.mark.parametrize(
    ("settings", "experts"),
    [
        ({"top_k_groups": 1}, [1, 0]),
        ({"top_k_groups": 1, "top_k_in_group": 2}, [2, 3]),
        ({"top_k_groups": 2}, [1, 7]),
        ({"top_k_groups": 2, "top_k_in_group": 2}, [1, 2]),
        ({"top_k_groups": 3}, [1, 7]),
        ({"top_k_groups": 4, "top_k_in_group": 2}, [1, 7]),
    ],
)
def test_groups_by_hand(settings, experts):
    """Of four groups the first has the best expert, the second the best two."""
    logits = [[math.log(p) for p in (0.5, 9, 6, 5, 4, 4, 1, 8)]]
    routing = router(logits, top_k=2, n_groups=4, **settings)
    assert routing.indices.tolist() == [[experts]]
    assert_close(routing.weights.sum(), torch.tensor(1.0))


def test_correction_is_for_the_choice_only():
    """It changes who is chosen, not the weights of those who are; no gradient reaches it."""
    layer = Router(**ROUTER, score="sigmoid", normalise=False, choice_bias=True)
    x = draw(B, N, D)
    before = layer(x)
    layer.choice_bias[:] = torch.tensor([-9.0, 0, 9, 0, 9, 0, 9, 0])
    after = layer(x)
    assert (after.indices.sort().values == torch.tensor([2, 4, 6])).all()
    assert_close(after.weights, after.scores.gather(-1, after.indices))
    assert torch.equal(after.scores, before.scores)
    assert "choice_bias" in layer.state_dict()
    assert [name for name, _ in layer.named_parameters()] == ["proj.weight"]
    assert Router(**ROUTER).choice_bias is None


def test_correction_is_for_the_groups_too():
    """Whatever the scores, which lie between 0 and 1; corrected ones may lie below 0."""
    groups = {"n_groups": 4, "top_k_groups": 2, "top_k_in_group": 2}
    layer = Router(**ROUTER, **groups, choice_bias=True)
    layer.choice_bias[:] = torch.tensor([-20.0, -9, -4, -20, -6, -6, 3, -20])
    assert (layer(draw(B, N, D)).indices.sort().values == torch.tensor([4, 5, 6])).all()


def test_correction_stays_in_float32():
    """bfloat16 knows no number between 0.5 and 0.50390625; its steps are smaller than that."""
    layer = Router(**ROUTER, choice_bias=True)
    layer.choice_bias.fill_(0.501)
    for cast in layer.bfloat16(), layer.half(), layer.double(), layer.to(torch.bfloat16):
        assert cast is layer
        assert cast.choice_bias.dtype == torch.float32
        assert torch.equal(cast.choice_bias, torch.full((E,), 0.501))
    moved = layer.to("meta", torch.bfloat16)
    assert (moved.choice_bias.device.type, moved.choice_bias.dtype) == ("meta", torch.float32)
    assert moved.to_empty(device="cpu", recurse=False).choice_bias.device.type == "cpu"
    assert moved.proj.weight.device.type == "meta"
    assert Router(**ROUTER).bfloat16().choice_bias is None


def test_correction_is_zero_and_float32_at_first():
    torch.set_default_dtype(torch.float64)
    try:
        choice_bias = Router(**ROUTER, choice_bias=True).choice_bias
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(choice_bias, torch.zeros(E))


def test_sigmoids_that_are_all_zero_give_no_nan():
    routing = router([[-1000.0] * E], top_k=2, score="sigmoid")
    assert torch.equal(routing.weights, torch.zeros(1, 1, 2))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_computes_in_float32(dtype, score, device):
    """In half precision, and under autocast, as if its numbers had been cast before."""
    layer = redraw(Router(**ROUTER, bias=True, score=score)).to(device, dtype)
    x = draw(B, N, D, seed=9).to(device, dtype)
    routing, wide = layer(x), copy.deepcopy(layer).float()
    pairs = zip(routing[:4], wide(x.float())[:4], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert {t.dtype for t in routing[1:4]} == {torch.float32}
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(wide(x).logits, routing.logits)
    assert {t.dtype for t in layer.double()(x.double())[1:4]} == {torch.float64}


@given(st.data())
def test_choice_by_its_definition(data):
    """Every setting: sort by hand, one token at a time."""
    n_groups, in_group = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    top_k_groups = data.draw(st.integers(1, n_groups))
    top_k_in_group = data.draw(st.integers(1, in_group))
    top_k = data.draw(st.integers(1, top_k_groups * in_group))
    layer = Router(
        d_model=D,
        n_experts=n_groups * in_group,
        top_k=top_k,
        score=data.draw(st.sampled_from(list(SCORES))),
        normalise=top_k > 1,
        bias=True,
        choice_bias=True,
        n_groups=n_groups,
        top_k_groups=top_k_groups,
        top_k_in_group=top_k_in_group,
        scale=1.5,
    ).double()
    x = draw(2, 3, D, seed=data.draw(st.integers(0, 99))).double()
    indices, weights, scores = settle(layer)(x)[:3]
    for chosen, weight, score in zip(
        *(t.flatten(0, 1).tolist() for t in (indices, weights, scores)), strict=True
    ):
        rated = [s + b for s, b in zip(score, layer.choice_bias.tolist(), strict=True)]
        groups = [range(g * in_group, (g + 1) * in_group) for g in range(n_groups)]

        def best(experts, rated=rated):
            return sorted(experts, key=rated.__getitem__, reverse=True)

        kept = sorted(groups, key=lambda g: sum(rated[i] for i in best(g)[:top_k_in_group]))
        expected = best([i for g in kept[-top_k_groups:] for i in g])[:top_k]
        assert chosen == expected
        total = sum(score[i] for i in expected) if top_k > 1 else 1
        assert weight == pytest.approx([1.5 * score[i] / total for i in expected])


# --- noise, capacity, and experts that choose


def test_noise_is_in_what_the_router_sees():
    """Between 1 - noise and 1 + noise times each number, and in training only."""
    layer = Router(d_model=D, n_experts=D, top_k=K, noise=0.25)
    layer.proj.weight.data = torch.eye(D)
    x = 1 + draw(64, 64, D).abs()
    seen = layer(x).logits / x
    assert 0.75 <= seen.min() < 0.751
    assert 1.249 < seen.max() <= 1.25
    assert_close(seen.std().item(), 0.25 / math.sqrt(3), rtol=0.02, atol=0)
    assert torch.equal(layer.eval()(x).logits, x)


@pytest.mark.parametrize(
    ("settings", "room"),
    [
        ({"top_k": 1}, 3),
        ({"top_k": 2}, 5),
        ({"top_k": 1, "capacity_factor": 1.25}, 4),
        ({"top_k": 1, "capacity_factor": 0.01}, 1),
        ({"top_k": 4}, 10),
        ({"top_k": 1, "capacity_factor": 100.0}, 10),
    ],
)
def test_capacity_by_hand(settings, room):
    """Ten tokens, four experts."""
    assert expert_capacity(10, n_experts=4, **settings) == room


def test_capacity_is_not_rounded_up_for_want_of_digits():
    """In floating point 1.1 · 100 / 10 is a little more than 11."""
    assert expert_capacity(100, n_experts=10, top_k=1, capacity_factor=1.1) == 11


def test_first_choices_come_before_second_ones():
    """Room for two. The fourth token's first choice takes the room of the first one's second."""
    logits = [[5.0, 4, 0, 0], [0.0, 5, 4, 0], [5.0, 0, 4, 0], [0.0, 5, 4, 0]]
    routing = router(logits, top_k=2, capacity_factor=1.0)
    assert routing.indices.tolist() == [[[0, 1], [1, 2], [0, 2], [1, 2]]]
    assert routing.kept.tolist() == [[[True, False], [True, True], [True, True], [True, False]]]
    free = router(logits, top_k=2)
    assert free.kept is None
    assert torch.equal(routing.weights, free.weights)


def test_a_capacity_is_that_of_a_sequence_of_any_length():
    """What a factor gives for one length, a capacity gives for all."""
    sizes = {"d_model": D, "n_experts": 4, "top_k": 1, "normalise": False}
    by_number, by_factor = Router(**sizes, capacity=3), Router(**sizes, capacity_factor=1.0)
    by_number.load_state_dict(by_factor.state_dict())
    x = draw(B, 12, D)
    assert torch.equal(by_number(x).kept, by_factor(x).kept)
    assert not by_number(x).kept.all()
    assert torch.equal(by_number(x).kept[:, :5], by_number(x[:, :5]).kept)
    assert by_number(x[:, :3]).kept.all()


@given(st.data())
def test_capacity_by_its_definition(data):
    """Rank by rank, token by token, each sequence for itself."""
    n, top_k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    factor = data.draw(st.sampled_from([0.1, 0.5, 1.0, 1.3, 4.0]))
    layer = Router(d_model=D, n_experts=4, top_k=top_k, capacity_factor=factor, normalise=top_k > 1)
    routing = layer(draw(2, n, D, seed=data.draw(st.integers(0, 99))))
    room = math.ceil(factor * top_k * n / 4)
    for indices, kept in zip(routing.indices.tolist(), routing.kept.tolist(), strict=True):
        taken = [0] * 4
        for rank in range(top_k):
            for token in range(n):
                expert = indices[token][rank]
                assert kept[token][rank] == (taken[expert] < room)
                taken[expert] += 1


@pytest.mark.parametrize(("top_k", "leaks"), [(1, False), (2, True)])
def test_later_tokens_drop_second_choices_only(top_k, leaks):
    """At equal length. So a causal model with a capacity wants top_k = 1."""
    layer = redraw(
        Router(d_model=D, n_experts=4, top_k=top_k, normalise=False, capacity_factor=0.5)
    )
    x = draw(64, 8, D)
    changed = torch.cat([x[:, :4], draw(64, 4, D, seed=5)], 1)
    same = (layer(x).kept == layer(changed).kept)[:, :4].all().item()
    assert same != leaks


def test_padding_on_the_right_takes_no_room_of_real_tokens():
    layer = redraw(Router(**{**ROUTER, "top_k": 1}, normalise=False, capacity_factor=0.5))
    x = draw(B, 9, D)
    short, long = layer(x[:, :8]).kept, layer(x).kept
    assert (long[:, :8] | ~short).all()


REFUSED = [
    ({"d_model": 0}, "d_model must be an integer of at least 1; got 0"),
    ({"n_experts": 0}, "n_experts must be an integer of at least 1; got 0"),
    ({"top_k": 0}, "top_k must be an integer from 1 to 8; got 0"),
    ({"top_k": 9}, "top_k must be an integer from 1 to 8; got 9"),
    ({"n_groups": 0}, "n_groups must be an integer of at least 1; got 0"),
    ({"n_groups": 3}, "n_experts (8) must be divisible by n_groups (3)"),
    (
        {"n_groups": 4, "top_k_groups": 5},
        "top_k_groups must be an integer from 1 to 4; got 5",
    ),
    (
        {"n_groups": 4, "top_k_in_group": 3},
        "top_k_in_group must be an integer from 1 to 2; got 3",
    ),
    (
        {"n_groups": 4, "top_k_groups": 1},
        "top_k (3) must not exceed the experts in the top_k_groups kept groups (1 of 2)",
    ),
    ({"noise": 1.0}, "noise must lie in 0 <= noise < 1; got 1.0"),
    ({"noise": -0.1}, "noise must lie in 0 <= noise < 1; got -0.1"),
    ({"capacity_factor": 0.0}, "capacity_factor must be finite and above 0; got 0.0"),
    ({"capacity_factor": math.inf}, "capacity_factor must be finite and above 0; got inf"),
    ({"capacity": 0}, "capacity must be an integer of at least 1; got 0"),
    (
        {"capacity": 2, "capacity_factor": 1.0},
        "of capacity and capacity_factor, one must not be given; got 2 and 1.0",
    ),
    ({"score": "tanh"}, 'score must be one of softmax, sigmoid; got "tanh"'),
    (
        {"top_k": 1},
        "normalise with top_k = 1 makes every weight 1, whatever the score, and gives the router "
        "no gradient; set normalise=False",
    ),
]


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_router_settings_refused(settings, message):
    with refused(message):
        Router(**{**ROUTER, **settings})
    with refused(message):
        MoELayer(**{**SIZES, **settings})


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(("settings", "message"), REFUSED[:4])
def test_settings_of_experts_that_choose_refused(settings, message):
    with refused(message):
        ExpertChoiceRouter(**{**ROUTER, **settings})
