"""Training against PyTorch's losses, against one process, and against a run that never stopped."""

import json
import math
import re
import runpy
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import draw
from runs import CONFIG, IDS, PAIRS, adam, environment, loss, run, script
from torch import nn
from torch.testing import assert_close

from tfm_ref import (
    Batch,
    DecoderLM,
    EncoderDecoder,
    TokenBatches,
    TransformerConfig,
    fit,
    label_smoothed_cross_entropy,
    noam_lr,
    padding_share,
    set_seed,
    training,
)

B, N, W = 2, 3, 5


# --- the loss

TARGETS = torch.tensor([[1, -100, 4], [0, 2, -100]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 0, 4])
def test_loss_equals_torch(smoothing, ignore_index, device):
    targets = TARGETS.masked_fill(TARGETS == -100, ignore_index).to(device)
    logits = draw(B, N, W).double().to(device).requires_grad_()
    terms = {"ignore_index": ignore_index}
    total, n = label_smoothed_cross_entropy(logits, targets, smoothing=smoothing, **terms)
    terms |= {"label_smoothing": smoothing, "reduction": "sum"}
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **terms)
    assert_close(total, expected)
    assert n == (targets != ignore_index).sum()
    assert_close(*(torch.autograd.grad(y, logits)[0] for y in (total, expected)))


def test_loss_by_hand():
    """With probabilities 1/2, 1/4, 1/4 and ε = 0.3, q is 0.8, 0.1, 0.1; the default ε is 0.1."""
    logits, target = torch.tensor([[[0.5, 0.25, 0.25]]]).log(), torch.tensor([[0]])
    total, n = label_smoothed_cross_entropy(logits, target, smoothing=0.3)
    assert n == 1
    assert math.isclose(total, (0.8 + 0.2 * 2) * math.log(2), rel_tol=1e-6)
    default, _ = label_smoothed_cross_entropy(logits, target)
    assert torch.equal(default, label_smoothed_cross_entropy(logits, target, smoothing=0.1)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype, device):
    logits, targets = draw(B, N, W).to(dtype).to(device), TARGETS.to(device)
    total, _ = label_smoothed_cross_entropy(logits, targets)
    assert total.dtype == torch.float32
    assert torch.equal(total, label_smoothed_cross_entropy(logits.float(), targets)[0])


def test_what_does_not_count_is_not_read():
    logits = draw(B, N, W).double()
    expected, _ = label_smoothed_cross_entropy(logits, TARGETS)
    for nonsense in torch.nan, torch.inf, -torch.inf:
        spoilt = logits.masked_fill((TARGETS == -100)[..., None], nonsense).requires_grad_()
        total, _ = label_smoothed_cross_entropy(spoilt, TARGETS)
        assert torch.equal(total, expected)
        (gradient,) = torch.autograd.grad(total, spoilt)
        assert (gradient[TARGETS == -100] == 0).all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nothing_that_counts_gives_zero(smoothing):
    logits = torch.full((B, N, W), torch.nan, requires_grad=True)
    targets = torch.full((B, N), -100)
    total, n = label_smoothed_cross_entropy(logits, targets, smoothing=smoothing)
    assert (total.item(), n) == (0, 0)
    total.backward()
    assert (logits.grad == 0).all()
    assert F.cross_entropy(logits.flatten(0, 1), targets.flatten()).isnan()  # unlike PyTorch's mean


def test_a_token_that_is_impossible():
    logits = draw(1, 1, W).masked_fill(torch.arange(W) == 3, -torch.inf).requires_grad_()
    right, wrong = torch.tensor([[1]]), torch.tensor([[3]])
    total, _ = label_smoothed_cross_entropy(logits, right, smoothing=0.0)
    (gradient,) = torch.autograd.grad(total, logits)
    assert_close(total, F.cross_entropy(logits[0], right[0]))
    assert gradient.isfinite().all()
    assert label_smoothed_cross_entropy(logits, wrong, smoothing=0.0)[0] == torch.inf
    for target in right, wrong:
        for smoothing in 0.1, 1.0:  # at 1, the target would count 0 · inf
            message = "logits must be finite where smoothing is above 0; got -inf"
            with pytest.raises(ValueError, match=re.escape(message)):
                label_smoothed_cross_entropy(logits, target, smoothing=smoothing)


def test_a_loss_that_overflows_is_not_called_impossible():
    logits = torch.tensor([[[3e38, -3e38, 0.0]]])
    assert label_smoothed_cross_entropy(logits, torch.tensor([[1]]))[0] == torch.inf


def annotated(log_p, targets, size, padding_idx, smoothing):
    """Smooth as "The Annotated Transformer" does: by size - 2, and with 0 for the padding."""
    q = torch.full_like(log_p, smoothing / (size - 2))
    q.scatter_(1, targets[:, None], 1 - smoothing)
    q[:, padding_idx] = 0
    q[targets == padding_idx] = 0
    return q, nn.KLDivLoss(reduction="sum")(log_p, q)


def test_famous_bug_a_distribution_with_zeros():
    """harvardnlp/annotated-transformer#109: its own example, p with zeros, is inf or NaN."""
    p = torch.tensor([[0, 0.2, 0.7, 0.1, 0]] * 2)
    targets = torch.tensor([2, 1])
    assert annotated(p.log(), targets, 5, 0, 0.4)[1].isnan()  # 0 · log 0, at the padding
    p[:, 0] = 1e-9
    assert annotated(p.log(), targets, 5, 0, 0.4)[1] == torch.inf  # 0.4 / 3 · log 0
    with pytest.raises(ValueError, match="logits must be finite"):
        label_smoothed_cross_entropy(p.log()[None], targets[None], smoothing=0.4)
    p[:, 4] = 1e-9
    assert label_smoothed_cross_entropy(p.log()[None], targets[None], smoothing=0.4)[0].isfinite()


def test_famous_bug_a_share_for_all_but_two():
    """Its q gives the right token 1 - ε, and the K - 2 others, padding not, ε / (K - 2)."""
    log_p = draw(2, W).log_softmax(-1)
    targets = torch.tensor([2, 1])
    q, theirs = annotated(log_p, targets, W, 0, 0.4)
    assert_close(q[0], torch.tensor([0, 0.4 / 3, 0.6, 0.4 / 3, 0.4 / 3]))
    entropy = -torch.xlogy(q, q).sum()
    ours, _ = label_smoothed_cross_entropy(log_p[None], targets[None], smoothing=0.4)
    assert_close(theirs + entropy, -(q * log_p).sum())
    assert not torch.isclose(ours, theirs)
    assert not torch.isclose(ours, theirs + entropy)


@pytest.mark.parametrize(
    ("logits", "targets", "terms", "message"),
    [
        (
            torch.zeros(B, N, W),
            torch.zeros(B, N - 1).long(),
            {},
            "targets must have the shape of the logits without its last axis, (2, 3); got (2, 2)",
        ),
        (
            torch.zeros(B, N, W),
            TARGETS,
            {"smoothing": -0.1},
            "smoothing must lie in 0 <= smoothing <= 1; got -0.1",
        ),
        (
            torch.zeros(B, N, W),
            TARGETS,
            {"smoothing": 1.1},
            "smoothing must lie in 0 <= smoothing <= 1; got 1.1",
        ),
        (
            torch.zeros(B, N, W - 1),
            TARGETS,
            {},
            "targets must be -100 or lie in 0 <= target < vocab_size (4); got 0 to 4",
        ),
        (
            torch.zeros(B, N, W),
            TARGETS,
            {"ignore_index": -1},
            "targets must be -1 or lie in 0 <= target < vocab_size (5); got -100 to 4",
        ),
    ],
)
def test_loss_refuses(no_shape_checks, logits, targets, terms, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        label_smoothed_cross_entropy(logits, targets, **terms)


# --- the learning rate


def test_the_schedule_by_hand():
    lr = partial(noam_lr, d_model=16, warmup=4)
    assert_close([lr(step) for step in (1, 2, 4, 16)], [1 / 32, 1 / 16, 1 / 8, 1 / 16])
    assert lr(9, factor=3.0) == 3 * lr(9)
    assert noam_lr(7, d_model=512) == noam_lr(7, d_model=512, warmup=4000)
    rates = [noam_lr(step, d_model=512, warmup=50) for step in range(1, 300)]
    assert max(rates) == rates[49] == 512**-0.5 * 50**-0.5


def test_the_schedule_in_lambda_lr():
    optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters(), lr=1.0)
    lr = partial(noam_lr, d_model=8, warmup=3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: lr(i + 1))
    for step in range(1, 8):
        assert optimizer.param_groups[0]["lr"] == lr(step)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("wrong", ["step", "d_model", "warmup"])
def test_the_schedule_refuses(wrong):
    terms = {"step": 1, "d_model": 1, "warmup": 1} | {wrong: 0}
    with pytest.raises(ValueError, match=f"{wrong} must be an integer of at least 1; got 0"):
        noam_lr(**terms)


def test_seeds():
    drawn = []
    for numbers in (0,), (1,), (0, 1), (1, 0), (0, 1):
        set_seed(*numbers)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[2], drawn[4])
    assert len({tuple(x.tolist()) for x in drawn}) == 4


# --- batches


def test_a_batch_by_hand():
    batch = Batch.of([([5, 6, 7], [8]), ([5], [8, 9])], **IDS)
    assert batch.source.tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch.source_mask.tolist() == [[[[True] * 3]], [[[True, False, False]]]]
    assert batch.target_in.tolist() == [[1, 8, 0], [1, 8, 9]]
    assert batch.target_out.tolist() == [[8, 2, -100], [8, 9, 2]]
    assert (len(batch), batch.n_tokens) == (2, 5)
    assert padding_share([batch]) == 3 / 12
    assert padding_share([batch, batch[1:]]) == (3 + 2) / 18
    assert all(t.dtype == torch.int64 for t in (batch.source, batch.target_in, batch.target_out))


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="the number of pairs must be an integer of at least 1"):
        Batch.of([], **IDS)


def test_a_batch_of_an_empty_target_and_a_pad_that_is_not_zero():
    batch = Batch.of([([5], []), ([5, 6], [7])], pad=9, bos=1, eos=2)
    assert batch.source.tolist() == [[5, 9], [5, 6]]
    assert batch.target_in.tolist() == [[1, 9], [1, 7]]
    assert batch.target_out.tolist() == [[2, -100], [7, 2]]
    assert Batch.of([([], [5]), ([5], [5])], **IDS).source.dtype == torch.int64


def test_rows_and_devices():
    batch = Batch.of(PAIRS[:5], **IDS)
    part = batch[1::2]
    for name in "source", "source_mask", "target_in", "target_out":
        assert torch.equal(getattr(part, name), getattr(batch, name)[[1, 3]])
        assert getattr(batch.to("meta"), name).is_meta
    assert len(batch[9::2]) == 0


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_every_pair_once_and_no_batch_too_large(chunk):
    batches = TokenBatches(pairs=PAIRS, max_tokens=40, chunk=chunk, **IDS)
    seen = []
    for rows, batch in zip(batches.rows(3), batches(3), strict=True):
        seen += rows
        assert len(batch) * max(batch.source.shape[1], batch.target_in.shape[1]) <= 40
        assert torch.equal(batch.source[:, 0], torch.tensor([3 + i for i in rows]))
    assert sorted(seen) == list(range(60))


def test_sorting_saves_padding_and_fills_batches():
    def dealt(chunk):  # 1 sorts nothing
        return list(TokenBatches(pairs=PAIRS, max_tokens=40, chunk=chunk, **IDS)(0))

    assert padding_share(dealt(4096)) < padding_share(dealt(7)) < padding_share(dealt(1))
    assert len(dealt(4096)) < len(dealt(1))
    assert TokenBatches(pairs=PAIRS, max_tokens=40, **IDS).chunk == 4096
    sizes = [len(b) * max(b.source.shape[1], b.target_in.shape[1]) for b in dealt(4096)]
    assert sorted(sizes)[1] > 25  # only the last one of a chunk may be small


def test_a_long_pair_does_not_make_later_batches_small():
    """Sixteen pairs of length 1 fill two batches of 8, or three around one of length 8."""
    pairs = [([5], [])] * 16 + [([5] * 8, [])]
    batches = TokenBatches(pairs=pairs, max_tokens=8, chunk=1, **IDS)
    assert all(len(batches.rows(epoch)) <= 4 for epoch in range(5))


def test_the_order_follows_from_seed_and_epoch():
    def dealt(epoch, seed=0):
        return TokenBatches(pairs=PAIRS, max_tokens=40, seed=seed, **IDS).rows(epoch)

    torch.manual_seed(5)
    assert dealt(0) == dealt(0)
    assert dealt(0) != dealt(1)
    assert dealt(0) != dealt(0, seed=1)
    assert dealt(0, seed=1) != dealt(1)
    longest = [max(max(len(PAIRS[i][0]), len(PAIRS[i][1]) + 1) for i in rows) for rows in dealt(0)]
    assert longest != sorted(longest)  # batches are shuffled after sorting


def test_pairs_of_one_length_are_shuffled_among_batches():
    pairs = [([5], [6])] * 8
    first, second = (TokenBatches(pairs=pairs, max_tokens=8, **IDS).rows(e) for e in (0, 1))
    assert {frozenset(rows) for rows in first} != {frozenset(rows) for rows in second}
    assert [len(rows) for rows in first] == [4, 4]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1; got 0"),
        ({"chunk": 0}, "chunk must be an integer of at least 1; got 0"),
        ({"pairs": []}, "the number of pairs must be an integer of at least 1; got 0"),
        (
            {"pairs": [([5], [6]), ([], [6])]},
            "a source must have at least one token; got none in pair 1",
        ),
        (
            {"pairs": [([5], [6]), ([5] * 9, [])]},
            "a pair must be no longer than max_tokens (8); got 9 in pair 1",
        ),
        ({"pairs": [([5], [6] * 8)]}, "a pair must be no longer than max_tokens (8); got 9"),
    ],
)
def test_batches_refuse(terms, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenBatches(**{"pairs": PAIRS, "max_tokens": 8, **IDS} | terms)


# --- the loop


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
