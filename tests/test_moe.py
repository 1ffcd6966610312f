"""Mixtures of experts against the public models, by hand, and what they refuse."""

import copy
import importlib
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mixtures import FF, ROUTER, SIZES, TOKENS, B, D, E, K, N, feed_forwards, refused, settle
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

from tfm_ref import (
    Block,
    ExpertChoiceRouter,
    MoELayer,
    MultiHeadAttention,
    RMSNorm,
    Router,
    grouped,
)
from tfm_ref.layers import ACTIVATIONS, activate
from tfm_ref.moe import BACKENDS

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
    monkeypatch.setattr(grouped, "_can_group", lambda x, weight: False)
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
