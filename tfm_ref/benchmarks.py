"""The measurements of the book: what runs against what, on which sizes, and is it right?

Each function measures on one device and gives what a record holds: a list of rows, with the
settings of each and the time of every run. A row whose result was wrong, or that could not run,
says so under "failed" and has no time. ``python -m tfm_ref.benchmarks FOLDER`` makes all records.
"""

import argparse
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tfm_ref.attention import scaled_dot_product_attention
from tfm_ref.bench import (
    copy_peak,
    kernels,
    matmul_peak,
    measure,
    new_record,
    peak_memory,
    read_peak,
    save_record,
)
from tfm_ref.decode_triton import decode_attention
from tfm_ref.flash import tiled_attention
from tfm_ref.flash_triton import triton_attention
from tfm_ref.layers import FeedForward
from tfm_ref.masks import causal_mask
from tfm_ref.moe import MoELayer
from tfm_ref.validation import check_choice

Attend = Callable[..., Tensor]


def pinned(*backends: SDPBackend) -> Attend:
    """Give PyTorch's attention, with its choice of a kernel narrowed down to these."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
        with sdpa_kernel(list(backends)):
            shared = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=shared)

    return attend


def flex(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
    """Give PyTorch's FlexAttention, compiled."""
    block_mask = _flex_causal(q.shape[2], k.shape[2], q.device) if is_causal else None
    shared = q.shape[1] != k.shape[1]
    return _flex_compiled()(q, k, v, block_mask=block_mask, enable_gqa=shared)


@cache
def _flex_compiled() -> Attend:
    return torch.compile(flex_attention, dynamic=False)


@cache
def _flex_causal(n: int, m: int, device: torch.device) -> BlockMask:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, n, m, device=device)


ATTENTIONS: dict[str, Attend] = {
    "naive": scaled_dot_product_attention,
    "math": pinned(SDPBackend.MATH),
    "efficient": pinned(SDPBackend.EFFICIENT_ATTENTION),
    "flash": pinned(SDPBackend.FLASH_ATTENTION),
    "cudnn": pinned(SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
    "tiled": tiled_attention,
    "triton": triton_attention,
}
"""What computes attention: the book's equation, PyTorch's kernels, the book's tiles and kernel."""


class Setting(NamedTuple):
    """Sizes of one attention; with ``latent``, so many first numbers of a key are its value, too.

    That is what the absorbed form of MLA attends to; else a value is as wide as a key.
    """

    batch: int
    n_heads: int
    n_kv_heads: int
    len_q: int
    len_k: int
    head_dim: int
    is_causal: bool
    dtype: str
    latent: int = 0

    def draw(self, device: torch.device | str) -> list[Tensor]:
        """Draw queries, keys and values, which want gradients; their errors need 32 bits or less.

        Raises:
            ValueError: if the dtype is another.
        """
        check_choice("dtype", self.dtype, ("float32", "float16", "bfloat16"))
        form = {"device": device, "dtype": getattr(torch, self.dtype), "requires_grad": True}
        width = self.head_dim
        q = torch.randn(self.batch, self.n_heads, self.len_q, width, **form)
        k, v = (torch.randn(self.batch, self.n_kv_heads, self.len_k, width, **form) for _ in "kv")
        return [q, k, k[..., : self.latent] if self.latent else v]

    def suits(self, candidate: str) -> bool:
        """Say whether a candidate is worth its time: FlexAttention is compiled for each size."""
        return candidate != "flex" or (
            (self.n_kv_heads, self.is_causal) == (8, True) and (self.len_q in (4096, 16384))
        )

    @property
    def flops(self) -> float:
        """Count the operations of the two products forward; backward takes 2.5 times as many."""
        pairs = self.len_q * self.len_k / (2 if self.is_causal else 1)
        widths = self.head_dim + (self.latent or self.head_dim)
        return 2 * self.batch * self.n_heads * pairs * widths

    @property
    def kv_bytes(self) -> int:
        """Count the bytes of keys and values: what decoding has to read."""
        numbers = self.head_dim if self.latent else 2 * self.head_dim
        size = getattr(torch, self.dtype).itemsize
        return self.batch * self.n_kv_heads * self.len_k * numbers * size


def flash_settings() -> Iterator[Setting]:
    """List what chapter 12 compares, what matters most first: 8,192 tokens, or one sequence."""
    lengths = [4096, 16384, 8192, 2048, 1024, 512, 32768]
    for n_kv_heads, is_causal in [(8, True), (64, True), (8, False), (64, False)]:
        for n in lengths if (n_kv_heads, is_causal) == (8, True) else lengths[::2]:
            for head_dim in (128, 64):
                batch = max(1, 8192 // n)
                yield Setting(batch, 64, n_kv_heads, n, n, head_dim, is_causal, "bfloat16")


def attention(
    device: torch.device | str,
    settings: Iterable[Setting] | None = None,
    candidates: Sequence[str] = tuple(ATTENTIONS),
    *,
    time_limit: float = 300.0,
    **terms: float,
) -> dict[str, object]:
    """Measure attention, forward and backward.

    Args:
        device: where to compute.
        settings: on which sizes; those of chapter 12 if not given.
        candidates: names from ATTENTIONS.
        time_limit: seconds after which no further setting is begun.
        terms: as for :func:`tfm_ref.bench.time_runs`.

    Returns:
        "rows"; "left_out", the number of settings not begun; "peaks" of the device; on a GPU the
        "kernels" that ran on the first setting, by candidate. The error of a row is that of its
        output, or the largest of its gradients, as a multiple of the error of the equation in the
        same dtype; it may be 2.
    """
    settings = list(flash_settings() if settings is None else settings)
    both = (_forward, _backward)
    return _compare(ATTENTIONS, both, device, settings, candidates, time_limit, terms)


def _compare(table, runs, device, settings, candidates, time_limit, terms) -> dict[str, object]:
    """Measure candidates in turn on each setting, until the time is over."""
    rows, done, end = [], 0, perf_counter() + time_limit
    for setting in settings:
        if perf_counter() > end:
            break
        known = _tried(_known, setting, device)
        for name, run in product(filter(setting.suits, candidates), runs):
            attend = partial(table[name], is_causal=setting.is_causal)
            found = _tried(run, attend, known, device, terms) if "failed" not in known else known
            told = {"candidate": name, "direction": run.__name__.strip("_")}
            rows.append({**told, **setting._asdict(), **found})
        done += 1
    found = {"rows": rows, "left_out": len(settings) - done, "peaks": peaks(device)}
    if torch.device(device).type == "cuda":  # at the end: a profiler may slow down what follows
        found["kernels"] = _kernels_of(table, candidates, settings[0].draw(device), settings[0])
    return found


@torch.no_grad()
def _kernels_of(table, candidates, qkv, setting) -> dict[str, list[str]]:
    """Name the kernels that really run, by candidate."""
    runs = {name: partial(table[name], *qkv, is_causal=setting.is_causal) for name in candidates}
    found = {name: _tried(lambda run=run: {"names": kernels(run)}) for name, run in runs.items()}
    return {name: result["names"] for name, result in found.items() if "names" in result}


def _tried(run: Callable[..., dict[str, object]], *terms: object) -> dict[str, object]:
    """Measure, or say why not: one kernel that fails must not lose the measurements of others."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of each kernel that it cannot use
            return run(*terms)
    except Exception as problem:
        return {"failed": f"{type(problem).__name__}: {problem}".splitlines()[0][:200]}


def _known(setting: Setting, device: torch.device | str) -> dict[str, list]:
    """Draw inputs, and compute for the first of them what is right, and what the dtype allows."""
    inputs = [setting.draw(device) for _ in range(2)]
    exact, rough = (_some_rows(setting, inputs[0], d) for d in (torch.float64, inputs[0][0].dtype))
    return {"inputs": inputs, "exact": exact, "rough": rough}


def _forward(attend, known, device, terms) -> dict[str, object]:
    """Measure the output."""

    @torch.no_grad()
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)

    inputs, exact, rough = known.values()
    rows = _asking_rows(inputs[0][0])
    error = _error([run(*inputs[0])[:, :, rows]], exact[:1], rough[:1])
    return measure(run, inputs, device=device, error=error, limit=2.0, **terms)


def _backward(attend, known, device, terms) -> dict[str, object]:
    """Measure the gradients of queries, keys and values; the memory is that of both directions."""

    def run(y: Tensor, dy: Tensor, *qkv: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, qkv, dy, retain_graph=True)

    def graph(qkv: list[Tensor]) -> tuple[Tensor, ...]:
        y = attend(*qkv)
        dy, rows = torch.zeros_like(y), _asking_rows(y)
        dy[:, :, rows] = _asked(y[:, :, rows])
        return (y, dy, *qkv)

    inputs, exact, rough = known.values()
    graphs = [graph(qkv) for qkv in inputs]
    dq, dk, dv = run(*graphs[0])
    error = _error([dq[:, :, _asking_rows(dq)], dk, dv], exact[1:], rough[1:])
    right = {"error": error, "limit": 2.0}
    found = measure(run, graphs, device=device, **right, **terms)
    graphs.clear()
    return found | {"peak_bytes": peak_memory(lambda: run(*graph(inputs[0])), device=device)}


def _asking_rows(q: Tensor) -> Tensor:
    """Choose 128 queries at most, the last among them: all of them would need n × m numbers."""
    n = q.shape[2]
    return torch.arange(n - 1, -1, n // -128, device=q.device).flip(0)


def _asked(y: Tensor) -> Tensor:
    """Give the gradient of a loss by these rows of the output, the same number in every dtype."""
    numbers = torch.arange(y.numel(), device=y.device) % 5 - 2
    return numbers.reshape(y.shape).to(y.dtype)


def _some_rows(setting: Setting, qkv: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Compute some rows of the output by the equation, and the gradients that these rows ask for.

    The others ask for nothing. So the gradients of all keys and values are known too.
    """
    q, k, v = (t.detach().to(dtype) for t in qkv)
    rows = _asking_rows(q)
    qkv = [t.requires_grad_() for t in (q[:, :, rows], k, v)]
    sees = rows[:, None] + k.shape[2] - q.shape[2] >= torch.arange(k.shape[2], device=k.device)
    mask = sees[None, None] if setting.is_causal else None
    y = scaled_dot_product_attention(*qkv, mask=mask)
    return [t.detach() for t in (y, *torch.autograd.grad(y, qkv, _asked(y)))]


def _error(found: list[Tensor], exact: list[Tensor], rough: list[Tensor]) -> float:
    """Give the largest error, as a multiple of that of the equation in the same dtype.

    To the latter a last digit or two of the largest number are added: it may be 0 by chance.
    """
    ratios = []
    for a, b, c in zip(found, exact, rough, strict=True):
        digit = 2 * torch.finfo(c.dtype).eps * b.abs().max()
        ratios.append(float((a - b).abs().max() / ((c - b).abs().max() + digit)))
    return max(ratios)


def peaks(device: torch.device | str) -> dict[str, float]:
    """Measure what the device can do at most: operations and bytes per second."""
    gpu = torch.device(device).type == "cuda"
    dtype, size, n_bytes = (torch.bfloat16, 8192, 2**31) if gpu else (torch.float32, 512, 2**26)
    return {
        "matmul": matmul_peak(device, dtype, size=size),
        "copy": copy_peak(device, n_bytes=n_bytes),
        "read": read_peak(device, n_bytes=n_bytes),
    }


def choices(device: torch.device | str) -> dict[str, object]:
    """Ask PyTorch which of its kernels it would take, and see which ones a GPU then runs.

    Returns:
        "rows", with "backend" as PyTorch names it and, on a GPU, the "kernels" that ran.
    """
    rows = []
    for dtype, head_dim, kind in product(
        ("float32", "float16", "bfloat16"), (64, 128, 256, 512), ("full", "causal", "mask", "GQA")
    ):
        setting = Setting(1, 8, 2 if kind == "GQA" else 8, 1024, 1024, head_dim, False, dtype)
        with torch.no_grad():
            q, k, v = setting.draw(device)
            mask = causal_mask(1024, 1024, device=device) if kind == "mask" else None
            terms = {"is_causal": kind == "causal", "enable_gqa": kind == "GQA"}
            backend = SDPBackend(torch._fused_sdp_choice(q, k, v, mask, 0.0, **terms)).name
            row = {"dtype": dtype, "head_dim": head_dim, "kind": kind, "backend": backend}
            if q.is_cuda:
                run = partial(F.scaled_dot_product_attention, q, k, v, mask, 0.0, **terms)
                row["kernels"] = kernels(run)
        rows.append(row)
    return {"rows": rows}


def plain_benchmark(
    device: torch.device | str,
    sizes: tuple[int, int, int, int] = (4, 32, 4096, 128),
    **terms: float,
) -> dict[str, object]:
    """Time what a common benchmark of "FlashAttention" runs, as it is written and as it is meant.

    As it is written: in float32, which is what torch.randn gives. As it is meant: in bfloat16,
    and against PyTorch's plain products. Causal, with as many heads of keys as of queries.

    Args:
        device: where to compute.
        sizes: batch, n_heads, length and head_dim.
        terms: as for :func:`tfm_ref.bench.time_runs`.

    Returns:
        "rows" of time and memory; on a GPU with the "kernels" that ran.
    """
    rows, (batch, n_heads, n, head_dim) = [], sizes
    candidates = {"PyTorch's choice": F.scaled_dot_product_attention, "math": ATTENTIONS["math"]}
    for dtype, (name, attend) in product(("float32", "bfloat16"), candidates.items()):
        setting = Setting(batch, n_heads, n_heads, n, n, head_dim, True, dtype)
        attend, known = partial(attend, is_causal=True), _known(setting, device)
        found = _tried(_forward, attend, known, device, terms)
        if torch.device(device).type == "cuda" and "failed" not in found:
            found["kernels"] = kernels(partial(attend, *known["inputs"][0]))
        rows.append({"candidate": name, **setting._asdict(), **found})
    return {"rows": rows}


DECODERS: dict[str, Attend] = {
    name: ATTENTIONS[name] for name in ("math", "efficient", "flash", "cudnn")
} | {"triton": decode_attention}
"""What computes attention for a few new queries against many keys."""


def decode_settings() -> Iterator[Setting]:
    """List what chapter 13 compares, what matters most first."""
    for n_queries in (1, 4, 2, 8):
        for batch, len_k in [(16, 8192), (1, 131072), (128, 2048), (1, 8192)]:
            for n_kv_heads in (8, 64, 1):
                yield Setting(batch, 64, n_kv_heads, n_queries, len_k, 128, False, "bfloat16")
            yield Setting(batch, 128, 1, n_queries, len_k, 576, False, "bfloat16", latent=512)


def decode(
    device: torch.device | str,
    settings: Iterable[Setting] | None = None,
    candidates: Sequence[str] = tuple(DECODERS),
    *,
    time_limit: float = 90.0,
    **terms: float,
) -> dict[str, object]:
    """Measure a decoding step: a few queries, many keys.

    Every query sees all keys: what takes time is to read them.

    Args:
        device: where to compute.
        settings: on which sizes; those of chapter 13 if not given.
        candidates: names from DECODERS.
        time_limit: seconds after which no further setting is begun.
        terms: as for :func:`tfm_ref.bench.time_runs`.

    Returns:
        As :func:`attention`.
    """
    settings = list(decode_settings() if settings is None else settings)
    return _compare(DECODERS, (_forward,), device, settings, candidates, time_limit, terms)


def experts(
    device: torch.device | str,
    sizes: Iterable[tuple[int, int, int, int, int]] = (
        (64, 8, 2048, 1024, 1024),
        (64, 8, 2048, 1024, 4096),
        (64, 8, 2048, 1024, 8192),
        (8, 2, 4096, 14336, 4096),
    ),
    **terms: float,
) -> dict[str, object]:
    """Measure a mixture of experts, forward and backward, against its loop and a dense layer.

    Args:
        device: where to compute; in bfloat16 on a GPU, in float32 on the CPU.
        sizes: n_experts, top_k, d_model, d_ff and number of tokens.
        terms: as for :func:`tfm_ref.bench.time_runs`.

    Returns:
        "rows": "naive" and "sorted" are the layer's backends; "dense" is one feed-forward of the
        size of an expert on as many rows as there are assignments, so of as many operations. The
        error of a row is its distance from the loop, in output and gradient of the input, as a
        share of the largest number; 4 times the precision of the dtype are allowed.
    """
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    rows = []
    for n_experts, top_k, d_model, d_ff, n_tokens in sizes:
        inner = {"d_model": d_model, "d_ff": d_ff}
        outer = {"n_experts": n_experts, "top_k": top_k}
        layers = {name: MoELayer(**inner, **outer, backend=name) for name in ("naive", "sorted")}
        layers["sorted"].load_state_dict(layers["naive"].state_dict())
        layers["dense"] = FeedForward(**inner, activation="silu", gated=True, bias=False)
        x, expected = torch.randn(1, n_tokens, d_model, device=device, dtype=dtype), None
        for name, layer in layers.items():
            layer.to(device, dtype)
            rows_in = torch.cat([x] * top_k, 1) if name == "dense" else x
            expected = _passes(layer, x) if name == "naive" else expected
            found = _tried(_both_ways, layer, rows_in, name, x, expected, device, terms)
            told = {"candidate": name, "n_tokens": n_tokens, "dtype": str(dtype)[6:]}
            rows.append({**told, **inner, **outer, **found})
    return {"rows": rows, "peaks": peaks(device)}


def _passes(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run a layer forward and backward; give its output and the gradient of its input."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(_asked(y))
    layer.zero_grad()
    return y.detach(), x.grad


def _both_ways(layer, rows, name, x, expected, device, terms) -> dict[str, object]:
    """Measure a layer forward and backward."""
    error = 0.0
    if name != "dense":
        pairs = zip(_passes(layer, x), expected, strict=True)
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    limit = 4 * torch.finfo(x.dtype).eps
    run = partial(_passes, layer)
    return measure(run, [[rows]], device=device, error=error, limit=limit, **terms)


class Benchmark(NamedTuple):
    """What is measured, and the modules whose code it measures."""

    run: Callable[..., dict[str, object]]
    modules: tuple[str, ...]

    def record(self, name: str, device: torch.device | str, **terms: object) -> dict[str, object]:
        """Measure, and put beside it all that it takes to judge it later."""
        modules = [f"tfm_ref.{module}" for module in (*self.modules, "bench", "benchmarks")]
        return new_record(name, self.run(device, **terms), device=device, modules=modules)


FLASH = ("attention", "flash", "flash_triton", "flash_kernels")
BENCHMARKS = {
    "attention": Benchmark(attention, FLASH),
    "decode": Benchmark(decode, ("attention", "decode_triton", "decode_kernels")),
    "experts": Benchmark(experts, ("layers", "routing", "grouped", "moe")),
    "choices": Benchmark(choices, ()),
    "plain_benchmark": Benchmark(plain_benchmark, ()),
}
"""All records but that of Multi30k, by name."""


def main() -> None:
    """Write the records that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the records go")
    parser.add_argument("names", nargs="*", help="records to make; all if none is named")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    for name in arguments.names or BENCHMARKS:
        record = BENCHMARKS[name].record(name, arguments.device)
        save_record(record, arguments.folder)


if __name__ == "__main__":
    main()
