"""Training against the plain loop, against one process, and against a run that never stopped."""

import json
import math
import re
import runpy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from runs import CONFIG, IDS, PAIRS, adam, environment, loss, run, script
from torch import nn
from torch.testing import assert_close

from tfm_ref import (
    DecoderLM,
    EncoderDecoder,
    TokenBatches,
    TransformerConfig,
    fit,
    label_smoothed_cross_entropy,
    noam_lr,
    set_seed,
    training,
)


def test_seeds():
    drawn = []
    for numbers in (0,), (1,), (0, 1), (1, 0), (0, 1):
        set_seed(*numbers)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[2], drawn[4])
    assert len({tuple(x.tolist()) for x in drawn}) == 4


def test_fit_is_the_plain_loop():
    """Without dropout, by hand: the mean of the tokens, clipping, the learning rate."""
    config = TransformerConfig(**{**vars(CONFIG), "dropout": 0.0})
    model, _, losses = run(config=config, max_norm=0.5, dtype=torch.float64)
    set_seed(0)
    other = EncoderDecoder(config).double().train()
    optimizer = adam(other)
    batches = TokenBatches(pairs=PAIRS[:20], max_tokens=40, **IDS)
    stream = [batch for epoch in range(3) for batch in batches(epoch)]
    expected = []
    for step, batch in enumerate(stream[:8], 1):
        optimizer.param_groups[0]["lr"] = noam_lr(step, d_model=8, warmup=4)
        logits = other(batch.source, batch.target_in, source_mask=batch.source_mask)
        mean = F.cross_entropy(
            logits.flatten(0, 1), batch.target_out.flatten(), label_smoothing=0.1
        )
        optimizer.zero_grad()
        mean.backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        expected.append(mean.item())
        assert norm > 0.5
    assert_close(losses, expected, rtol=1e-12, atol=0)
    assert all(type(value) is float for value in losses)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=1e-10)


def test_the_optimizers_own_rate_and_no_bound():
    steps = [torch.ones(1, 1), 3 * torch.ones(1, 1)]
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()
    sgd = torch.optim.SGD(model.parameters(), lr=0.25)
    losses = fit(
        model,
        lambda epoch: [steps[epoch]],
        lambda model, x: ((model(x) - 8).sum().abs(), 1),
        optimizer=sgd,
        n_steps=2,
    )
    assert losses == [8.0, 8 - 0.25 * 3]
    assert model.weight.item() == 0.25 + 0.25 * 3


def test_what_the_random_numbers_of_a_step_follow_from():
    drawn = {}

    def noted(name):
        def noting(model, batch):
            drawn.setdefault(name, []).append(torch.rand(1).item())
            return loss(model, batch)

        return noting

    run(4, loss=noted("one"), weights=1)
    run(4, loss=noted("two"), weights=2)
    run(4, loss=noted("three"), seed=1)
    assert drawn["one"] == drawn["two"]
    assert len({*drawn["one"], *drawn["three"]}) == 8


def test_fit_trains_a_decoder_on_tensors_and_leaves_out_what_has_no_gradient():
    config = TransformerConfig(vocab_size=5, d_model=8, n_layers=1, n_heads=2, d_ff=16)
    model, tokens = DecoderLM(config).eval(), torch.arange(12).view(2, 6) % 5
    unused = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([*model.parameters(), unused], lr=0.03)
    losses = fit(
        model,
        lambda epoch: [tokens],
        lambda model, x: label_smoothed_cross_entropy(model(x[:, :-1]), x[:, 1:], smoothing=0.0),
        optimizer=optimizer,
        n_steps=60,
        device="cpu",
    )
    assert losses[-1] < 0.05 < 1 < losses[0]
    assert model.training
    assert unused == 1


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"n_steps": 0}, "n_steps must be an integer of at least 1; got 0"),
        ({"every": 0}, "every must be an integer of at least 1; got 0"),
        ({"max_norm": 0.0}, "max_norm must be above 0; got 0.0"),
        ({"max_norm": math.nan}, "max_norm must be above 0; got nan"),
        (
            {"optimizer": lambda model: adam(EncoderDecoder(CONFIG))},
            "the loss must depend on parameters of the optimizer; it has none of them",
        ),
        (
            {"batches": lambda epoch: []},
            "an epoch must have at least one batch; got none in epoch 0",
        ),
        (
            {"loss": lambda model, batch: (loss(model, batch)[0], 0)},
            "a batch must have at least one token that counts; got 0",
        ),
        (
            {"loss": lambda model, batch: (loss(model, batch)[0] * torch.nan, 1)},
            "the loss must be a finite number; got nan at step 1",
        ),
        (
            {"loss": lambda model, batch: (loss(model, batch)[0] + torch.inf, 1)},
            "the loss must be a finite number; got inf at step 1",
        ),
    ],
)
def test_fit_refuses(terms, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(**{"folder": tmp_path} | terms)
    assert not list(tmp_path.iterdir())


def test_the_cpu_computes_in_the_dtype_of_the_weights():
    def checked(model, batch):
        assert model(batch.source, batch.target_in).dtype == torch.float32
        return loss(model, batch)

    run(1, loss=checked)


def test_batches_that_can_be_had_only_once_are_refused():
    batches = iter(list(TokenBatches(pairs=PAIRS[:20], max_tokens=40, **IDS)(0)))
    with pytest.raises(ValueError, match="got none in epoch 1"):
        run(batches=lambda epoch: batches)


def test_the_device_is_the_gpu_of_the_process_if_there_is_one(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for there, expected in (True, "cuda:0"), (False, "cpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert training._own(None) == torch.device(expected)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for named, expected in ("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu"):
        assert training._own(named) == torch.device(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_fit_on_cuda(tmp_path):
    dtypes = set()

    def noting(model, batch):
        logits = model(batch.source, batch.target_in, source_mask=batch.source_mask)
        dtypes.add((logits.dtype, logits.device.type))
        return label_smoothed_cross_entropy(logits, batch.target_out)

    model, _, losses = run(loss=noting, device=None)
    assert dtypes == {(torch.bfloat16, "cuda")}
    assert model.head.proj.weight.dtype == torch.float32
    assert_close(losses, run()[2], rtol=0.1, atol=0)
    assert len(run(6, folder=tmp_path, device="cuda")[2]) == 6
    assert len(run(8, folder=tmp_path, device="cuda")[2]) == 8


def test_the_first_process_alone_shows_a_bar(monkeypatch):
    shown = []
    monkeypatch.setattr(training, "progress", lambda steps: shown.append(steps) or steps)
    run(2)
    assert shown == [range(1, 3)]
    monkeypatch.setattr(training, "_processes", lambda *_: (1, 1))
    run(2)
    assert len(shown) == 1


def torchrun(path, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    shown = {"capture_output": True, "text": True}
    return subprocess.run([*command, path, *args], env=environment(), timeout=120, **shown)


def test_two_processes_are_one(tmp_path):
    """Gradients are those of the mean over all tokens, though shares are uneven or empty.

    The second process begins with other weights, does not write, waits until the first has
    written, however slowly, and can go on from a checkpoint.
    """
    path = script(
        tmp_path,
        """
        from tfm_ref import training
        def lone(epoch):
            return [Batch.of(PAIRS[epoch:epoch + 1], pad=0, bos=1, eos=2)]
        def everything(folder):
            drawn = []
            def noting(model, batch):
                drawn.append([len(batch), torch.rand(1).item()])
                return loss(model, batch)
            terms = {"loss": noting, "every": 4, "folder": folder, "dtype": torch.float64}
            train(6, **terms)
            assert os.path.exists(f"{folder}/step-00000006")
            many = train(10, **terms)
            return {
                "many": many, "lone": train(4, batches=lone, dtype=torch.float64), "drawn": drawn
            }
        if __name__ == "__main__":
            out, rank = sys.argv[1], os.environ["RANK"]
            save = training.save_checkpoint
            training.save_checkpoint = lambda *args: time.sleep(0.3) or save(*args)
            result = everything(out + "/folder")
            with open(f"{out}/{rank}.json", "w") as file:
                json.dump(result, file)
        """,
    )
    both = torchrun(path, tmp_path)
    assert both.returncode == 0, both.stderr
    assert "it/s" not in both.stderr
    first, second = (json.loads((tmp_path / f"{i}.json").read_text("utf-8")) for i in (0, 1))
    alone = runpy.run_path(str(path))["everything"](tmp_path / "alone")
    for name in "many", "lone":
        (losses, state), (expected, weights) = first[name], alone[name]
        assert_close(losses, expected, rtol=1e-12, atol=0)
        for n in weights:
            assert_close(torch.tensor(state[n]), torch.tensor(weights[n]), rtol=0, atol=1e-10)
        assert first[name] == second[name]
    drawn = [list(zip(*run["drawn"], strict=True)) for run in (alone, first, second)]
    (sizes, numbers), (sizes_0, numbers_0), (sizes_1, numbers_1) = drawn
    assert [a + b for a, b in zip(sizes_0, sizes_1, strict=True)] == [*sizes]
    assert sizes_0 != sizes_1
    assert numbers == numbers_0
    assert not {*numbers_0} & {*numbers_1}


def test_if_a_process_dies_the_other_ends(tmp_path):
    path = script(
        tmp_path,
        """
        calls = []
        def dying(model, batch):
            calls.append(0)
            if os.environ["RANK"] == "1" and len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(model, batch)
        train(10**6, dying, timeout=timedelta(seconds=20))
        """,
    )
    result = torchrun(path)  # which waits for both
    assert result.returncode == 1
    assert "Signal 9 (SIGKILL) received" in result.stderr
