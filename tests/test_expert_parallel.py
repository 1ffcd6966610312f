"""Experts in several processes against the whole layer in one; torchrun starts this file, too."""

import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracles import draw, redraw, values_and_gradients
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from tfm_ref import (
    DecoderLM,
    ExpertChoiceRouter,
    ExpertParallel,
    Experts,
    MoELayer,
    TransformerConfig,
    bytes_sent,
    expert_shares,
    fit,
    label_smoothed_cross_entropy,
    latest_checkpoint,
    load_checkpoint,
    whole_state_dict,
)
from tfm_ref.expert_parallel import Exchange

ROOT = Path(__file__).parents[1]
D, E = 6, 8
SIZES = {"d_model": D, "d_ff": 5, "n_experts": E, "top_k": 2}
SHAPES = [(1, 1), (3, 7), (2, 4), (1, 5)]
"""Batch and length in each process."""

# Settings of the layer, and the experts that no token may choose.
CASES = {
    "plain": ({}, ()),
    "one expert per token": ({"top_k": 1, "normalise": False}, ()),
    "all experts per token": ({"top_k": E}, ()),
    "shared experts": ({"n_shared": 2, "d_ff_shared": 3}, ()),
    "biases, no gate": ({"bias": True, "gated": False, "activation": "gelu", "n_shared": 1}, ()),
    "biases and gate": ({"bias": True}, ()),
    "weights on what goes in": (
        {"scale_input": True, "score": "sigmoid", "normalise": False, "bias": True},
        (),
    ),
    "groups": (
        {"score": "sigmoid", "choice_bias": True, "n_groups": 4, "top_k_groups": 2, "scale": 2.5},
        (),
    ),
    "little room": ({"capacity_factor": 0.5}, ()),
    "experts choose": ({}, ()),
    "empty experts": ({"router_bias": True}, (0, 3, 6)),
    "experts of the first process only": ({"router_bias": True}, range(2, E)),
    "experts of the last process only": ({"router_bias": True}, range(6)),
}
CONFIG = TransformerConfig(
    **{"vocab_size": 11, "d_model": D, "n_layers": 2, "n_heads": 1},
    experts=Experts(n_experts=E, top_k=2, d_ff=5, n_shared=1),
    tied_embeddings=False,
)
BATCHES = [torch.arange(i, i + 7 * 6).view(7, 6) ** 2 % 11 for i in range(4)]
MAX_NORM = 0.5


def build(name):
    settings, avoided = CASES[name]
    layer = MoELayer(**SIZES | settings)
    if name == "experts choose":
        layer.router = ExpertChoiceRouter(d_model=D, n_experts=E, top_k=2)
    layer = redraw(layer.double())
    with torch.no_grad():
        if getattr(layer.router, "choice_bias", None) is not None:
            layer.router.choice_bias.copy_(draw(E))
        for expert in avoided:
            layer.router.proj.bias[expert] = -100
    return layer


def tokens(rank):
    return draw(*SHAPES[rank], D, seed=rank).double()


def model():
    return redraw(DecoderLM(CONFIG).double())


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def loss(model, batch):
    return label_smoothed_cross_entropy(model(batch[:, :-1]), batch[:, 1:])


# --- what runs in each process


class Counter:
    """Count the bytes that go to each process of a group."""

    def __init__(self):
        self.real = dist.all_to_all_single
        dist.all_to_all_single = self
        self.rows = []

    def __call__(self, y, x, got, sent, group):
        self.rows.append([part.numel() * part.element_size() for part in x.split(sent)])
        return self.real(y, x, got, sent, group)

    def take(self):
        rows, self.rows = self.rows, []
        return torch.tensor(rows).sum(0)


def kept(routing):
    """Give the experts that are visited."""
    return routing.indices if routing.kept is None else routing.indices[routing.kept]


def run_case(name, rank, group=None):
    counter = Counter()
    layer, forward = ExpertParallel(build(name), group=group), []

    def run(x):
        y = layer(x)
        forward.append(counter.take())
        return y

    y, (of_x,), gradients = values_and_gradients(run, layer, tokens(rank))
    dist.all_to_all_single = counter.real
    return {
        "y": y.detach(),
        "of_x": of_x,
        "gradients": gradients,
        "shares": [*expert_shares(layer)],
        "forward": forward[0],
        "backward": counter.take(),
        "indices": kept(layer.router(tokens(rank))),
    }


def message(run, *args, **terms):
    begin = time.monotonic()
    try:
        run(*args, **terms)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begin
    return "nothing was raised", 0


def shared_out(net):
    """Let each process keep its share of the experts."""
    for block in net.stack.blocks:
        block.feed_forward = ExpertParallel(block.feed_forward)
    return net


def train(rank, world):
    """Do what fit does, with experts in shares."""
    net = shared_out(model())
    optimizer, own = adam(net), {*expert_shares(net).values()}
    for batch in BATCHES:
        optimizer.zero_grad()
        total, n_tokens = loss(net, batch[rank::world])
        total.backward()
        numbers = torch.tensor([n_tokens, 0.0], dtype=torch.float64)
        for p in net.parameters():
            if p not in own:
                dist.all_reduce(p.grad)
            numbers[1] += p.grad.square().sum() if p in own or rank == 0 else 0
        dist.all_reduce(numbers)
        n_tokens, squares = numbers.tolist()
        for p in net.parameters():
            p.grad *= min(1, MAX_NORM / (squares**0.5 / n_tokens + 1e-6)) / n_tokens
        optimizer.step()
    return net


def checkpoints(rank, net):
    """Give the whole state, after it has been through a share that was built from nothing."""
    whole = whole_state_dict(net)
    with torch.device("meta"):
        other = shared_out(DecoderLM(CONFIG).double())
    other.to_empty(device="cpu").load_state_dict(whole)
    same = [torch.equal(*pair) for pair in zip(net.parameters(), other.parameters(), strict=True)]
    own = net.state_dict()
    for p in other.parameters():
        p.data.zero_()
    other.load_state_dict(own)
    same += [torch.equal(*pair) for pair in zip(net.parameters(), other.parameters(), strict=True)]
    return {"whole": whole, "same": same, "names": [*expert_shares(net)]}


OPTIONS = {"n_steps": len(BATCHES), "max_norm": MAX_NORM, "device": "cpu", "every": 3}


def fitted(folder, net=None, batches=BATCHES, loss=loss, **options):
    """Train by fit; give losses and weights, as one process would have them."""
    if net is None:
        net = shared_out(model()) if dist.is_initialized() else model()
    terms = {**OPTIONS, "folder": folder, "optimizer": adam(net), **options}
    losses = fit(net, lambda epoch: batches, loss, **terms)
    return losses, whole_state_dict(net)


def few_rows(world):
    """Give batches with rows for half of the processes."""
    return [batch[: world // 2] for batch in BATCHES]


def by_fit(folder, rank, pair):
    """Run through, be stopped and go on; with weights and rows that differ, or that lack."""
    drawn = model()
    if rank:  # what is in all processes is taken from the first
        for p in {*drawn.parameters()} - {*stacks(drawn)}:
            p.data.zero_()
    result = {"whole": fitted(folder / "whole", net=shared_out(drawn))}
    result["refused"] = message(fitted, None, loss=lambda *args: (loss(*args)[0], 0))[0]
    fitted(folder / "stopped", n_steps=2)
    other = shared_out(model())
    for p in other.parameters():
        p.data.zero_()
    result["resumed"] = fitted(folder / "stopped", net=other)
    result["few rows"] = fitted(None, batches=few_rows(dist.get_world_size()))
    loaded = shared_out(model().requires_grad_(False))
    load_checkpoint(latest_checkpoint(folder / "alone"), loaded)
    result["loaded"] = whole_state_dict(loaded)
    pairs = model()
    pairs.stack.blocks[0].feed_forward = ExpertParallel(
        pairs.stack.blocks[0].feed_forward, group=pair
    )
    result["in pairs"] = message(fitted, None, net=pairs)[0]
    return result


def stacks(net):
    """Give the parameters that belong to single experts."""
    layers = [block.feed_forward for block in net.stack.blocks]
    return [p for layer in layers for p in layer.parameters(recurse=False)]


def everything(rank, world, folder):
    short = dist.new_group([world - 2, world - 1], timeout=timedelta(seconds=1))
    pairs = [dist.new_group(range(i, i + 2)) for i in range(0, world, 2)]
    result = {name: run_case(name, rank) for name in CASES}
    result["in pairs"] = run_case("plain", rank, pairs[rank // 2])
    share = ExpertParallel(build("plain"), group=pairs[rank // 2])
    result["whole in pairs"] = whole_state_dict(share)
    others = dist.new_group([0])
    if rank:
        result["not in the group"] = message(ExpertParallel, build("plain"), group=others)[0]
    result["checkpoint"] = checkpoints(rank, train(rank, world))
    result["fit"] = by_fit(folder, rank, pairs[rank // 2])
    half = MoELayer(**SIZES, bias=True).bfloat16()
    x = tokens(rank).bfloat16()
    result["half"] = half.state_dict(), x, ExpertParallel(redraw(half))(x)
    frozen = ExpertParallel(build("plain").requires_grad_(False))
    result["frozen"] = [p.requires_grad for p in frozen.parameters()]
    for n_experts in 1, world + 1, E + world - 1:
        layer = MoELayer(**SIZES | {"n_experts": n_experts, "top_k": 1}, normalise=False)
        result[n_experts] = message(ExpertParallel, layer)[0]

    if rank == world - 2:
        late = ExpertParallel(build("plain"), group=short)
        result["late"] = message(late, tokens(rank))
    dist.barrier()
    if rank < world - 1:
        result["gone"] = message(ExpertParallel(build("plain")), tokens(rank))
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    rank, folder = dist.get_rank(), Path(sys.argv[1])
    torch.save(everything(rank, dist.get_world_size(), folder), folder / f"{rank}.pt")
    os._exit(0)  # the last is the first to go, and leaves the others to their exchange


# --- what is expected of them


@pytest.fixture(scope="module", params=[2, 4])
def processes(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    fitted(folder / "alone")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={request.param}", __file__, folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    shown = {"capture_output": True, "text": True}
    result = subprocess.run(command, env=environment, timeout=120, **shown)
    assert result.returncode == 0, result.stderr
    results = [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]
    for result in results:
        result["folder"] = folder
    return results


def compare(results, layer, xs):
    """Hold outputs and gradients of a group against those of the whole layer."""
    xs = [x.requires_grad_() for x in xs]
    ys = [layer(x) for x in xs]
    parameters = dict(layer.named_parameters())
    total = sum(y.square().sum() for y in ys)
    of_xs = torch.autograd.grad(total, [*xs, *parameters.values()])
    gradients = dict(zip(parameters, of_xs[len(xs) :], strict=True))
    exactly = {"rtol": 0, "atol": 1e-12}
    for result, y, of_x in zip(results, ys, of_xs, strict=False):
        assert_close(result["y"], y, **exactly)
        assert_close(result["of_x"], of_x, **exactly)
        assert result["shares"] == [n for n, _ in layer.named_parameters(recurse=False)]
        assert result["gradients"].keys() == gradients.keys()
    for name, expected in gradients.items():
        parts = [result["gradients"][name] for result in results]
        whole = torch.cat(parts) if name in result["shares"] else sum(parts)
        assert_close(whole, expected, rtol=1e-12, atol=1e-12)
    indices = [result["indices"] for result in results]
    sent = bytes_sent(indices, n_experts=E, d_model=D, dtype=torch.float64)
    assert torch.equal(torch.stack([result["forward"] for result in results]), sent)
    counts = 8 * E // len(results)
    assert torch.equal(torch.stack([result["backward"] for result in results]), sent - counts)


@pytest.mark.parametrize("name", CASES)
def test_many_processes_are_one(processes, name):
    """Values, gradients, and what is sent where."""
    xs = [tokens(rank) for rank in range(len(processes))]
    compare([result[name] for result in processes], build(name), xs)


def test_cases_are_what_they_say(processes):
    for name, (_, avoided) in CASES.items():
        visited = torch.cat([result[name]["indices"].flatten() for result in processes])
        loads = visited.bincount(minlength=E)
        assert not loads[[*avoided]].any(), name
        assert (
            avoided
            or len(loads.unique()) > 2
            or name in ("all experts per token", "experts choose")
        )
    sent = torch.stack([r["experts of the first process only"]["backward"] for r in processes])
    assert not sent[1:, 1:].any()
    assert sent[0].all()


def test_a_group_of_some_processes(processes):
    for first in range(0, len(processes), 2):
        both = [processes[rank]["in pairs"] for rank in (first, first + 1)]
        compare(both, build("plain"), [tokens(first), tokens(first + 1)])
    for result in processes:
        state, expected = result["whole in pairs"], build("plain").state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], t) for name, t in expected.items())


def test_training_with_the_rest_all_reduced_is_training_in_one_process(processes):
    net = model()
    options = {"n_steps": len(BATCHES), "max_norm": MAX_NORM, "device": "cpu"}
    fit(net, lambda epoch: BATCHES, loss, optimizer=adam(net), **options)
    for result in processes:
        state = result["checkpoint"]["whole"]
        assert state.keys() == net.state_dict().keys()
        for name, t in net.state_dict().items():
            assert_close(state[name], t, rtol=0, atol=1e-10)


def test_fit_is_training_in_one_process(processes):
    """Clipped, stopped and resumed, with rows for half of the processes; and its checkpoints."""
    near = {"rtol": 0, "atol": 1e-10}
    folder = processes[0]["folder"]
    losses, state = fitted(None)
    few = fitted(None, batches=few_rows(len(processes)))
    for result in processes:
        for name, expected in {
            "whole": (losses, state),
            "resumed": (losses, state),
            "few rows": few,
        }.items():
            assert_close(result["fit"][name][0], expected[0], **near)
            assert_close(result["fit"][name][1], dict(expected[1]), **near)
        assert result["fit"]["resumed"][0] == result["fit"]["whole"][0]
        again = zip(
            *(result["fit"][name][1].values() for name in ("whole", "resumed")), strict=True
        )
        assert all(torch.equal(*pair) for pair in again)  # bit for bit
        assert_close(result["fit"]["loaded"], dict(state), **near)
    for name in "model", "optimizer":
        alone, shared = (
            load_file(latest_checkpoint(folder / run) / f"{name}.safetensors")
            for run in ("alone", "stopped")
        )
        assert_close(shared, alone, **near)
    assert sorted(path.name for path in (folder / "stopped").iterdir()) == [
        f"step-{step:08}" for step in (2, 3, 4)
    ]


def test_a_run_of_shares_goes_on_in_one_process(processes):
    """As far as the weights: what is left to do would be another run."""
    net = model()
    load_checkpoint(latest_checkpoint(processes[0]["folder"] / "whole"), net)
    assert_close(dict(net.state_dict()), processes[0]["fit"]["whole"][1], rtol=0, atol=0)


def test_fit_refuses_in_all_processes(processes):
    for result in processes:
        assert result["fit"]["refused"] == (
            "ValueError: a batch must have at least one token that counts; got 0"
        )
        expected = "ValueError: experts must lie in all processes (4); got a layer in 2"
        assert len(processes) == 2 or result["fit"]["in pairs"] == expected


def test_checkpoints_are_those_of_one_process(processes):
    for result in processes:
        assert all(result["checkpoint"]["same"])
        stacks = "up_proj", "down_proj", "up_bias", "down_bias"
        blocks = range(CONFIG.n_layers)
        names = [f"stack.blocks.{i}.feed_forward.{stack}" for i in blocks for stack in stacks]
        assert result["checkpoint"]["names"] == names


def test_half_precision(processes):
    for result in processes:
        state, x, y = result["half"]
        layer = MoELayer(**SIZES, bias=True).bfloat16()
        layer.load_state_dict(state)
        assert y.dtype == torch.bfloat16
        assert_close(y, layer(x))


def test_what_is_frozen_stays_frozen(processes):
    assert not any(any(result["frozen"]) for result in processes)


def test_experts_that_cannot_be_shared_out(processes):
    world = len(processes)
    for n_experts in 1, world + 1, E + world - 1:
        expected = (
            f"ValueError: n_experts ({n_experts}) must be divisible by the number of processes "
            f"({world})"
        )
        assert all(result[n_experts] == expected for result in processes)


def test_a_process_that_is_not_in_the_group(processes):
    expected = "ValueError: the number of processes must be an integer of at least 1; got -1"
    assert all(result["not in the group"] == expected for result in processes[1:])


def ends(rank, world):
    return (
        f"RuntimeError: process {rank} of {world} could not exchange tokens: another has ended, "
        "or did not come before the timeout of the group"
    )


def test_if_a_process_has_ended_the_others_end(processes):
    for rank, result in enumerate(processes[:-1]):
        text, seconds = result["gone"]
        assert text == ends(rank, len(processes))
        assert seconds < 15


def test_if_a_process_does_not_come_the_others_end(processes):
    """In a group of the last two, with a timeout of a second."""
    text, seconds = processes[-2]["late"]
    assert text == ends(0, 2)
    assert 0.9 < seconds < 15


# --- in one process


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", CASES)
def test_one_process(name):
    """Here the shapes are checked, too."""
    compare([run_case(name, 0)], build(name), [tokens(0)])


@pytest.mark.usefixtures("alone")
def test_the_share_is_a_copy():
    whole = build("shared experts")
    layer = ExpertParallel(whole)
    layer.up_proj.data.zero_()
    assert whole.up_proj.all()
    assert layer.router is whole.router
    assert "experts=0:8, activation='silu', scale_input=False" in repr(layer)


@pytest.mark.usefixtures("alone")
def test_half_precision_bit_for_bit():
    """Tokens are weighed, then rounded; all outputs are summed in float32."""
    terms = {"scale_input": True, "score": "sigmoid", "normalise": False, "n_shared": 1}
    whole = redraw(MoELayer(**SIZES | {"top_k": E}, **terms)).bfloat16()
    x = tokens(1).bfloat16()
    assert torch.equal(ExpertParallel(whole)(x), whole(x))


@pytest.mark.usefixtures("alone")
def test_rows_that_are_not_contiguous():
    x = draw(3, 4).T.requires_grad_()
    y = Exchange.apply(x, [4], [4], None)
    assert torch.equal(y, x)
    weights = draw(3, 4, seed=1).T
    assert torch.equal(torch.autograd.grad(y, x, weights)[0], weights)


@pytest.mark.usefixtures("alone")
def test_second_gradients():
    whole = build("plain")
    layer, x = ExpertParallel(whole), tokens(1).requires_grad_()

    def second(run):
        (first,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    assert_close(second(layer), second(whole))


@pytest.mark.usefixtures("alone")
def test_tokens_that_do_not_fit(no_shape_checks):
    layer = ExpertParallel(build("plain"))
    with pytest.raises(ValueError, match=r"x must have shape \(batch, length, d_model = 6\)"):
        layer(torch.zeros(2, 0, D).double())


def test_processes_must_be_joined():
    message = "ExpertParallel needs processes that are joined: start the script by torchrun"
    with pytest.raises(RuntimeError, match=message):
        ExpertParallel(build("plain"))


def test_a_model_without_shares():
    linear = nn.Linear(2, 2)
    assert expert_shares(linear) == {}
    assert whole_state_dict(linear).keys() == linear.state_dict().keys()


def test_bytes_by_hand():
    """Two processes, four experts, rows of 3 × 2 bytes, and 2 × 8 bytes of counts."""
    indices = [torch.tensor([[[0, 1], [0, 2]]]), torch.tensor([[[3, 2]]])]
    sent = bytes_sent(indices, n_experts=4, d_model=3, dtype=torch.bfloat16)
    assert sent.tolist() == [[16 + 2 * 18, 16 + 6], [16 + 6, 16 + 2 * 12]]


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (0, "the number of processes must be an integer of at least 1; got 0"),
        (2, "n_experts (3) must be divisible by the number of processes (2)"),
    ],
)
def test_bytes_refuse(world, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        bytes_sent([torch.tensor([0])] * world, n_experts=3, d_model=1, dtype=torch.float32)


@pytest.mark.parametrize("index", [-1, 4])
def test_bytes_of_an_expert_that_is_none_are_not_counted(index):
    message = f"indices must lie in 0 <= index < n_experts (4); got {min(index, 2)} to "
    with pytest.raises(ValueError, match=re.escape(message)):
        bytes_sent([torch.tensor([2, index])], n_experts=4, d_model=1, dtype=torch.float32)
