"""The measurements of the book: what runs against what, on which sizes, and is it right?

Each function measures on one device and gives what a record holds: a list of rows, with the
settings of each and the time of every run. A row whose result was wrong, or that could not run,
says so under "failed" and has no time. ``python -m tfm_ref.benchmarks FOLDER`` makes all records.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from tfm_ref.bench import kernels, measure, peaks
from tfm_ref.candidates import ATTENTIONS, DECODERS, Setting
from tfm_ref.comparison import asked, backward, compare, forward, prepare, tried
from tfm_ref.layers import FeedForward
from tfm_ref.masks import causal_mask
from tfm_ref.moe import MoELayer
from tfm_ref.records import new_record, save_record


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
    both = (forward, backward)
    return compare(ATTENTIONS, both, device, settings, candidates, time_limit, terms)


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
        attend, known = partial(attend, is_causal=True), prepare(setting, device)
        found = tried(forward, attend, known, device, terms)
        if torch.device(device).type == "cuda" and "failed" not in found:
            found["kernels"] = kernels(partial(attend, *known["inputs"][0]))
        rows.append({"candidate": name, **setting._asdict(), **found})
    return {"rows": rows}


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
    """Measure a decoding step: a few queries, many keys, which every query sees.

    What takes time is to read the keys. Arguments and returns are those of :func:`attention`, with
    the settings of chapter 13 and the candidates of DECODERS.
    """
    settings = list(decode_settings() if settings is None else settings)
    return compare(DECODERS, (forward,), device, settings, candidates, time_limit, terms)


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
            found = tried(_both_ways, layer, rows_in, name, x, expected, device, terms)
            told = {"candidate": name, "n_tokens": n_tokens, "dtype": str(dtype)[6:]}
            rows.append({**told, **inner, **outer, **found})
    return {"rows": rows, "peaks": peaks(device)}


def _passes(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run a layer forward and backward; give its output and the gradient of its input."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(asked(y))
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
        shared = ("bench", "benchmarks", "candidates", "comparison")
        modules = [f"tfm_ref.{module}" for module in (*self.modules, *shared)]
        return new_record(name, self.run(device, **terms), device=device, modules=modules)


BENCHMARKS = {
    "attention": Benchmark(
        attention, ("attention", "flash", "flash_triton", "flash_kernels", "launch")
    ),
    "decode": Benchmark(decode, ("attention", "decode_triton", "decode_kernels", "launch")),
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
