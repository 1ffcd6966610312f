"""Checkpoints: what is in them, what is refused, and runs against those that never stopped."""

import json
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from oracles import draw, redraw
from runs import CONFIG, IDS, PAIRS, adam, environment, loss, run, script
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from tfm_ref import (
    EncoderDecoder,
    TokenBatches,
    TransformerConfig,
    average_checkpoints,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    noam_lr,
    save_checkpoint,
)


def same(one, other):
    """Compare two runs, bit for bit: weights, moments, losses."""
    for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(a, b)
    states = [optimizer.state_dict() for _, optimizer, _ in (one, other)]
    assert json.dumps(states[0]["param_groups"]) == json.dumps(states[1]["param_groups"])
    for i, state in states[0]["state"].items():
        assert all(torch.equal(t, states[1]["state"][i][name]) for name, t in state.items())
        assert state
    return one[2] == other[2] and states[0]["state"].keys() == states[1]["state"].keys()


def test_the_mean_of_checkpoints_by_hand(tmp_path):
    states = [
        {"w": torch.tensor([x, -x]), "half": torch.tensor(x).bfloat16(), "n": torch.tensor(i)}
        for i, x in enumerate([1.0, 2.0, 6.0])
    ]
    mean = average_checkpoints(states)
    assert_close(mean["w"], torch.tensor([3.0, -3.0]))
    assert_close(mean["half"], torch.tensor(3.0).bfloat16())
    assert (mean["n"], mean["n"].dtype) == (2, torch.int64)
    mean["n"] += 1
    assert states[-1]["n"] == 2
    for i, state in enumerate(states):
        save_file(state, tmp_path / f"{i}.safetensors")
    read = average_checkpoints([tmp_path / "0.safetensors", str(tmp_path / "1.safetensors")])
    assert_close(read, average_checkpoints(states[:2]))


def test_sums_of_checkpoints_are_kept_in_float64():
    """In float32, 1 + 2^-24 is 1: of 2^24 and seven ones, the ones would be lost."""
    states = [{"w": torch.tensor([x])} for x in [2.0**24] + [1.0] * 7]
    assert average_checkpoints(states)["w"] == (2**24 + 7) / 8
    same = [{"w": draw(9)}] * 3
    assert torch.equal(average_checkpoints(same)["w"], same[0]["w"])


def test_the_mean_of_parameters_has_no_gradient():
    linear = nn.Linear(2, 2)
    assert not average_checkpoints([dict(linear.named_parameters())])["weight"].requires_grad


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"v": torch.zeros(2)}, "w is torch.float32 (2,) here and absent there; v is absent here"),
        ({"w": torch.zeros(3)}, "w is torch.float32 (2,) here and torch.float32 (3,) there"),
        ({"w": torch.zeros(2).double()}, "w is torch.float32 (2,) here and torch.float64 (2,)"),
    ],
)
def test_checkpoints_that_do_not_agree(other, message):
    message = "checkpoints must have the same tensors: " + message
    with pytest.raises(ValueError, match=re.escape(message)):
        average_checkpoints([{"w": torch.zeros(2)}, other])


def test_no_checkpoints():
    with pytest.raises(
        ValueError, match="the number of checkpoints must be an integer of at least"
    ):
        average_checkpoints([])


def killed_at(step):
    """Make a loss that fails at its step-th call."""
    calls = []

    def failing(model, batch):
        calls.append(0)
        if len(calls) == step:
            raise KeyboardInterrupt
        return loss(model, batch)

    return failing


@pytest.mark.parametrize("step", range(1, 9))
def test_a_run_that_is_stopped_at_any_step_goes_on_as_if_it_had_not(step, tmp_path):
    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(folder=tmp_path, loss=killed_at(step))
    steps = [path.name for path in sorted(tmp_path.iterdir())]
    assert steps == [f"step-{i:08}" for i in (3, 6) if i < step]
    torch.rand(step)
    assert same(run(folder=tmp_path, weights=step if steps else 0), whole)
    again = run(folder=tmp_path)  # has nothing left to do
    assert same(again, whole)
    assert again[0].training


@pytest.mark.parametrize("name", ["mkdir", "save_file", "write_text", "rename"])
@pytest.mark.parametrize("last", [False, True])
def test_a_checkpoint_is_whole_or_not_there(name, last, tmp_path, monkeypatch):
    """Whenever writing stops, before or after a file is written, the last whole one is found."""
    whole = run()
    place = checkpoints if name == "save_file" else Path
    real, calls = getattr(place, name), []

    def failing(*args, **terms):
        calls.append(0)
        if len(calls) == 2 and not last:
            raise KeyboardInterrupt
        result = real(*args, **terms)
        if len(calls) == (4 if name == "save_file" else 2):
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(place, name, failing)
        with pytest.raises(KeyboardInterrupt):
            run(folder=tmp_path)
    for path in tmp_path.glob("step-????????"):
        assert sorted(p.name for p in path.iterdir()) == [
            *("model.safetensors", "optimizer.safetensors", "record.json")
        ]
        json.loads((path / "record.json").read_text("utf-8"))
    assert same(run(folder=tmp_path), whole)
    assert not list(tmp_path.glob("*.part"))


def test_a_process_that_is_killed_goes_on_bit_for_bit(tmp_path):
    """SIGKILL comes from outside at a moment that nobody chose, dropout and all."""
    path = script(
        tmp_path,
        """
        def slow(model, batch):
            time.sleep(0.03)
            return loss(model, batch)
        if __name__ == "__main__":
            train(loss=slow, dropout=0.2, folder=sys.argv[1])
        """,
    )
    folder = tmp_path / "folder"
    with subprocess.Popen([sys.executable, path, folder], env=environment()) as process:
        wanted, end = random.randint(2, 12), time.monotonic() + 60
        while not (folder / f"step-{wanted:08}").exists() and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert wanted <= len(list(folder.glob("step-????????"))) < 30
    train = runpy.run_path(str(path))["train"]
    resumed = train(dropout=0.2, folder=folder)
    assert resumed == train(dropout=0.2)
    assert len(resumed[0]) == 30


def test_what_is_in_a_checkpoint(tmp_path):
    model, _, losses = run(folder=tmp_path)
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == ["step-00000003", "step-00000006", "step-00000008"]
    path = latest_checkpoint(tmp_path)
    assert path == tmp_path / "step-00000008"
    weights, moments = (load_file(path / f"{n}.safetensors") for n in ("model", "optimizer"))
    assert weights.keys() == dict(model.named_parameters()).keys()  # what is tied, once
    assert "embedding.tokens.weight" in weights
    assert moments["0.step"] == 8
    record = json.loads((path / "record.json").read_text("utf-8"))
    assert (record["step"], record["losses"]) == (8, losses)
    first = len(TokenBatches(pairs=PAIRS[:20], max_tokens=40, **IDS).rows(0))
    assert (record["epoch"], record["batch"]) == (1, 8 - first)
    assert record["settings"]["seed"] == 0

    other = redraw(EncoderDecoder(CONFIG))
    assert load_checkpoint(path, other) == record
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in other.state_dict().items())
    assert other.head.proj.weight is other.embedding.tokens.weight
    assert latest_checkpoint(tmp_path / "nothing") is None
    paths = sorted(tmp_path.iterdir())
    load_weights(other, average_checkpoints(paths))
    name = "embedding.tokens.weight"
    tables = [load_file(path / "model.safetensors")[name].double() for path in paths]
    assert torch.equal(other.head.proj.weight, (sum(tables) / 3).float())
    assert other.head.proj.weight is other.embedding.tokens.weight


def test_weights_of_another_model_are_refused():
    linear, tensors = nn.Linear(2, 1), {"weight": torch.zeros(1, 2), "more": torch.zeros(1)}
    message = (
        "weights must be of the same model: bias is torch.float32 (1,) here and absent there; "
        "more is absent here and torch.float32 (1,) there"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load_weights(linear, tensors)
    assert linear.weight.all()


def test_buffers_and_counters_are_kept(tmp_path):
    norm = nn.BatchNorm1d(3)
    norm(draw(5, 3))
    save_checkpoint(tmp_path / "a", norm, torch.optim.SGD(norm.parameters()), {})
    other = nn.BatchNorm1d(3)
    load_checkpoint(tmp_path / "a", other)
    assert torch.equal(other.running_mean, norm.running_mean)
    assert other.num_batches_tracked == 1


def test_turned_weights_can_be_written(tmp_path):
    linear = nn.Linear(3, 2)
    linear.weight = nn.Parameter(draw(3, 2).T)
    optimizer = torch.optim.Adam(linear.parameters())
    linear(draw(1, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "a", linear, optimizer, {})
    other = nn.Linear(3, 2)
    load_checkpoint(tmp_path / "a", other, torch.optim.Adam(other.parameters()))
    assert torch.equal(other.weight, linear.weight)


WIDER = TransformerConfig(**{**vars(CONFIG), "d_ff": 13})
PRE = TransformerConfig(**{**vars(CONFIG), "dropout": 0.3})
UNTIED = TransformerConfig(**{**vars(CONFIG), "tied_embeddings": False})


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1.0)


def no_decay_for_some(model):
    first, *others = model.parameters()
    groups = [{"params": [first]}, {"params": others}]
    return torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-9)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (
            {"config": WIDER},
            "the same model: encoder.blocks.0.feed_forward.up_proj.weight is torch.float32 (13, 8) "
            "here and torch.float32 (12, 8) there; ",
        ),
        (
            {"config": UNTIED},
            "the same model: head.proj.weight is torch.float32 (70, 8) here and absent there",
        ),
        ({"config": PRE}, "the same run: config.dropout is 0.3 here and 0.2 there"),
        ({"seed": 1}, "the same run: seed is 1 here and 0 there"),
        ({"max_norm": None}, "the same run: max_norm is None here and 1.0 there"),
        ({"optimizer": sgd}, "the same run: optimizer is SGD here and Adam there"),
        (
            {"optimizer": lambda model: torch.optim.Adam(model.parameters())},
            "the same run: betas of group 0 is [0.9, 0.999] here and [0.9, 0.98] there; "
            "eps of group 0 is 1e-08 here and 1e-09 there",
        ),
        ({"optimizer": no_decay_for_some}, "the same run: params of group 0 is 1 here and "),
        ({"lr": partial(noam_lr, d_model=8, warmup=9)}, "the same run: lr of group 0 is "),
        ({"lr": None}, "the same run: lr of group 0 is 0.001 here and 0.1"),
        (
            {"settings": {"data": "b"}},
            "the same run: settings is {'data': 'b'} here and {'data': 'a'} there",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(terms, message, tmp_path):
    terms = {"settings": {"data": "a"}, "folder": tmp_path} | terms
    run(3, folder=tmp_path, settings={"data": "a"})
    with pytest.raises(ValueError, match=re.escape("must be of " + message)):
        run(**terms)


def test_a_refused_checkpoint_changes_nothing(tmp_path):
    run(3, folder=tmp_path)
    model = redraw(EncoderDecoder(CONFIG))
    optimizer, before = adam(model), [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="same run"):
        load_checkpoint(latest_checkpoint(tmp_path), model, optimizer, {"seed": 1})
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert not optimizer.state


def test_a_run_may_be_made_longer_but_not_shorter(tmp_path):
    whole = run(8)
    run(5, folder=tmp_path)
    assert same(run(8, folder=tmp_path), whole)
    with pytest.raises(ValueError, match="n_steps must be an integer of at least 8; got 5"):
        run(5, folder=tmp_path)
