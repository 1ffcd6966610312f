"""Candidates are measured in turn on the same inputs, and only if what they compute is right."""

import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from time import perf_counter

import torch
from torch import Tensor

from tfm_ref.attention import scaled_dot_product_attention
from tfm_ref.bench import kernels, measure, peak_memory, peaks
from tfm_ref.candidates import Setting


def compare(table, runs, device, settings, candidates, time_limit, terms) -> dict[str, object]:
    """Measure candidates in turn on each setting, until the time is over."""
    rows, done, end = [], 0, perf_counter() + time_limit
    for setting in settings:
        if perf_counter() > end:
            break
        known = tried(prepare, setting, device)
        for name, run in product(filter(setting.suits, candidates), runs):
            attend = partial(table[name], is_causal=setting.is_causal)
            found = tried(run, attend, known, device, terms) if "failed" not in known else known
            told = {"candidate": name, "direction": run.__name__}
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
    found = {name: tried(lambda run=run: {"names": kernels(run)}) for name, run in runs.items()}
    return {name: result["names"] for name, result in found.items() if "names" in result}


def tried(run: Callable[..., dict[str, object]], *terms: object) -> dict[str, object]:
    """Measure, or say why not: one kernel that fails must not lose the measurements of others."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of each kernel that it cannot use
            return run(*terms)
    except Exception as problem:
        return {"failed": f"{type(problem).__name__}: {problem}".splitlines()[0][:200]}


def prepare(setting: Setting, device: torch.device | str) -> dict[str, list]:
    """Draw inputs, and compute for the first of them what is right, and what the dtype allows."""
    inputs = [setting.draw(device) for _ in range(2)]
    exact, rough = (_some_rows(setting, inputs[0], d) for d in (torch.float64, inputs[0][0].dtype))
    return {"inputs": inputs, "exact": exact, "rough": rough}


def forward(attend, known, device, terms) -> dict[str, object]:
    """Measure the output."""

    @torch.no_grad()
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)

    inputs, exact, rough = known.values()
    rows = _asking_rows(inputs[0][0])
    error = _error([run(*inputs[0])[:, :, rows]], exact[:1], rough[:1])
    return measure(run, inputs, device=device, error=error, limit=2.0, **terms)


def backward(attend, known, device, terms) -> dict[str, object]:
    """Measure the gradients of queries, keys and values; the memory is that of both directions."""

    def run(y: Tensor, dy: Tensor, *qkv: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, qkv, dy, retain_graph=True)

    def graph(qkv: list[Tensor]) -> tuple[Tensor, ...]:
        y = attend(*qkv)
        dy, rows = torch.zeros_like(y), _asking_rows(y)
        dy[:, :, rows] = asked(y[:, :, rows])
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


def asked(y: Tensor) -> Tensor:
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
    return [t.detach() for t in (y, *torch.autograd.grad(y, qkv, asked(y)))]


def _error(found: list[Tensor], exact: list[Tensor], rough: list[Tensor]) -> float:
    """Give the largest error, as a multiple of that of the equation in the same dtype.

    To the latter a last digit or two of the largest number are added: it may be 0 by chance.
    """
    ratios = []
    for a, b, c in zip(found, exact, rough, strict=True):
        digit = 2 * torch.finfo(c.dtype).eps * b.abs().max()
        ratios.append(float((a - b).abs().max() / ((c - b).abs().max() + digit)))
    return max(ratios)
