"""Attention against PyTorch, against loops, against hand-computed values; and what it refuses."""

import copy
import io
import math
import re
import subprocess
import sys
import warnings
from importlib.util import find_spec

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from tfm_ref import (
    SelfAttention,
    attention_weights,
    causal_mask,
    fused_attention,
    padding_mask,
    scaled_dot_product_attention,
    sliding_window_mask,
)

E = math.e
PADDED = padding_mask(torch.tensor([3]), 4)
LEFT_PADDED = padding_mask(torch.tensor([2]), 4, side="left")


# --- by hand


def test_two_keys_by_hand():
    """Scores 0 and 1 give weights 1/(1+e) and e/(1+e)."""
    q, k = torch.tensor([[[[0.0, 2**0.5]]]]), torch.eye(2)[None, None]
    v = torch.tensor([[[[1.0, 0.0, 10.0], [0.0, 1.0, 20.0]]]])
    expected = torch.tensor([[[[1 / (1 + E), E / (1 + E)]]]])
    assert_close(attention_weights(q, k), expected)
    expected = torch.tensor([[[[1, E, 10 + 20 * E]]]]) / (1 + E)
    assert_close(scaled_dot_product_attention(q, k, v), expected)


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ({}, [3, 3, 3, 3]),
        ({"is_causal": True}, [0, 1, 2, 3]),
        ({"mask": sliding_window_mask(4, window=2)}, [0, 1, 3, 5]),
        ({"mask": PADDED}, [2, 2, 2, 2]),
        ({"mask": PADDED, "is_causal": True}, [0, 1, 2, 2]),
        ({"mask": LEFT_PADDED, "is_causal": True}, [0, 0, 4, 5]),
        ({"bias": torch.tensor([0.0, 0, 0, 3]).log1p()[None, None, None]}, [30 / 7] * 4),
    ],
)
def test_equal_scores_average_what_is_seen(terms, expected):
    """Queries of 0 find all keys alike: each gives the mean of the values in sight."""
    q, v = torch.zeros(1, 1, 4, 3), torch.tensor([0.0, 2, 4, 6]).view(1, 1, 4, 1)
    y = scaled_dot_product_attention(q, q, v, **terms)
    assert_close(y.flatten(), torch.tensor(expected, dtype=torch.float32))


# --- against loops


def by_loops(q, k, v, mask, is_causal, bias, scale):
    """Attend one query at a time, in floats, with nothing but sums."""
    batch, heads, n, width = q.shape
    m, y = k.shape[2], np.zeros((batch, heads, n, v.shape[3]))
    mask, bias = (np.broadcast_to(t, (batch, heads, n, m)) for t in (mask, bias))
    for b, h, i in np.ndindex(batch, heads, n):
        numerators = [0.0] * m
        for j in range(m):
            if mask[b, h, i, j] and (not is_causal or j - i <= m - n):
                dot = sum(q[b, h, i, c] * k[b, h, j, c] for c in range(width))
                numerators[j] = math.exp(dot * scale + bias[b, h, i, j])
        for j in range(m):
            y[b, h, i] += numerators[j] / (sum(numerators) or 1.0) * v[b, h, j]
    return y


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.data())
@pytest.mark.parametrize("attend", [scaled_dot_product_attention, fused_attention])
def test_equals_loops(attend, data):
    """Any shape, mask, bias and scale: the output is that of loops, in the range of the values."""
    b, g, r, n, m, k, v = (data.draw(st.integers(1, top)) for top in (3, 2, 2, 6, 6, 5, 5))
    h = g * r
    numbers = np.random.default_rng(data.draw(st.integers(0, 999)))
    inputs = [numbers.normal(size=(b, *s)) for s in ((h, n, k), (g, m, k), (g, m, v))]
    shapes = [[data.draw(st.sampled_from([1, size])) for size in (b, h, n, m)] for _ in range(2)]
    mask = numbers.random(shapes[0]) < data.draw(st.sampled_from([0.2, 0.7, 1.0]))
    bias, is_causal = numbers.normal(size=shapes[1]), data.draw(st.booleans())
    scale = data.draw(st.sampled_from([None, -1.0, 0.0, 0.3]))
    y = attend(
        *map(torch.from_numpy, inputs),
        mask=torch.from_numpy(mask),
        bias=torch.from_numpy(bias),
        is_causal=is_causal,
        scale=scale,
    )
    inputs[1:] = (np.repeat(t, r, axis=1) for t in inputs[1:])
    expected = by_loops(*inputs, mask, is_causal, bias, 1 / k**0.5 if scale is None else scale)
    assert_close(y.numpy(), expected, rtol=1e-9, atol=1e-9)
    low, high = inputs[2].min(2, keepdims=True), inputs[2].max(2, keepdims=True)
    assert (y.numpy() <= np.maximum(high, 0) + 1e-9).all()
    assert (y.numpy() >= np.minimum(low, 0) - 1e-9).all()


# --- against PyTorch


def values_and_gradients(run, *inputs):
    """Run on fresh leaves: the output, and the gradients of the sum of its squares."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = run(*inputs)
    return y, *torch.autograd.grad(y.square().sum(), inputs)


MASK = torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.6
BIAS = torch.randn(1, 3, 7, 7, generator=torch.Generator().manual_seed(1))
OURS_AND_THEIRS = {
    "plain": ({}, {}),
    "causal": ({"is_causal": True}, {"is_causal": True}),
    "mask": ({"mask": MASK}, {"attn_mask": MASK}),
    "padding": ({"mask": MASK[:, :1, :1]}, {"attn_mask": MASK[:, :1, :1].expand(2, 3, 7, 7)}),
    "causal and mask": ({"mask": MASK, "is_causal": True}, {"attn_mask": MASK.tril()}),
    "bias": ({"bias": BIAS}, {"attn_mask": BIAS.expand(2, 3, 7, 7)}),
    "bias and causal": (
        {"bias": BIAS, "is_causal": True},
        {"attn_mask": BIAS.masked_fill(~causal_mask(7), -torch.inf).expand(2, 3, 7, 7)},
    ),
    "scale": ({"scale": 0.7}, {"scale": 0.7}),
}


@pytest.mark.parametrize("case", OURS_AND_THEIRS)
def test_equals_torch(case, device):
    """Output and gradients equal those of every backend that PyTorch has here."""
    ours, theirs = (
        {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in terms.items()}
        for terms in OURS_AND_THEIRS[case]
    )
    inputs = torch.randn(3, 2, 3, 7, 8, device=device).unbind()
    actual = values_and_gradients(lambda *a: scaled_dot_product_attention(*a, **ours), *inputs)
    compared = set()
    for name, backend in SDPBackend.__members__.items():
        try:
            with warnings.catch_warnings(action="ignore"), sdpa_kernel(backend):
                expected = values_and_gradients(
                    lambda *a: F.scaled_dot_product_attention(*a, **theirs), *inputs
                )
        except RuntimeError:  # no such kernel on this device
            continue
        assert_close(actual, expected, msg=lambda message, name=name: f"{name}: {message}")
        compared.add(name)
    assert compared >= ({"MATH", "FLASH_ATTENTION"} if device == "cpu" else {"MATH"})


def test_equals_torch_across_lengths(device):
    """Cross-attention, and values of another width."""
    q, k, v = (torch.randn(2, 3, *shape, device=device) for shape in ((5, 4), (9, 4), (9, 7)))
    assert_close(
        values_and_gradients(scaled_dot_product_attention, q, k, v),
        values_and_gradients(F.scaled_dot_product_attention, q, k, v),
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", ["nothing", "padding", "attention", "both"])
def test_equals_torch_module(bias, training, masked, device):
    """With weights copied, one head of nn.MultiheadAttention agrees; its True means blocked."""
    ours = SelfAttention(d_model=6, bias=bias).to(device)
    theirs = nn.MultiheadAttention(6, 1, bias=bias, batch_first=True).to(device).train(training)
    state = {"out_proj.weight": ours.o_proj.weight}
    state["in_proj_weight"] = torch.cat([getattr(ours, f"{n}_proj").weight for n in "qkv"])
    if bias:
        state["out_proj.bias"] = ours.o_proj.bias
        state["in_proj_bias"] = torch.cat([getattr(ours, f"{n}_proj").bias for n in "qkv"])
    theirs.load_state_dict(state)

    x = torch.randn(3, 5, 6, device=device)
    pad = padding_mask(torch.tensor([5, 2, 4], device=device), 5)
    mask = sliding_window_mask(5, window=4, device=device)
    allowed = {"nothing": pad | True, "padding": pad, "attention": mask, "both": pad & mask}[masked]
    assert allowed.any(-1).all()  # a query with no key gets NaN from nn.MultiheadAttention
    blocked = {}
    if masked in ("padding", "both"):
        blocked["key_padding_mask"] = ~pad[:, 0, 0]
    if masked in ("attention", "both"):
        blocked["attn_mask"] = ~mask[0, 0]

    expected = values_and_gradients(lambda x: theirs(x, x, x, **blocked)[0], x)
    assert_close(values_and_gradients(lambda x: ours(x, mask=allowed), x), expected)
    with torch.no_grad():  # in evaluation, its fast path
        y, weights = theirs(x, x, x, **blocked)
    assert_close(ours(x, mask=allowed), y)
    assert_close(ours.attention_weights(x, mask=allowed)[:, 0], weights)


# --- in PyTorch's world


@pytest.mark.parametrize(
    ("widths", "count"),
    [
        ({"d_model": 512}, 4 * 512 * 512),
        ({"d_model": 512, "bias": True}, 4 * 512 * 512 + 4 * 512),
        ({"d_model": 10, "head_dim": 3}, 4 * 10 * 3),
        ({"d_model": 10, "head_dim": 3, "v_head_dim": 7}, 2 * 10 * 3 + 2 * 10 * 7),
        ({"d_model": 10, "head_dim": 3, "v_head_dim": 7, "bias": True}, 200 + 2 * 3 + 7 + 10),
    ],
)
def test_parameter_count(widths, count):
    assert sum(p.numel() for p in SelfAttention(**widths).parameters()) == count


def test_autocast(device):
    """Under autocast it computes in bfloat16, near to what float32 gives."""
    attention, x = SelfAttention(d_model=16).to(device), torch.randn(2, 5, 16, device=device)
    mask = padding_mask(torch.tensor([5, 0], device=device), 5)
    with torch.autocast(device, torch.bfloat16):
        y = attention(x, mask=mask, is_causal=True)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), attention(x, mask=mask, is_causal=True), rtol=0.05, atol=0.02)


def test_autocast_brings_dtypes_together(device):
    """Under autocast q, k, v and a bias of several dtypes give what float32 gives, nearly."""
    q, k, v, bias = torch.randn(4, 1, 1, 5, 5, device=device)
    expected = scaled_dot_product_attention(q, k, v, bias=bias)
    with torch.autocast(device, torch.bfloat16):
        y = scaled_dot_product_attention(q, k.bfloat16(), v.bfloat16(), bias=bias)
    assert_close(y.float(), expected, rtol=0.05, atol=0.05)


def test_compiles_whole():
    """No graph break: in a Python of its own, where annotations are not enforced."""
    program = """
import torch, tfm_ref
attention, x = tfm_ref.SelfAttention(d_model=8), torch.randn(2, 5, 8)
mask = tfm_ref.sliding_window_mask(5, window=2)
compiled = torch.compile(attention, fullgraph=True, backend="eager")
same = compiled(x, mask=mask, is_causal=True), attention(x, mask=mask, is_causal=True)
torch.testing.assert_close(*same)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_meta_device():
    """Shapes can be had without numbers."""
    with torch.device("meta"):
        attention, x = SelfAttention(d_model=512, v_head_dim=64), torch.empty(32, 100, 512)
        y = attention(x, mask=causal_mask(100), is_causal=True)
    assert (y.shape, y.device.type) == ((32, 100, 512), "meta")


def test_copies_are_independent_and_equal():
    """A deep copy, and a state saved and loaded as weights only, give the same output."""
    attention, x = SelfAttention(d_model=8, bias=True), torch.randn(2, 5, 8)
    file = io.BytesIO()
    torch.save(attention.state_dict(), file)
    file.seek(0)
    loaded, copied = SelfAttention(d_model=8, bias=True), copy.deepcopy(attention)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    y = attention(x)
    with torch.no_grad():
        attention.o_proj.weight.zero_()
    assert torch.equal(loaded(x), y)
    assert torch.equal(copied(x), y)
    assert not torch.equal(attention(x), y)


# --- what is refused


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


def boolean(*shape):
    return ones(*shape, dtype=torch.bool)


def axes(name, scores, got):
    """The message about axes that do not line up."""
    return (
        f"{name} must have 4 axes (batch, heads, len_q, len_k), each of size 1 or that of the "
        f"scores {scores}; got {got}. Write {name}[None, None] for one (len_q, len_k) {name}, "
        f"{name}[:, None] for a (batch, len_q, len_k) {name}, "
        f"{name}[:, None, None] for a (batch, len_k) {name}."
    )


def not_boolean(dtype):
    rule = "mask must be a boolean tensor (True = may attend)"
    return f"{rule}; got {dtype}. An additive term goes through bias."


DTYPE_DEVICE = "must have the same dtype and device; got torch.float32 on cpu and"
ELSEWHERE = "{} must be on the device of the scores (cpu); got meta"
WRONG_AXES = (4,), (4, 4), (4, 4, 4), (2, 4, 4), (1, 1, 1, 4, 4), (4, 2, 4, 3), (3, 1, 4, 4)
REFUSED = [
    ({"q": ones(4, 3)}, "q must have 4 axes (batch, heads, length, width); got (4, 3)"),
    ({"k": ones(2, 4, 3)}, "k must have 4 axes (batch, heads, length, width); got (2, 4, 3)"),
    ({"q": ones(4, 2, 0, 3)}, "q must not be empty; got shape (4, 2, 0, 3)"),
    ({"k": ones(0, 2, 4, 3)}, "k must not be empty; got shape (0, 2, 4, 3)"),
    ({"q": ones(4, 2, 4, 3, dtype=torch.int64)}, "q must be floating point; got torch.int64"),
    ({"k": boolean(4, 2, 4, 3)}, "k must be floating point; got torch.bool"),
    ({"k": ones(4, 2, 4, 3, dtype=torch.float64)}, f"q and k {DTYPE_DEVICE} torch.float64 on cpu"),
    ({"k": ones(4, 2, 4, 3, device="meta")}, f"q and k {DTYPE_DEVICE} torch.float32 on meta"),
    ({"k": ones(1, 2, 4, 3)}, "q and k must have the same batch; got 4 and 1"),
    ({"k": ones(4, 3, 4, 3)}, "the heads of q (2) must be a multiple of the heads of k (3)"),
    ({"k": ones(4, 4, 4, 3)}, "the heads of q (2) must be a multiple of the heads of k (4)"),
    ({"k": ones(4, 2, 4, 1)}, "q and k must have the same width; got 3 and 1"),
    ({"mask": ones(1, 1, 4, 4, dtype=torch.int64)}, not_boolean("torch.int64")),
    ({"mask": ones(1, 1, 4, 4)}, not_boolean("torch.float32")),
    ({"mask": [[True]]}, not_boolean("list")),
    ({"mask": boolean(1, 1, 4, 4).to("meta")}, ELSEWHERE.format("mask")),
    *[({"mask": boolean(*shape)}, axes("mask", (4, 2, 4, 4), shape)) for shape in WRONG_AXES],
    ({"bias": ones(4, 4)}, axes("bias", (4, 2, 4, 4), (4, 4))),
    ({"bias": ones(1, 2, 2, 4)}, axes("bias", (4, 2, 4, 4), (1, 2, 2, 4))),
    (
        {"bias": boolean(1, 1, 4, 4)},
        "bias must be floating point; got torch.bool. A boolean mask goes through mask.",
    ),
    (
        {"bias": ones(1, 1, 4, 4, dtype=torch.float64)},
        f"the scores and bias {DTYPE_DEVICE} torch.float64 on cpu",
    ),
    (
        {"bias": ones(1, 1, 4, 4, device="meta")},
        f"the scores and bias {DTYPE_DEVICE} torch.float32 on meta",
    ),
]
REFUSED_VALUES = [
    ({"v": ones(4, 4, 3)}, "v must have 4 axes (batch, heads, length, width); got (4, 4, 3)"),
    ({"v": ones(4, 2, 4, 0)}, "v must not be empty; got shape (4, 2, 4, 0)"),
    ({"v": ones(4, 2, 4, 3, dtype=torch.int32)}, "v must be floating point; got torch.int32"),
    ({"v": ones(4, 2, 4, 3).half()}, f"q and v {DTYPE_DEVICE} torch.float16 on cpu"),
    ({"v": ones(4, 2, 4, 3, device="meta")}, f"q and v {DTYPE_DEVICE} torch.float32 on meta"),
    ({"v": ones(1, 2, 4, 3)}, "q and v must have the same batch; got 4 and 1"),
    ({"v": ones(4, 1, 4, 3)}, "k and v must have the same heads; got 2 and 1"),
    *[({"dropout": p}, f"dropout must lie in 0 <= dropout < 1; got {p}") for p in (-0.1, 1.0)],
    ({"v": ones(4, 2, 1, 3)}, "k and v must have the same length; got 4 and 1"),
]


def raises(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(("wrong", "message"), REFUSED)
def test_refused(wrong, message):
    right = {"q": ones(4, 2, 4, 3), "k": ones(4, 2, 4, 3)}
    with raises(message):
        attention_weights(**right | wrong)
    for attend in scaled_dot_product_attention, fused_attention:
        with raises(message):
            attend(**{"v": ones(4, 2, 4, 5)} | right | wrong)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(("wrong", "message"), REFUSED_VALUES)
@pytest.mark.parametrize("attend", [scaled_dot_product_attention, fused_attention])
def test_values_refused(wrong, message, attend):
    right = dict.fromkeys("qkv", ones(4, 2, 4, 3))
    with raises(message):
        attend(**right | wrong)


@pytest.mark.parametrize("name", ["d_model", "head_dim", "v_head_dim"])
@pytest.mark.parametrize("width", [0, -1])
def test_widths_refused(name, width):
    with raises(f"{name} must be an integer of at least 1; got {width}"):
        SelfAttention(**{"d_model": 8, name: width})


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *[
            (
                {"x": ones(*s)},
                f"x must have shape (batch, length, d_model = 8) and not be empty; got {s}",
            )
            for s in [(4, 8), (4, 1, 4, 8), (4, 4, 7), (4, 8, 1), (4, 0, 8), (0, 4, 8)]
        ],
        ({"x": ones(4, 4, 8).double()}, f"the layer and x {DTYPE_DEVICE} torch.float64 on cpu"),
        ({"x": ones(4, 4, 8).to("meta")}, f"the layer and x {DTYPE_DEVICE} torch.float32 on meta"),
        ({"mask": ones(1, 1, 4, 4)}, not_boolean("torch.float32")),
        *[
            ({"mask": boolean(*s)}, axes("mask", (4, 1, 4, 4), s))
            for s in [(4, 4), (4, 4, 4), (1, 4, 4, 4)]
        ],
    ],
)
@pytest.mark.parametrize("method", ["forward", "attention_weights"])
def test_tokens_refused(method, wrong, message):
    with raises(message):
        getattr(SelfAttention(d_model=8), method)(**{"x": ones(4, 4, 8)} | wrong)


@pytest.mark.skipif(not find_spec("beartype"), reason="beartype enforces them: `make test` has it")
@pytest.mark.parametrize(
    "wrong",
    [{"v": ones(4, 2, 5, 3)}, {"mask": boolean(4, 4)}, {"bias": boolean(1, 1, 4, 4)}],
)
def test_annotations_are_enforced_in_the_tests(wrong):
    right = dict.fromkeys("qkv", ones(4, 2, 4, 3))
    scaled_dot_product_attention(**right)
    with pytest.raises(jaxtyping.TypeCheckError):
        scaled_dot_product_attention(**right | wrong)
