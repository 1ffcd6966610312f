"""The loss against PyTorch's and by hand, and what it refuses."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from oracles import draw
from torch import nn
from torch.testing import assert_close

from tfm_ref import label_smoothed_cross_entropy

B, N, W = 2, 3, 5


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
