"""Linear layers of groups against one at a time, and where they can be one call."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from oracles import draw
from torch.testing import assert_close

from tfm_ref import grouped
from tfm_ref.grouped import grouped_linear

COUNTS = [[2, 0, 3], [0, 5, 0], [0, 0, 5], [1, 1, 3]]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [8, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_grouped_linear(dtype, width, bias, counts, device, monkeypatch):
    """Each group of rows by itself, values and gradients; one call wherever it can be one."""
    calls, product = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: calls.append(1) or product(*a, **k))
    tensors = draw(5, width), draw(3, 24, width, seed=1), draw(3, 24, seed=2)
    x, weight, biases = (t.to(device, dtype).requires_grad_() for t in tensors)
    leaves = [x, weight, biases] if bias else [x, weight]
    y = grouped_linear(*leaves, counts=torch.tensor(counts, device=device))
    rows = zip(x.split(counts), weight, biases, strict=True)
    expected = torch.cat([F.linear(t, w, b if bias else None) for t, w, b in rows])
    near = {"atol": 0.3, "rtol": 0.05} if y.itemsize == 2 else {"atol": 1e-5, "rtol": 1e-5}
    assert_close(y, expected, **near)
    gradients = (torch.autograd.grad(t.square().sum(), leaves) for t in (y, expected))
    assert_close(*gradients, **near)
    assert bool(calls) == (dtype != torch.float64 and width * y.itemsize % 16 == 0)


@pytest.mark.usefixtures("no_shape_checks")
def test_grouped_linear_knows_where_it_can_be_one_call(monkeypatch):
    """Old GPUs have no grouped product, nor have devices of other kinds."""
    for capability, able in ((7, 5), False), ((8, 0), True), ((9, 0), True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        x = SimpleNamespace(dtype=torch.bfloat16, itemsize=2, device=torch.device("cuda:0"))
        assert grouped._can_group(x, torch.zeros(2, 8, 8)) is able
    x.device = torch.device("mps")
    assert not grouped._can_group(x, torch.zeros(2, 8, 8))
    assert not grouped._can_group(torch.zeros(5, 8), torch.zeros(2, 8, 8).mT)


def test_grouped_linear_obeys_autocast(device):
    x, weight, bias = (t.to(device) for t in (draw(5, 8), draw(2, 16, 8), draw(2, 16)))
    counts = torch.tensor([2, 3], device=device)
    with torch.autocast(device, torch.bfloat16):
        y = grouped_linear(x, weight, bias, counts=counts)
    half = (t.bfloat16() for t in (x, weight, bias))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, grouped_linear(*half, counts=counts))
