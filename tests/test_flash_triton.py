"""The Triton kernels against the equation in float64; on the CPU they run in the interpreter."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
from oracles import draw
from torch.testing import assert_close

from tfm_ref import scaled_dot_product_attention
from tfm_ref.flash_triton import (
    CONFIGURATIONS,
    Configuration,
    _attention,
    _backward,
    configurations,
    triton_attention,
)
from tfm_ref.launch import kernels_for

TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")
DTYPES = [torch.float32, torch.float16]
if os.environ.get("TFM_REF_DEVICE", "cpu") != "cpu":
    DTYPES.append(torch.bfloat16)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_reaches = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


def test_linux_has_triton():
    """So that none of these tests is skipped where it could run."""
    assert TRITON or sys.platform != "linux"


def tensors(h, g, n, m, k, *, b=1):
    """Draw queries, keys, values and a gradient of the output, in float64."""
    shapes = (b, h, n, k), (b, g, m, k), (b, g, m, k), (b, h, n, k)
    return [draw(*shape, seed=seed).double() for seed, shape in enumerate(shapes)]


def outcome(attend, q, k, v, do, **terms):
    """Give the output and the gradients."""
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    y = attend(*inputs, **terms)
    return [y.detach(), *torch.autograd.grad(y, inputs, do)]


def assert_as_exact_as_naive(given, dtype, device, **terms):
    """Hold to flash-attention's rule: at most twice the error of the equation in this dtype."""
    given = [t.to(device, dtype) for t in given]
    exact = outcome(scaled_dot_product_attention, *(t.double() for t in given), **terms)
    naive = outcome(scaled_dot_product_attention, *given, **terms)
    ours = outcome(triton_attention, *given, **terms)
    slack = 1e-5 if dtype == torch.float32 else 4e-3
    for name, a, b, c in zip(("y", "dq", "dk", "dv"), exact, naive, ours, strict=True):
        assert c.dtype == dtype
        assert c.shape == a.shape
        error, allowed = ((t - a).abs().max().item() for t in (c, b))
        assert error <= 2 * allowed + slack, f"{name}: {error} against {allowed}"


# --- what they compute


@needs_triton
@both_dtypes
@both_reaches
@pytest.mark.parametrize(
    ("n", "m"),
    [(1, 1), (17, 17), (64, 64), (65, 65), (130, 130), (17, 65), (65, 17), (1, 130), (130, 1)],
)
def test_lengths(n, m, is_causal, dtype, device):
    assert_as_exact_as_naive(tensors(2, 1, n, m, 16), dtype, device, is_causal=is_causal)


@needs_triton
@both_dtypes
@both_reaches
@pytest.mark.parametrize(("h", "g"), [(2, 2), (4, 2), (4, 1), (1, 1)])
def test_heads(h, g, is_causal, dtype, device):
    given = tensors(h, g, 33, 40, 16, b=2)
    assert_as_exact_as_naive(given, dtype, device, is_causal=is_causal)


@needs_triton
@both_dtypes
@pytest.mark.parametrize("width", [1, 16, 40, 64, 128, 200])
def test_widths(width, dtype, device):
    """Those that are no power of two, and those whose rows fill no 16 bytes, too."""
    assert_as_exact_as_naive(tensors(2, 1, 40, 33, width), dtype, device, is_causal=True)


@needs_triton
@pytest.mark.parametrize("scale", [0.0, -0.5, 2.0])
def test_scale(scale, device):
    given = tensors(2, 1, 20, 20, 16)
    assert_as_exact_as_naive(given, torch.float32, device, scale=scale, is_causal=True)


@needs_triton
def test_large_scores(device):
    """Scores of ±10,000: the largest takes all, and nothing overflows."""
    given = [50 * t.to(device) for t in tensors(2, 1, 40, 40, 16)]
    y, *gradients = outcome(triton_attention, *(t.float() for t in given), is_causal=True)
    assert_close(
        y.double(), scaled_dot_product_attention(*given[:3], is_causal=True), rtol=0, atol=1
    )
    assert all(gradient.isfinite().all() for gradient in gradients)


PICKS = [
    pytest.param(kernel, number, width, cut, id=f"{kernel}-{8 * number}-{width}-{cut[:4]}")
    for (kernel, number), by_width in CONFIGURATIONS.items()
    for width, cuts in by_width.items()
    for cut in cuts
]


@needs_triton
@both_reaches
@pytest.mark.parametrize(("kernel", "number", "width", "cut"), PICKS)
def test_every_configuration(kernel, number, width, cut, is_causal, monkeypatch, device):
    """Output and gradients, with several blocks of queries and of keys, and a ragged tail."""
    monkeypatch.setitem(CONFIGURATIONS[kernel, number], width, [cut])
    assert configurations(kernel, width, {2: torch.float16, 4: torch.float32}[number]) == [cut]
    for dtype in (d for d in DTYPES if d.itemsize == number):
        given = tensors(2, 1, cut.block_m + 9, cut.block_n + 18, width)
        assert_as_exact_as_naive(given, dtype, device, is_causal=is_causal)


@needs_triton
@pytest.mark.parametrize("past", [1, 30, 31])
def test_where_the_diagonal_meets_the_end_of_a_block(past, device):
    """One key more than whole blocks, and one fewer than the first row sees."""
    blocks = {
        configurations(kernel, 16, torch.float32)[0].block_n for kernel in ("forward", "backward_q")
    }
    assert blocks == {32}
    given = tensors(1, 1, 67, 67 + past, 16)
    assert_as_exact_as_naive(given, torch.float32, device, is_causal=True)


# --- how they compute


@needs_triton
def test_a_query_without_keys_takes_nothing(device):
    """Its output is 0, and it gives no gradient to anything."""
    given = [t.float().to(device) for t in tensors(2, 1, 70, 3, 16)]
    y, dq, dk, dv = outcome(triton_attention, *given, is_causal=True)
    for t in y, dq:
        assert (t[:, :, :67] == 0).all()
        assert (t[:, :, -3:] != 0).any()
    alone = [t[:, :, -3:] for t in given]
    assert_close((dk, dv), tuple(outcome(triton_attention, *alone, is_causal=True)[2:]))


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_blocks_above_the_diagonal_are_skipped(device):
    """A NaN in a block would spread over all that is computed with it."""
    q, k, v, do = (t.float().to(device) for t in tensors(1, 1, 256, 256, 16))
    k[:, :, 128:] = v[:, :, 128:] = torch.nan
    y, dq, _, _ = outcome(triton_attention, q, k, v, do, is_causal=True)
    assert y[:, :, :128].isfinite().all()
    assert dq[:, :, :128].isfinite().all()
    q, k, v, do = (t.float().to(device) for t in tensors(1, 1, 256, 256, 16))
    q[:, :, :128] = torch.nan
    _, _, dk, dv = outcome(triton_attention, q, k, v, do, is_causal=True)
    assert dk[:, :, 128:].isfinite().all()
    assert dv[:, :, 128:].isfinite().all()


@needs_triton
def test_strides(device):
    """How tensors lie in memory does not matter: not a bit."""
    given = [t.half().to(device) for t in tensors(2, 2, 20, 20, 16, b=2)]
    expected = outcome(triton_attention, *given)

    def shifted(t):
        room = t.new_empty(t.numel() + 1)[1:].view(t.shape)
        return room.copy_(t)

    for lay in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: torch.cat([t, t[..., :3]], -1)[..., :16],
        shifted,
    ):
        for a, b in zip(outcome(triton_attention, *map(lay, given)), expected, strict=True):
            assert torch.equal(a, b)
    one = [t[:1, :1] for t in given]
    many = [t.expand(2, 2, -1, -1) for t in one]
    assert torch.equal(triton_attention(*many[:3]), triton_attention(*one[:3]).expand(2, 2, 20, 16))


@needs_triton
def test_same_bits_again(device):
    given = [t.half().to(device) for t in tensors(4, 2, 70, 70, 16)]
    first, second = (outcome(triton_attention, *given, is_causal=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
def test_the_weights_are_never_stored(device):
    """Autograd keeps no tensor as large as one head's weights."""
    sizes = []
    q, k, v, _ = (t.float().to(device) for t in tensors(1, 1, 130, 130, 16))

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        triton_attention(q.requires_grad_(), k, v)
    assert max(sizes) == q.numel() < 130 * 130


@needs_triton
def test_a_tokens_heads_lie_side_by_side(device):
    """So that a layer can join them without a copy."""
    q, k, v, _ = (t.float().to(device) for t in tensors(2, 1, 5, 5, 16))
    assert triton_attention(q, k, v).transpose(1, 2).is_contiguous()


@needs_triton
def test_as_pytorch_wants_its_operators(device):
    q, k, v, do = (t.float().to(device) for t in tensors(2, 1, 9, 12, 16))
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(_attention, (*inputs, True, 0.3))
    o, lse = _attention(q, k, v, True, 0.3)
    torch.library.opcheck(_backward, (do, q, k, v, o, lse, True, 0.3))
    assert not _attention(*inputs, True, 0.3)[1].requires_grad


@needs_triton
def test_the_sums_are_those_of_the_softmax(device):
    """Log2 of the sum of e^score, and +inf for a query without keys."""
    q, k, v, _ = (t.float().to(device) for t in tensors(1, 1, 5, 3, 16))
    lse = _attention(q, k, v, True, 0.3)[1]
    scores = (0.3 * q @ k.mT).masked_fill(~torch.ones(5, 3, device=device).tril(-2).bool(), -9e9)
    expected = scores.logsumexp(-1) / torch.tensor(2.0).log()
    expected[:, :, :2] = torch.inf
    assert_close(lse, expected)


@needs_triton
def test_compiles_whole():
    """No graph break, forward and backward: in a Python of its own, without shape checks."""
    program = """
import torch, tfm_ref
attention = tfm_ref.MultiHeadAttention(d_model=8, n_heads=4, n_kv_heads=2, backend="triton")
x = torch.randn(2, 5, 8, requires_grad=True)
expected = torch.autograd.grad(attention(x, is_causal=True).square().sum(), x)
for backend in "eager", "aot_eager":
    compiled = torch.compile(attention, fullgraph=True, backend=backend)
    y = compiled(x, is_causal=True)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x), expected)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@needs_triton
def test_autocast(monkeypatch, device):
    """Under autocast it computes in the dtype of autocast, whatever mixture comes in."""
    q, k, v, _ = (t.float().to(device) for t in tensors(2, 1, 9, 9, 16))
    with torch.autocast(device, torch.float16):
        y = triton_attention(q, k.half(), v)
    assert torch.equal(y, triton_attention(q.half(), k.half(), v.half()))


# --- what they refuse


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"mask": torch.ones(1, 1, 4, 4).bool()}, 'have no mask; use backend "sdpa"'),
        ({"bias": torch.ones(1, 1, 4, 4)}, 'have no bias; use backend "sdpa"'),
        ({"sinks": torch.ones(2)}, 'have no sinks; use backend "sdpa"'),
        ({"softcap": 3.0}, 'have no softcap; use backend "naive"'),
        ({"dropout": 0.1}, 'have no dropout; use backend "sdpa"'),
        ({"dropout": 1.0}, "dropout must lie in 0 <= dropout < 1; got 1.0"),
    ],
)
def test_terms_refused(terms, message):
    with pytest.raises(ValueError, match=message):
        triton_attention(*torch.zeros(3, 1, 2, 4, 8), **terms)


@pytest.mark.parametrize(
    ("shapes", "dtype", "message"),
    [
        (((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 6)), torch.float32, 'got 8 and 6. Use .*"sdpa"'),
        (((1, 2, 4, 257),) * 3, torch.float32, "at most 256; got 257 and 257"),
        (((1, 2, 4, 8),) * 3, torch.float64, 'got torch.float64. Use backend "sdpa"'),
        (((2, 4, 8),) * 3, torch.float32, "q must have 4 axes"),
    ],
)
def test_tensors_refused(shapes, dtype, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        triton_attention(*(torch.zeros(shape, dtype=dtype) for shape in shapes))


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match=r'need Triton: pip install triton .* backend "sdpa"'):
        triton_attention(*torch.zeros(3, 1, 2, 4, 8))


@needs_triton
def test_without_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"need a GPU; got tensors on cpu.*TRITON_INTERPRET=1"):
        triton_attention(*torch.zeros(3, 1, 2, 4, 8))


@needs_triton
def test_the_interpreter_gets_no_bfloat16(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q = torch.zeros(1, 2, 4, 8).bfloat16()
    with pytest.raises(RuntimeError, match="interpreter multiplies bfloat16 wrongly"):
        kernels_for(q, "flash_kernels")


def test_without_triton_the_package_is_whole():
    """To import it nobody needs Triton."""
    program = "import sys; sys.modules['triton'] = None; import tfm_ref"
    subprocess.run([sys.executable, "-c", program], check=True)


# --- what the compiler makes of them


def compiled(cases, tmp_path):
    """Compile for a Hopper GPU in a Python without the interpreter."""
    environment = {name: t for name, t in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run(
        [sys.executable, script],
        input=json.dumps(cases),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def case(kernel: str, dtype: str, width: int, is_causal: bool, cut: Configuration):
    """Describe a compilation as it happens when the kernel is called."""
    signature = {"lse": "*fp32", "delta": "*fp32", "scale": "fp32"}
    signature |= dict.fromkeys(["n_heads", "group", "len_q", "len_k"], "i32")
    for names, rows in ("q o do dq", cut.block_m), ("k v dk dv", cut.block_n):
        signature |= dict.fromkeys(names.split(), f"tensordesc<{dtype}[1, 1, {rows}, {width}]>")
    constants = {"CAUSAL": is_causal, "WIDTH": width}
    constants |= {"BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n}
    options = {"num_warps": cut.num_warps, "num_stages": cut.num_stages}
    return ["flash_kernels", kernel, signature, constants, options]


@needs_triton
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_what_a_hopper_gpu_would_run(dtype, tmp_path):
    """Tensor cores multiply, descriptors load, nothing spills, and shared memory suffices."""
    picks = [
        (kernel, dtype, width, is_causal, cut)
        for (kernel, number), by_width in CONFIGURATIONS.items()
        for width, cuts in by_width.items()
        for cut, is_causal in product(cuts, [False, True])
        if number == 2 and (width < 256 or dtype == "bf16")
    ]
    for pick, made in zip(picks, compiled([case(*p) for p in picks], tmp_path), strict=True):
        assert made["wgmma"] == (pick[0] != "row_dots"), pick
        assert made["tma"], pick
        assert made["spilled"] == 0, (pick, made)
        assert made["shared"] <= 232_448, (pick, made)
