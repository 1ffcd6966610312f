"""Routers and mixtures of experts against the public models, by hand, and what they refuse."""

import copy
import importlib
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import draw, redraw, values_and_gradients
from torch.testing import assert_close
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from tfm_ref import Block, FeedForward, MoELayer, MultiHeadAttention, RMSNorm, Router, moe
from tfm_ref.layers import ACTIVATIONS, activate
from tfm_ref.moe import BACKENDS, SCORES, ExpertChoiceRouter, expert_capacity, grouped_linear

B, N, D, FF, E, K = 3, 5, 8, 16, 8, 3  # rows of 16 bytes, which the grouped product wants
TOKENS = 20
SIZES = {"d_model": D, "d_ff": FF, "n_experts": E, "top_k": K}
ROUTER = {"d_model": D, "n_experts": E, "top_k": K}


def settle(module):
    """Give parameters and correction biases values that matter."""
    for name, buffer in redraw(module).named_buffers():
        assert name.endswith("choice_bias")
        buffer.copy_(draw(*buffer.shape, seed=99) / 4)
    return module


# --- against the public models

COMMON = {"hidden_size": D, "num_attention_heads": 2, "num_key_value_heads": 2}
MIXTRAL = {**COMMON, "intermediate_size": FF, "num_local_experts": E, "num_experts_per_tok": K}
MANY = {**COMMON, "moe_intermediate_size": FF, "num_experts_per_tok": K}
DEEPSEEK = {**MANY, "n_routed_experts": E, "n_shared_experts": 2, "routed_scaling_factor": 2.5}
GROUPED = {"n_group": 4, "topk_group": 2}
OUR_GROUPS = {"n_groups": 4, "top_k_groups": 2}
SWITCH = {"top_k": 1, "normalise": False, "gated": False, "activation": "relu"}
V2, V3 = {"normalise": False}, {"score": "sigmoid", "choice_bias": True, "top_k_in_group": 2}


def in_one(of_ours, gate="gate", shared="shared_experts"):
    """Name ours as most of them do: the gate's matrices above those of up, in one."""
    state = {
        f"{gate}.weight": of_ours["router.proj.weight"],
        "experts.gate_up_proj": torch.cat([of_ours["gate_proj"], of_ours["up_proj"]], 1),
        "experts.down_proj": of_ours["down_proj"],
    }
    if "router.choice_bias" in of_ours:
        state[f"{gate}.e_score_correction_bias"] = of_ours["router.choice_bias"]
    for name, t in of_ours.items():
        if name.startswith("shared."):
            state[name.replace("shared", shared)] = t
    return state


def transposed(of_ours):
    """Llama 4: the same, each matrix transposed."""
    state = in_one(of_ours, "router", "shared_expert")
    return {name: t.mT if "experts" in name else t for name, t in state.items()}


def interleaved(of_ours):
    """gpt-oss: rows of the gate and of up take turns, each matrix is transposed."""
    gate_up = torch.stack([of_ours["gate_proj"], of_ours["up_proj"]], 2).flatten(1, 2)
    return {
        "router.weight": of_ours["router.proj.weight"],
        "router.bias": of_ours["router.proj.bias"],
        "experts.gate_up_proj": gate_up.mT,
        "experts.gate_up_proj_bias": torch.stack(
            [of_ours["gate_bias"], of_ours["up_bias"]], 2
        ).flatten(1),
        "experts.down_proj": of_ours["down_proj"].mT,
        "experts.down_proj_bias": of_ours["down_bias"],
    }


def one_by_one(of_ours):
    """Switch: each expert a module."""
    names = {"wi": "up_proj", "wo": "down_proj"}
    return {
        "router.classifier.weight": of_ours["router.proj.weight"],
        **{
            f"experts.expert_{i}.{theirs}.weight": of_ours[ours][i]
            for i in range(E)
            for theirs, ours in names.items()
        },
    }


MODELS = {  # module, class, configuration, our settings, names
    "Mixtral": ("mixtral", "MixtralSparseMoeBlock", MixtralConfig(**MIXTRAL), {}, in_one),
    **{
        f"Qwen3, norm_topk_prob={normalise}": (
            "qwen3_moe",
            "Qwen3MoeSparseMoeBlock",
            Qwen3MoeConfig(**MANY, num_experts=E, norm_topk_prob=normalise),
            {"normalise": normalise},
            in_one,
        )
        for normalise in (True, False)
    },
    "DeepSeek-V2, greedy": (
        "deepseek_v2",
        "DeepseekV2Moe",
        DeepseekV2Config(**DEEPSEEK, topk_method="greedy"),
        {**V2, "scale": 2.5, "n_shared": 2},
        in_one,
    ),
    "DeepSeek-V2, groups": (
        "deepseek_v2",
        "DeepseekV2Moe",
        DeepseekV2Config(**DEEPSEEK, **GROUPED, topk_method="group_limited_greedy"),
        {**V2, **OUR_GROUPS, "scale": 2.5, "n_shared": 2},
        in_one,
    ),
    **{
        f"DeepSeek-V3, norm_topk_prob={normalise}": (
            "deepseek_v3",
            "DeepseekV3MoE",
            DeepseekV3Config(**DEEPSEEK, **GROUPED, norm_topk_prob=normalise),
            {**V3, **OUR_GROUPS, "normalise": normalise, "scale": 2.5, "n_shared": 2},
            in_one,
        )
        for normalise in (True, False)
    },
    **{
        f"Llama 4, top {top_k}": (
            "llama4",
            "Llama4TextMoe",
            Llama4TextConfig(**{**MIXTRAL, "num_experts_per_tok": top_k}),
            {
                "score": "sigmoid",
                "top_k": top_k,
                "normalise": False,
                "scale_input": True,
                "n_shared": 1,
            },
            transposed,
        )
        for top_k in (1, K)
    },
    "gpt-oss": (
        "gpt_oss",
        "GptOssMLP",
        GptOssConfig(**MIXTRAL),
        {"activation": "swiglu_clamped", "bias": True, "router_bias": True},
        interleaved,
    ),
    **{
        f"Switch, {capacity} of {TOKENS}": (
            "switch_transformers",
            "SwitchTransformersSparseMLP",
            SwitchTransformersConfig(d_model=D, d_ff=FF, num_experts=E, expert_capacity=capacity),
            {**SWITCH, "capacity_factor": capacity * E / TOKENS, "noise": 0.01},
            one_by_one,
        )
        for capacity in (5, TOKENS)
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", MODELS)
def test_equals_public_model(model, backend, dtype, device, monkeypatch):
    """Outputs and all gradients, and in double precision the public routers computed in it.

    They round scores to float32 by name; here that name stands for float64.
    """
    module, name, config, ours, in_their_names = MODELS[model]
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    tolerance = 3e-5
    if dtype == torch.float64:
        tolerance, wide = 1e-10, {"float": dtype, "float32": dtype}
        config = copy.deepcopy(config)
        monkeypatch.setattr(modeling, "torch", SimpleNamespace(**{**vars(torch), **wide}))
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    ours = settle(MoELayer(**{**SIZES, **ours}, backend=backend)).to(device, dtype).eval()
    theirs = getattr(modeling, name)(config).eval()
    theirs.load_state_dict(in_their_names(ours.state_dict()))
    theirs.to(device, dtype)
    # Enough tokens to visit every expert, and so large that gpt-oss has something to clamp.
    x = (4 * draw(B, TOKENS, D, seed=9)).to(device, dtype)

    def run_theirs(x):
        y = theirs(x)
        return (y[0] if isinstance(y, tuple) else y).view(x.shape)

    kept = ours.router(x).kept
    assert kept is None or kept.all() == (ours.router.capacity_factor == E)
    y, gradients, named = values_and_gradients(ours, ours, x)
    theirs_y, their_gradients, their_named = values_and_gradients(run_theirs, theirs, x)
    assert all(gradient.count_nonzero() for gradient in named.values())
    result = {"y": y, "x": gradients[0], **in_their_names(named)}
    expected = {"y": theirs_y, "x": their_gradients[0], **their_named}
    assert result.keys() == expected.keys()
    for name, t in expected.items():
        assert_close(result[name], t, rtol=0, atol=tolerance * t.abs().max().item())


def test_clamped_swiglu_equals_gpt_oss():
    """On both sides of every bound, values and gradients."""
    experts = GptOssExperts(GptOssConfig(**MIXTRAL))
    numbers = torch.linspace(-12, 12, 49).double()
    gate, up = torch.cartesian_prod(numbers, numbers).T
    outputs = []
    for run in (
        lambda gate, up: activate("swiglu_clamped", up, gate),
        lambda gate, up: experts._apply_gate(torch.stack([gate, up], -1))[..., 0],
    ):
        leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
        y = run(*leaves)
        outputs.append((y, torch.autograd.grad(y.sum(), leaves)))
    assert_close(*outputs)


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


def test_noise_does_not_reach_the_experts():
    """It does in the public library, in float32: there it is multiplied into the tokens."""
    layer = redraw(MoELayer(**{**SIZES, "top_k": E}, noise=0.5))
    x = draw(B, N, D)
    before = x.clone()
    with torch.no_grad():
        layer.router.proj.weight.zero_()  # all weights are equal, whatever the router sees
    assert_close(layer(x), layer.eval()(x))
    assert torch.equal(x, before)
    config = SwitchTransformersConfig(d_model=D, d_ff=FF, num_experts=E, router_jitter_noise=0.5)
    name = "transformers.models.switch_transformers.modeling_switch_transformers"
    importlib.import_module(name).SwitchTransformersSparseMLP(config).train()(x)
    assert not torch.equal(x, before)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_tokens_pass_by(backend):
    """All want the same expert, which takes the first two: the others add nothing, shared apart."""
    settings = {**SIZES, **FORMS["top 1"], "bias": True, "backend": backend}
    layer = redraw(MoELayer(**settings, capacity_factor=2 * E / N, choice_bias=True))
    layer.router.choice_bias[2] = 9
    x = draw(B, N, D)
    y, (expert,) = layer(x), list(feed_forwards(layer))[2:3]
    assert_close(y[:, :2], layer.router(x).weights[:, :2] * expert(x[:, :2]))
    assert not y[:, 2:].any()
    shared = redraw(MoELayer(**settings, n_shared=1, capacity_factor=2 * E / N, choice_bias=True))
    shared.router.choice_bias[2] = 9
    assert_close(shared(x)[:, 2:], shared.shared(x)[:, 2:])


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


def experts_choose(**settings):
    layer = redraw(MoELayer(**SIZES, **settings))
    layer.router = redraw(ExpertChoiceRouter(d_model=D, n_experts=E, top_k=K))
    return layer


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_choose_by_their_definition(backend, device):
    """Gather, run, scatter: the equations of the paper, one sequence at a time."""
    layer = experts_choose(backend=backend, bias=True).double().to(device)
    x = draw(B, N, D, seed=9).double().to(device)
    experts = [expert.to(device) for expert in feed_forwards(layer)]
    y, room = layer(x), math.ceil(N * K / E)
    assert room == 2
    for b in range(B):
        scores = layer.router.proj(x[b]).softmax(-1)
        expected = torch.zeros_like(x[b])
        gates, tokens = scores.T.topk(room)
        for i, expert in enumerate(experts):
            out = gates[i, :, None] * expert(x[b][None, tokens[i]])[0]
            expected = expected.index_add(0, tokens[i], out)
        assert_close(y[b], expected)
    routing = layer.router(x)
    assert (routing.kept.sum(1) == room).all()
    assert routing.weights is routing.scores
    y.square().sum().backward()
    assert layer.router.proj.weight.grad.any()


def test_experts_choose_by_later_tokens():
    """The leak that makes it unfit for causal models; other sequences do not matter."""
    layer, x = experts_choose(), draw(B, N, D)
    changed = x.clone()
    changed[0, -1] += 3
    moved = (layer(changed) - layer(x)).abs().amax(-1) > 1e-5
    assert moved[0, :-1].any()
    assert not moved[1:].any()


def test_experts_that_choose_have_room_for_all_with_all():
    layer = ExpertChoiceRouter(d_model=D, n_experts=E, top_k=E)
    assert layer(draw(B, N, D)).kept.all()
    assert repr(layer).startswith("ExpertChoiceRouter(\n  top_k=8\n")
    assert experts_choose().active_parameters == MoELayer(**SIZES).active_parameters


# --- the layer by its definition

FORMS = {
    "gated": {},
    "plain": {"gated": False, "activation": "relu"},
    "biased": {"bias": True, "router_bias": True},
    "plain, biased": {"gated": False, "bias": True, "activation": "gelu"},
    "shared": {"n_shared": 2, "d_ff_shared": 5, "bias": True},
    "input": {"scale_input": True, "bias": True, "score": "sigmoid"},
    "clamped": {"activation": "swiglu_clamped", "bias": True},
    "top 1": {"top_k": 1, "normalise": False},
    "all": {"top_k": E},
    "groups": {"n_groups": 4, "top_k_groups": 2, "choice_bias": True},
    "capacity": {"capacity_factor": 0.5, "scale_input": True, "bias": True},
}


def feed_forwards(layer):
    """Give every expert of a layer as a FeedForward with copies of its numbers."""
    form = {"activation": layer.activation, "gated": layer.gate_proj is not None}
    for i in range(layer.router.n_experts):
        expert = FeedForward(
            d_model=layer.d_model, d_ff=layer.d_ff, bias=layer.up_bias is not None, **form
        )
        for name in "gate", "up", "down":
            for kind, theirs in ("proj", "weight"), ("bias", "bias"):
                stack = getattr(layer, f"{name}_{kind}")
                if stack is not None:
                    getattr(getattr(expert, f"{name}_proj"), theirs).data = stack[i].detach()
        yield expert


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_sum_over_tokens_and_experts(form, backend, device):
    """Each token by itself: what its chosen feed-forwards give, weighted, and what is shared."""
    layer = settle(MoELayer(**{**SIZES, **FORMS[form]}, backend=backend)).double().to(device)
    experts = [expert.to(device) for expert in feed_forwards(layer)]
    x = draw(B, N, D, seed=9).double().to(device)
    indices, weights, *_, kept = layer.router(x)
    kept = torch.ones_like(indices, dtype=torch.bool) if kept is None else kept
    y = layer(x)
    for b in range(B):
        for n in range(N):
            token = x[b, n][None, None]
            expected = torch.zeros_like(token) if layer.shared is None else layer.shared(token)
            for place in kept[b, n].nonzero()[:, 0]:
                expert, weight = experts[indices[b, n, place]], weights[b, n, place]
                expected += expert(weight * token) if layer.scale_input else weight * expert(token)
            assert_close(y[b, n], expected[0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_backends_agree(form, dtype, device):
    """Outputs and all gradients, with PyTorch's grouped product (float32) and without."""
    naive = settle(MoELayer(**{**SIZES, **FORMS[form]}, backend="naive")).to(device, dtype)
    fast = copy.deepcopy(naive)
    fast.backend = "sorted"
    x = draw(B, N, D, seed=9).to(device, dtype)
    near = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-9, "rtol": 1e-9}
    assert_close(values_and_gradients(naive, naive, x), values_and_gradients(fast, fast, x), **near)


COUNTS = [[2, 0, 3], [0, 5, 0], [0, 0, 5], [1, 1, 3]]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [8, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_grouped_linear(dtype, width, bias, counts, device, monkeypatch):
    """Each group of rows by itself, values and gradients; one call wherever it can be one."""
    calls, product = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: calls.append(1) or product(*a, **k))
    tensors = draw(5, width), draw(3, 24, width, seed=1), draw(3, 24, seed=2)
    x, weight, biases = (t.to(device, dtype).requires_grad_() for t in tensors)
    leaves = [x, weight, biases] if bias else [x, weight]
    y = grouped_linear(*leaves, counts=torch.tensor(counts, device=device))
    rows = zip(x.split(counts), weight, biases, strict=True)
    expected = torch.cat([F.linear(t, w, b if bias else None) for t, w, b in rows])
    near = {"atol": 0.3, "rtol": 0.05} if y.itemsize == 2 else {"atol": 1e-5, "rtol": 1e-5}
    assert_close(y, expected, **near)
    gradients = (torch.autograd.grad(t.square().sum(), leaves) for t in (y, expected))
    assert_close(*gradients, **near)
    assert bool(calls) == (dtype != torch.float64 and width * y.itemsize % 16 == 0)


@pytest.mark.usefixtures("no_shape_checks")
def test_grouped_linear_knows_where_it_can_be_one_call(monkeypatch):
    """Old GPUs have no grouped product, nor have devices of other kinds."""
    for capability, able in ((7, 5), False), ((8, 0), True), ((9, 0), True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        x = SimpleNamespace(dtype=torch.bfloat16, itemsize=2, device=torch.device("cuda:0"))
        assert moe._can_group(x, torch.zeros(2, 8, 8)) is able
    x.device = torch.device("mps")
    assert not moe._can_group(x, torch.zeros(2, 8, 8))
    assert not moe._can_group(torch.zeros(5, 8), torch.zeros(2, 8, 8).mT)


def test_grouped_linear_obeys_autocast(device):
    x, weight, bias = (t.to(device) for t in (draw(5, 8), draw(2, 16, 8), draw(2, 16)))
    counts = torch.tensor([2, 3], device=device)
    with torch.autocast(device, torch.bfloat16):
        y = grouped_linear(x, weight, bias, counts=counts)
    half = (t.bfloat16() for t in (x, weight, bias))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, grouped_linear(*half, counts=counts))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_is_the_one_asked_for(backend, monkeypatch):
    assert MoELayer(**SIZES).backend == "sorted"
    monkeypatch.setitem(BACKENDS, backend, lambda layer, x, *assignments: 7 * x)
    x = draw(B, N, D)
    assert torch.equal(MoELayer(**SIZES, backend=backend)(x), 7 * x)
    others = [name for name in BACKENDS if name != backend]
    assert not any(torch.equal(MoELayer(**SIZES, backend=name)(x), 7 * x) for name in others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_experts_are_the_dense_mixture(backend, device):
    layer = redraw(MoELayer(**{**SIZES, "top_k": E}, backend=backend)).double().to(device)
    x = draw(B, N, D, seed=9).double().to(device)

    def dense(x):
        weights = layer.router.proj(x).softmax(-1)
        hidden = F.silu(torch.einsum("bnd,efd->bnef", x, layer.gate_proj))
        hidden = hidden * torch.einsum("bnd,efd->bnef", x, layer.up_proj)
        return torch.einsum("bne,bnef,edf->bnd", weights, hidden, layer.down_proj)

    assert_close(values_and_gradients(layer, layer, x), values_and_gradients(dense, layer, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_expert_is_a_feed_forward(backend):
    one = {"n_experts": 1, "top_k": 1, "normalise": False, "bias": True}
    layer = redraw(MoELayer(d_model=D, d_ff=FF, **one, backend=backend))
    (expert,) = feed_forwards(layer)
    assert_close(layer(draw(B, N, D)), expert(draw(B, N, D)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_nobody_chose(backend):
    """Their gradient is 0, and so is that of the weights of nobody's tokens."""
    layer = MoELayer(**SIZES, choice_bias=True, backend=backend)
    layer.router.choice_bias[:] = torch.tensor([0.0, 9, 0, 9, 0, 9, 0, 0])
    layer(draw(B, N, D)).square().sum().backward()
    for stack in layer.gate_proj, layer.up_proj, layer.down_proj:
        busy = stack.grad.flatten(1).any(1)
        assert busy.tolist() == [False, True, False, True, False, True, False, False]
    assert layer.router.proj.weight.grad.any()


def test_experts_nobody_chose_do_not_run(monkeypatch):
    """A model of many experts that writes one token asks only the few."""
    layer, rows = MoELayer(**SIZES, choice_bias=True), []
    layer.router.choice_bias[:] = torch.tensor([0.0, 9, 0, 9, 0, 9, 0, 0])
    monkeypatch.setattr(moe, "_can_group", lambda x, weight: False)
    monkeypatch.setattr(
        F, "linear", lambda x, *args, f=F.linear: rows.append(len(x)) or f(x, *args)
    )
    layer(draw(1, 1, D))
    assert rows == [1] * 10  # the router, and three projections of three experts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (4, 1), (2, 33)])
def test_any_shape_and_stride(batch, length, backend):
    layer = redraw(MoELayer(**SIZES, n_shared=1, backend=backend))
    x = draw(batch, length, D, seed=9)
    strided = torch.empty(length, D, batch).permute(2, 0, 1).copy_(x)
    assert strided.stride() != x.stride() or x.numel() == D
    assert_close(layer(strided), layer(x))
    repeated = x[:1].expand(3, -1, -1)
    assert_close(layer(repeated), layer(x[:1]).expand(3, -1, -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_token_by_itself(backend):
    layer, x = redraw(MoELayer(**SIZES, backend=backend)), draw(B, N, D)
    changed = x.clone()
    changed[1, 2] += 1
    moved = (layer(changed) - layer(x)).abs().amax(-1) > 1e-5
    assert moved.nonzero().tolist() == [[1, 2]]
    order = torch.randperm(N)
    assert_close(layer(x[:, order]), layer(x)[:, order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_the_place_of_a_feed_forward(backend):
    layer = MoELayer(**SIZES, backend=backend)
    block = Block(
        attention=MultiHeadAttention(d_model=D, n_heads=2), feed_forward=layer, norm=RMSNorm
    )
    x = draw(B, N, D)
    y = x + block.attention(block.attention_norm(x))
    assert_close(block(x), y + layer(block.feed_forward_norm(y)))


def test_routing_is_seen_by_a_hook():
    layer, seen = MoELayer(**SIZES), []
    layer.router.register_forward_hook(lambda module, args, routing: seen.append(routing))
    layer(draw(B, N, D))
    expected = layer.router(draw(B, N, D))
    assert all(torch.equal(a, b) for a, b in zip(seen[0][:4], expected[:4], strict=True))
    assert seen[0].kept is expected.kept is None
    shapes = [tuple(t.shape) for t in expected[:4]]
    assert shapes == [(B, N, K), (B, N, K), (B, N, E), (B, N, E)]


# --- precision


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend, form, device):
    """The dtype is kept, and the outputs are those of float32 up to its rounding."""
    half = settle(MoELayer(**{**SIZES, **FORMS[form]}, backend=backend)).to(device, torch.bfloat16)
    x = draw(B, N, D, seed=9).to(device, torch.bfloat16)
    y, wide = half(x), copy.deepcopy(half).float()(x.float())
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), wide, rtol=0.03, atol=0.03 * wide.abs().max().item())
    y.sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in half.parameters())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend, form, device):
    """Tokens choose the same experts, and outputs stay near to what float32 gives."""
    layer = settle(MoELayer(**{**SIZES, **FORMS[form]}, backend=backend)).to(device)
    x = draw(B, N, D, seed=9).to(device)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    expected = layer(x)
    assert y.dtype == torch.float32
    assert not torch.equal(y, expected)
    assert_close(y, expected, rtol=0.03, atol=0.03 * expected.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_summed_in_float32(backend):
    """1 + 1/512 - 1 is lost on the way if bfloat16 adds it up."""
    layer = MoELayer(
        d_model=1, d_ff=1, n_experts=3, top_k=3, gated=False, activation="relu", backend=backend
    )
    layer.up_proj.data.fill_(1)
    layer.down_proj.data = torch.tensor([1.0, 1 / 512, -1.0]).reshape(3, 1, 1)
    layer.router.proj.weight.data.zero_()
    y = layer.bfloat16()(torch.full((1, 1, 1), 3.0).bfloat16())
    assert y.item() == pytest.approx(1 / 512, rel=0.005)


# --- parameters


@pytest.mark.parametrize(
    ("settings", "router", "expert", "shared"),
    [
        ({}, E * D, 3 * D * FF, 0),
        ({"gated": False}, E * D, 2 * D * FF, 0),
        ({"bias": True, "router_bias": True}, E * D + E, 3 * D * FF + 2 * FF + D, 0),
        ({"bias": True, "gated": False}, E * D, 2 * D * FF + FF + D, 0),
        ({"n_shared": 2}, E * D, 3 * D * FF, 6 * D * FF),
        ({"n_shared": 2, "d_ff_shared": 5}, E * D, 3 * D * FF, 30 * D),
        (
            {"n_shared": 2, "bias": True},
            E * D,
            3 * D * FF + 2 * FF + D,
            6 * D * FF + 4 * FF + D,
        ),
        ({"choice_bias": True, "top_k": 5}, E * D, 3 * D * FF, 0),
    ],
)
def test_parameter_counts(settings, router, expert, shared):
    layer = MoELayer(**{**SIZES, **settings})
    assert sum(p.numel() for p in layer.parameters()) == router + E * expert + shared
    assert layer.active_parameters == router + settings.get("top_k", K) * expert + shared


def test_stacks_are_as_linear_layers_store_them():
    layer = MoELayer(**SIZES, bias=True)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters() if "." not in name}
    assert shapes == {
        "gate_proj": (E, FF, D),
        "up_proj": (E, FF, D),
        "down_proj": (E, D, FF),
        "gate_bias": (E, FF),
        "up_bias": (E, FF),
        "down_bias": (E, D),
    }


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_initialised_as_linear_layers(name):
    """Uniform between ±1/√(numbers that go in), each expert by itself."""
    layer = MoELayer(d_model=16, d_ff=100, n_experts=200, top_k=2, bias=True)
    bound = 0.1 if name == "down" else 0.25
    for stack in getattr(layer, f"{name}_proj"), getattr(layer, f"{name}_bias"):
        assert 0.99 * bound < stack.abs().max() <= bound
        assert_close(stack.std().item(), bound / math.sqrt(3), rtol=0.02, atol=0)
        assert not torch.equal(stack[0], stack[1])


def test_large_layers_build_on_the_meta_device():
    with torch.device("meta"):
        layer = MoELayer(d_model=2048, d_ff=768, n_experts=128, top_k=8, choice_bias=True)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert layer.active_parameters == 2048 * 128 + 8 * 3 * 2048 * 768


def test_settings_can_be_read():
    layer = MoELayer(**SIZES, scale_input=True, scale=2.5)
    assert "d_model=8, d_ff=16, activation='silu', scale_input=True, backend='sorted'" in repr(
        layer
    )
    router = "top_k=3, score='softmax', normalise=True, n_groups=1, top_k_groups=1"
    assert f"{router}, top_k_in_group=1, scale=2.5, noise=0.0, capacity_factor=None" in repr(layer)
    assert (layer.d_model, layer.router.d_model, layer.d_ff) == (D, D, FF)


# --- what is refused


def refused(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


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
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_ff": 0}, "d_ff must be an integer of at least 1; got 0"),
        ({"n_shared": -1}, "n_shared must be an integer of at least 0; got -1"),
        ({"d_ff_shared": 0}, "d_ff_shared must be an integer of at least 1; got 0"),
        (
            {"activation": "swiglu"},
            f'activation must be one of {", ".join(ACTIVATIONS)}; got "swiglu"',
        ),
        ({"backend": "fast"}, 'backend must be one of naive, sorted; got "fast"'),
    ],
)
def test_layer_settings_refused(settings, message):
    with refused(message):
        MoELayer(**{**SIZES, **settings})


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(("settings", "message"), REFUSED[:4])
def test_settings_of_experts_that_choose_refused(settings, message):
    with refused(message):
        ExpertChoiceRouter(**{**ROUTER, **settings})


def test_the_router_that_is_refused_would_not_learn():
    """Why top_k = 1 must not be normalised: the weight is 1 and its gradient 0."""
    layer = MoELayer(**{**SIZES, "top_k": 1}, normalise=False)
    layer.router.normalise = True
    assert_close(layer.router(draw(B, N, D)).weights, torch.ones(B, N, 1))
    layer(draw(B, N, D)).square().sum().backward()
    assert_close(layer.router.proj.weight.grad, torch.zeros(E, D))


FITS = "x must have shape (batch, length, d_model = 8) and not be empty; got"
KIND = "the layer and x must have the same dtype and device; got torch.float32 on cpu and"


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    "layer", [Router(**ROUTER), ExpertChoiceRouter(**ROUTER), MoELayer(**SIZES)]
)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (draw(5, 8), f"{FITS} (5, 8)"),
        (draw(3, 5, 7), f"{FITS} (3, 5, 7)"),
        (draw(3, 0, 8), f"{FITS} (3, 0, 8)"),
        (draw(3, 5, 8).double(), f"{KIND} torch.float64 on cpu"),
    ],
)
def test_tokens_refused(layer, x, message):
    with refused(message):
        layer(x)
