"""The decoding kernels against the equation in float64; on the CPU, in the interpreter."""

import pytest
import torch
from oracles import draw
from test_flash_triton import DTYPES, both_dtypes, compiled, needs_triton
from torch.testing import assert_close

from tfm_ref import scaled_dot_product_attention
from tfm_ref.decode_triton import (
    DECODE_CONFIGURATIONS,
    DecodeConfiguration,
    _decode,
    decode_attention,
    decode_configuration,
)


def tensors(h, g, n, m, k, v=None, *, b=2):
    """Draw queries, keys and values, in float64."""
    shapes = (b, h, n, k), (b, g, m, k), (b, g, m, k if v is None else v)
    return [draw(*shape, seed=seed).double() for seed, shape in enumerate(shapes)]


def visible(n, m, lengths, is_causal, window):
    """Say which keys each query sees, one by one."""
    seen = torch.zeros(len(lengths), 1, n, m, dtype=torch.bool)
    for b, length in enumerate(lengths):
        for i in range(n):
            last = length - n + i if is_causal else length - 1
            for j in range(length):
                near = window is None or j > last - window
                seen[b, 0, i, j] = j <= last and near
    return seen


def assert_as_exact_as_naive(
    given, dtype, device, *, lengths=None, is_causal=True, window=None, scale=None, **terms
):
    """Hold to flash-attention's rule: at most twice the error of the equation in this dtype."""
    q, k, v = (t.to(device, dtype) for t in given)
    if v.shape[3] < k.shape[3]:
        v = k[..., : v.shape[3]]
    m = k.shape[2]
    mask = visible(q.shape[2], m, lengths or [m] * len(q), is_causal, window).to(device)
    run = {"mask": mask, "scale": scale}
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), **run)
    naive = scaled_dot_product_attention(q, k, v, **run)
    terms |= {"is_causal": is_causal, "window": window, "scale": scale}
    if lengths is not None:
        terms["lengths"] = torch.tensor(lengths, device=device)
        for b, length in enumerate(lengths):  # beyond lie numbers that would spoil everything
            k[b, :, length:] = v[b, :, length:] = torch.nan
    ours = decode_attention(q, k, v, **terms)
    assert ours.dtype == dtype
    error, allowed = ((t - exact).abs().max().item() for t in (ours, naive))
    assert error <= 2 * allowed + (1e-6 if dtype == torch.float32 else 1e-3)


@needs_triton
@both_dtypes
@pytest.mark.parametrize("m", [1, 17, 64, 65, 130])
@pytest.mark.parametrize("n_splits", [1, 3, None])
def test_lengths(n_splits, m, dtype, device):
    assert_as_exact_as_naive(tensors(4, 2, 1, m, 16), dtype, device, n_splits=n_splits)


@needs_triton
@both_dtypes
@pytest.mark.parametrize(
    ("h", "g", "n"), [(1, 1, 1), (2, 2, 3), (4, 2, 16), (8, 1, 2), (16, 1, 5), (3, 1, 6)]
)
def test_heads_and_queries_in_one_tile(h, g, n, dtype, device):
    """Few rows in a tile, a whole tile, and more than one tile."""
    assert_as_exact_as_naive(tensors(h, g, n, 50, 16), dtype, device, n_splits=2)


@needs_triton
@both_dtypes
@pytest.mark.parametrize("width", [1, 16, 40, 64, 128, 256])
def test_widths(width, dtype, device):
    assert_as_exact_as_naive(tensors(4, 2, 2, 40, width), dtype, device)


@needs_triton
@both_dtypes
@pytest.mark.parametrize(("k", "v"), [(576, 512), (24, 16), (36, 33)])
def test_values_within_the_keys(k, v, dtype, device):
    """The absorbed form of MLA: a value is the beginning of its key."""
    assert_as_exact_as_naive(tensors(6, 1, 3, 40, k, v, b=1), dtype, device, scale=0.1)


@needs_triton
@pytest.mark.parametrize(("k", "v"), [(24, 16), (16, 24)])
def test_values_of_another_width(k, v, device):
    q, k, v = (t.float().to(device) for t in tensors(4, 2, 2, 40, k, v))
    expected = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(decode_attention(q, k, v), expected)


@needs_triton
def test_values_that_begin_where_the_keys_do_but_are_others(device):
    """The keys are the first half of a tensor, the values every other one of its vectors."""
    q, both = (t.float().to(device) for t in tensors(4, 2, 2, 80, 16)[:2])
    k, v = both[:, :, :40], both[:, :, ::2]
    expected = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(decode_attention(q, k, v), expected)


@needs_triton
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7, 40, 200])
def test_own_lengths_and_windows(window, is_causal, device):
    """Of sequences with all keys, some, fewer than queries, and none."""
    terms = {"lengths": [70, 33, 2, 0], "is_causal": is_causal, "window": window, "n_splits": 2}
    assert_as_exact_as_naive(tensors(4, 2, 3, 70, 16, b=4), torch.float32, device, **terms)


@needs_triton
def test_what_lies_before_the_window_is_not_read(device):
    """A NaN there would spoil everything."""
    q, k, v = (t.float().to(device) for t in tensors(2, 1, 1, 130, 16))
    expected = decode_attention(q, k[:, :, -10:], v[:, :, -10:])
    k[:, :, :64] = v[:, :, :64] = torch.nan
    assert_close(decode_attention(q, k, v, window=10), expected)


@needs_triton
@pytest.mark.parametrize("scale", [0.0, -0.5, 2.0])
def test_scale(scale, device):
    given = tensors(4, 2, 2, 40, 16)
    assert_as_exact_as_naive(given, torch.float32, device, scale=scale)


@needs_triton
@pytest.mark.parametrize(
    ("number", "width", "cut"),
    [(*key, cut) for key, cuts in DECODE_CONFIGURATIONS.items() for cut in cuts],
)
def test_every_configuration(number, width, cut, monkeypatch, device):
    monkeypatch.setitem(DECODE_CONFIGURATIONS, (number, width), [cut])
    assert decode_configuration(width, 1, {2: torch.half, 4: torch.float}[number]) == cut
    for dtype in (d for d in DTYPES if d.itemsize == number):
        given = tensors(10, 1, 2, 2 * cut.block_n + 5, width, b=1)
        assert_as_exact_as_naive(given, dtype, device, n_splits=2)


@needs_triton
def test_strides(device):
    """As a cache gives them: a part of what is allocated; and in any other order."""
    q, k, v = (t.float().to(device) for t in tensors(4, 2, 2, 40, 16))
    expected = decode_attention(q, k, v)
    room = torch.full((2, 2, 2, 60, 16), torch.nan, device=device)
    room[0, :, :, :40], room[1, :, :, :40] = k, v
    assert torch.equal(decode_attention(q, *room[:, :, :, :40]), expected)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(decode_attention(*turned), expected)
    turned = [t.mT.contiguous().mT for t in (q, k, v)]
    assert torch.equal(decode_attention(*turned), expected)


@needs_triton
def test_as_pytorch_wants_its_operators(device):
    q, k, v = (t.float().to(device) for t in tensors(4, 2, 2, 9, 16))
    lengths = torch.tensor([9, 4], device=device)
    torch.library.opcheck(_decode, (q, k, v, lengths, True, 5, 0.3, 2))


@pytest.mark.parametrize(
    ("shapes", "terms", "message"),
    [
        ([(1, 4, 17, 8), (1, 2, 9, 8)], {}, "len_q must be an integer from 1 to 16; got 17"),
        ([(1, 4, 1, 600), (1, 2, 9, 600)], {}, "v_head_dim must be .* from 1 to 512; got 600"),
        ([(1, 4, 1, 8), (1, 2, 9, 8)], {"window": 0}, "window must be .* at least 1; got 0"),
        ([(1, 4, 1, 8), (1, 2, 9, 8)], {"n_splits": 0}, "n_splits must be .* at least 1; got 0"),
        ([(1, 4, 1, 8), (1, 2, 9, 6)], {}, "q and k must have the same width; got 8 and 6"),
        (
            [(1, 4, 1, 8), (1, 2, 9, 8)],
            {"lengths": torch.tensor([3, 4])},
            r"lengths must have shape \(batch,\) = \(1,\) on cpu; got \(2,\) on cpu",
        ),
    ],
)
def test_refused(shapes, terms, message, no_shape_checks):
    q, k = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        decode_attention(q, k, k, **terms)


def test_other_tensors_refused():
    q, k, v = torch.zeros(3, 1, 1, 1, 8)
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16; got torch\.float64"):
        decode_attention(q.double(), k.double(), v.double())
    with pytest.raises(ValueError, match="head_dim must be an integer from 1 to 70; got 80"):
        decode_attention(torch.zeros(1, 1, 1, 80), torch.zeros(1, 1, 1, 80), v[..., :6])
    with pytest.raises(RuntimeError, match="has no backward pass"):
        decode_attention(q.requires_grad_(), k, v)


def case(dtype: str, width: int, shared: bool, lengths: bool, cut: DecodeConfiguration):
    """Describe a compilation as it happens when the kernel is called."""
    signature = dict.fromkeys(["q", "k", "v"], f"*{dtype}:16")
    signature |= dict.fromkeys(["part", "lse"], "*fp32:16")
    signature |= dict.fromkeys(["len_q", "len_k", "n_splits", "window", "n_rows"], "i32")
    signature |= {a + b: "i32:16" for a in "qkv" for b in "bhgnm"}
    signature |= {"lengths": "*i64:16", "scale": "fp32"}
    constants = {"GROUP": 8, "CAUSAL": True, "SHARED": shared, "K": width + 64 * shared, "V": width}
    constants |= {"ROWS": cut.rows, "BLOCK_N": cut.block_n, "MAIN": width, "REST": 64}
    constants |= {} if lengths else {"lengths": None}
    options = {"num_warps": cut.num_warps, "num_stages": cut.num_stages}
    return ["decode_kernels", "attend_slice", signature, constants, options]


@needs_triton
def test_what_a_hopper_gpu_would_run(tmp_path):
    """Nothing spills, and shared memory suffices."""
    picks = [
        (dtype, width, width == 512, dtype == "fp16", cut)
        for (number, width), cuts in DECODE_CONFIGURATIONS.items()
        for cut in cuts
        for dtype in ("bf16", "fp16")
        if number == 2
    ]
    for pick, made in zip(picks, compiled([case(*p) for p in picks], tmp_path), strict=True):
        assert made["spilled"] == 0, (pick, made)
        assert made["shared"] <= 232_448, (pick, made)
