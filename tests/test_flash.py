"""Attention by tiles: the invariant of the online softmax, oracles, memory, what is refused."""

import itertools
import re
from functools import partial

import pytest
import torch
from oracles import draw
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from tfm_ref import (
    PartialSoftmax,
    attention_weights,
    merge,
    online_softmax,
    padding_mask,
    scaled_dot_product_attention,
    sliding_window_mask,
    tiled_attention,
)

SMALL = {"block_q": 2, "block_k": 3}


# --- the online softmax


@pytest.mark.parametrize("block", [1, 2, 3, 7, 9])
def test_invariant_at_each_step(block):
    """After i keys: their maximum, the sum of their exponentials, and so many values weighed."""
    scores, values = 3 * draw(2, 5, 7).double(), draw(2, 7, 4, seed=1).double()
    steps = list(online_softmax(scores, values, block=block))
    assert len(steps) == -(-7 // block)
    for i, step in enumerate(steps):
        some = scores[..., : (i + 1) * block]
        e = (some - step.top).exp()
        assert_close(step.top, some.amax(-1, keepdim=True))
        assert_close(step.total, e.sum(-1, keepdim=True))
        assert_close(step.mixed, e @ values[:, : some.shape[-1]])
        assert_close(step.lse, some.logsumexp(-1))
        assert_close(step.output, some.softmax(-1) @ values[:, : some.shape[-1]])


def test_by_hand():
    """Scores 0 and log 3: the second shrinks the first to a third, so weights 1/4 and 3/4."""
    scores = torch.tensor([[1.0, 3.0]]).log()
    first, second = online_softmax(scores, torch.tensor([[4.0], [8.0]]))
    assert_close((first.top, first.total, first.mixed), (t := torch.zeros(1, 1), t + 1, t + 4))
    assert_close((second.total, second.mixed), (t + 4 / 3, t + 4 / 3 + 8))
    assert_close((second.output, second.lse), (t + 7, torch.tensor([4.0]).log()))


def test_parts_join_in_any_order():
    """Merging is associative and commutative, and an empty part changes nothing."""
    scores, values = 9 * draw(5, 12).double(), draw(12, 4, seed=1).double()
    scores[1, :4] = scores[2] = -torch.inf  # a query that finds nothing in one part, or in any
    *_, whole = online_softmax(scores, values)
    parts = [list(online_softmax(scores[:, i : i + 4], values[i : i + 4]))[-1] for i in (0, 4, 8)]
    a, b, c = parts
    empty = PartialSoftmax.empty(scores, 4)
    joined = [merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a)), merge(empty, a)]
    for other in joined[:3]:
        assert_close((other.output, other.lse), (whole.output, whole.lse))
    assert_close(tuple(joined[3]), tuple(a))
    assert torch.equal(whole.output[2], torch.zeros(4).double())
    assert whole.lse[2] == -torch.inf
    again = [PartialSoftmax.of(part.output, part.lse) for part in parts]
    other = merge(merge(*again[:2]), again[2])
    assert_close((other.output, other.lse), (whole.output, whole.lse))


# --- against the equation

SHAPES = [(4, 2, 7, 7), (4, 4, 3, 8), (4, 1, 8, 3), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_lse_and_gradients(shape, device):
    """All terms together and apart: float64, several tiles, ragged ends."""
    h, g, n, m = shape

    def inputs(*sizes, seed):
        return draw(*sizes, seed=seed).double().to(device).requires_grad_()

    q, k, v = inputs(2, h, n, 5, seed=1), inputs(2, g, m, 5, seed=2), inputs(2, g, m, 3, seed=3)
    masks = [None, *((draw(*s) > -0.3).to(device) for s in ((2, h, n, m), (1, 1, n, m)))]
    biases = [None, *(inputs(*s, seed=4) for s in ((2, h, n, m), (1, h, 1, m), (2, 1, n, 1)))]
    sinks = [None, inputs(h, seed=5)]
    options = itertools.product(masks, biases, sinks, (False, True), (None, 1.3), (None, 2, 5))
    for mask, bias, sink, is_causal, softcap, window in options:
        form = {
            "is_causal": is_causal,
            "bias": bias,
            "softcap": softcap,
            "sinks": sink,
            "scale": 0.3,
        }
        seen = mask
        if window is not None:
            seen = sliding_window_mask(n, m, window=window, device=device)
            seen = seen if mask is None else seen & mask
        expected = scaled_dot_product_attention(q, k, v, mask=seen, **form)
        kept = attention_weights(q, k, mask=seen, **form).sum(-1)
        y, lse = tiled_attention(
            q, k, v, mask=mask, window=window, **form, **SMALL, return_lse=True
        )
        assert_close(y, expected)
        if sink is not None:  # what the sink has left over: 1 - e^(sink - L)
            assert_close(1 - (sink[:, None] - lse).exp(), kept)
        learned = [t for t in (q, k, v, bias, sink) if t is not None]
        dy = draw(*y.shape, seed=6).double().to(device)
        grad = partial(torch.autograd.grad, allow_unused=True, materialize_grads=True)
        if expected.requires_grad:
            assert_close(grad(y, learned, dy), grad(expected, learned, dy))


def test_gradient_through_the_log_sum_exp(device):
    """A loss on both outputs, as in ring attention; with a row that sees nothing."""
    q, k = (draw(1, 2, 5, 4, seed=s).double().to(device).requires_grad_() for s in (1, 2))
    sinks, v = torch.ones(2, device=device).double().requires_grad_(), draw(1, 2, 5, 4).double()
    mask = padding_mask(torch.tensor([3], device=device), 5).repeat(1, 1, 5, 1)
    mask[:, :, 2] = False
    for sink in None, sinks:
        _, lse = tiled_attention(
            q, k, v.to(device), mask=mask, sinks=sink, **SMALL, return_lse=True
        )
        scores = (q @ k.mT / 2).masked_fill(~mask, -torch.inf)
        if sink is not None:
            scores = torch.cat([scores, sink[:, None, None].expand(1, 2, 5, 1)], -1)
        expected = scores.logsumexp(-1)
        assert_close(lse, expected)
        rows = [0, 1, 3, 4]
        learned = [q, k] if sink is None else [q, k, sink]
        gradients = torch.autograd.grad(lse[:, :, rows].square().sum(), learned)
        exact = torch.autograd.grad(expected[:, :, rows].square().sum(), learned)
        assert_close(gradients, exact)


def test_rows_that_see_nothing(device):
    q, k, v = draw(3, 1, 1, 4, 2).to(device)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool, device=device)
    y, lse = tiled_attention(q, k, v, mask=mask, **SMALL, return_lse=True)
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_in_float32(dtype, device):
    """Of 16 bits only what goes in and out is rounded, as if all were computed in float32."""
    q, k, v = draw(3, 1, 2, 300, 16).to(device, dtype)
    y, lse = tiled_attention(q, k, v, is_causal=True, return_lse=True)
    exact = tiled_attention(q.float(), k.float(), v.float(), is_causal=True, return_lse=True)
    assert (y.dtype, lse.dtype) == (dtype, torch.float32)
    assert torch.equal(y, exact[0].to(dtype))
    assert torch.equal(lse, exact[1])


def test_autocast_computes_in_its_dtype(device):
    q, k, v = draw(3, 1, 2, 9, 16).to(device)
    halves = tiled_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(tiled_attention(q, k, v), halves)
        assert tiled_attention(q.double(), k.double(), v.double()).dtype == torch.float64


@pytest.mark.parametrize("blocks", [(1, 1), (3, 5), (64, 256), (10_000, 10_000)])
def test_blocks_do_not_matter(blocks, device):
    q, k, v = draw(3, 1, 2, 70, 8).double().to(device)
    y = tiled_attention(q, k, v, is_causal=True, block_q=blocks[0], block_k=blocks[1])
    assert_close(y, scaled_dot_product_attention(q, k, v, is_causal=True))


def test_meta_device():
    q = torch.empty(1, 8, 100, 64, device="meta")
    y, lse = tiled_attention(q, q[:, :2], q[:, :2], is_causal=True, return_lse=True)
    assert (y.shape, lse.shape, y.device.type) == (q.shape, q.shape[:3], "meta")


def test_no_gradient_of_the_gradient():
    q = draw(1, 1, 3, 2).requires_grad_()
    (dq,) = torch.autograd.grad(tiled_attention(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


# --- what it costs


class Largest(TorchDispatchMode):
    """Watch every operation, and remember the largest tensor and the number of tiles."""

    def __init__(self):
        super().__init__()
        self.numel, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outcome = func(*args, **(kwargs or {}))
        outputs = outcome if isinstance(outcome, tuple) else (outcome,)
        sizes = [t.untyped_storage().nbytes() // 4 for t in outputs if torch.is_tensor(t)]
        self.numel = max(self.numel, *sizes, 0)
        self.products += func.overloadpacket is torch.ops.aten.bmm
        return outcome


def watched(attend, n, **terms):
    q, k, v = (draw(1, 2, n, 4, seed=s).requires_grad_() for s in range(3))
    with Largest() as largest:
        attend(q, k, v, **terms).sum().backward()
    return largest


@pytest.mark.parametrize("terms", [{}, {"is_causal": True}, {"window": 32}, {"softcap": 9.0}])
def test_memory_is_linear(terms):
    """Nothing is as large as the n × m scores: twice the length, at most twice the memory."""
    blocked = partial(tiled_attention, block_q=32, block_k=32)
    small, large = (watched(blocked, n, **terms).numel for n in (512, 1024))
    assert large <= 2 * small
    assert large < 2 * 1024 * 1024 / 100
    if "window" not in terms:
        assert watched(scaled_dot_product_attention, 512, **terms).numel >= 2 * 512 * 512


@pytest.mark.parametrize(
    ("terms", "tiles"), [({}, 64), ({"is_causal": True}, 36), ({"window": 9}, 8 + 7)]
)
def test_tiles_that_nobody_sees_are_skipped(terms, tiles):
    """8 × 8 tiles of 8, two products forward and five backward: the products count the tiles."""
    found = watched(partial(tiled_attention, block_q=8, block_k=8), 64, **terms).products
    assert found == 7 * tiles


def test_keys_are_not_copied_for_each_query_head():
    """With 8 query heads to one key head, no tensor is as large as 8 copies of the keys."""
    q, k = draw(1, 8, 4, 64), draw(1, 1, 4096, 64)
    with Largest() as largest:
        tiled_attention(q, k, k, block_k=64)
    assert largest.numel <= k.numel()


# --- what is refused


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"dropout": 0.1}, 'tiles have no dropout; got 0.1. Use "naive" or "sdpa".'),
        ({"dropout": 1.0}, "dropout must lie in 0 <= dropout < 1; got 1.0"),
        ({"softcap": 0.0}, "softcap must be finite and above 0; got 0.0"),
        ({"sinks": torch.zeros(3)}, "sinks must have shape (heads,) = (2,); got (3,)"),
        ({"k": draw(1, 2, 3, 5)}, "q and k must have the same width; got 4 and 5"),
        *[
            ({name: 0}, f"{name} must be an integer of at least 1; got 0")
            for name in ("window", "block_q", "block_k")
        ],
    ],
)
def test_refused(terms, message):
    q = draw(1, 2, 3, 4)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tiled_attention(**{"q": q, "k": q, "v": q, **terms})


def test_blocks_of_the_online_softmax_are_checked():
    with pytest.raises(ValueError, match=r"^block must be an integer of at least 1; got 0$"):
        next(online_softmax(torch.zeros(1, 2), torch.zeros(2, 1), block=0))
