"""The memory that counts: its own arithmetic, exact outputs, closed forms and their growth."""

import re
from itertools import product
from math import log

import pytest
import torch
from oracles import draw
from torch.testing import assert_close

from tfm_ref.traffic import (
    Memory,
    block_size,
    crossover,
    flash2_attention,
    flash_attention,
    flash_backward,
    naive_attention,
    numbers_moved,
)

FORWARDS = {"naive": naive_attention, "flash": flash_attention, "flash2": flash2_attention}
SIZES = [(8, 2, 40), (9, 2, 24), (32, 8, 84), (33, 8, 200), (33, 4, 4000), (64, 16, 2000)]


def exact(q, k, v):
    return (q @ k.T / q.shape[1] ** 0.5).softmax(-1) @ v


# --- the memory


def test_what_moves_is_counted():
    memory, x, y = Memory(sram=10), draw(4), torch.zeros(2, 4)
    with memory.room():
        loaded = memory.load(x)
        assert (memory.held, memory.loaded, memory.stored, memory.traffic) == (4, 4, 0, 4)
        with memory.room():
            memory.store(memory.hold(loaded + 1), y[1])
            assert memory.held == 8
        assert memory.held == 4
    assert (memory.held, memory.loaded, memory.stored, memory.traffic) == (0, 4, 4, 8)
    assert torch.equal(y, torch.stack([torch.zeros(4), x + 1]))


def test_what_is_loaded_is_a_copy():
    memory, x = Memory(sram=10), torch.zeros(4)
    with memory.room():
        memory.load(x).add_(1)
    assert torch.equal(x, torch.zeros(4))


def test_a_full_memory_refuses():
    memory = Memory(sram=10)
    with memory.room():
        memory.load(torch.zeros(2, 3))
        message = "the fast memory holds 10 numbers, 6 of them taken; got 5 more"
        with pytest.raises(ValueError, match=f"^{message}$"):
            memory.load(torch.zeros(5))
        with pytest.raises(ValueError, match=f"^{message}$"):
            memory.hold(torch.zeros(5))
        memory.load(torch.zeros(4))


# --- what is computed on it


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("form", FORWARDS)
def test_forward_is_exact_and_moves_its_closed_form(form, sizes):
    n, d, sram = sizes
    q, k, v = draw(3, n, d).double()
    memory = Memory(sram=sram)
    y = FORWARDS[form](memory, q, k, v)
    if form == "flash2":
        y, lse = y
        assert_close(lse, (q @ k.T / d**0.5).logsumexp(-1))
    assert_close(y, exact(q, k, v))
    assert memory.traffic == numbers_moved(form, n=n, d=d, sram=sram)
    assert memory.held == 0


@pytest.mark.parametrize("sizes", [size for size in SIZES if size[2] >= 2 * (5 * size[1] + 2)])
def test_backward_is_exact_and_moves_its_closed_form(sizes):
    n, d, sram = sizes
    q, k, v, dy = draw(4, n, d).double()
    y, lse = flash2_attention(Memory(sram=sram), q, k, v)
    memory = Memory(sram=sram)
    gradients = flash_backward(memory, q, k, v, y, lse, dy)
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    assert_close(gradients, torch.autograd.grad(exact(*inputs), inputs, dy))
    assert memory.traffic == numbers_moved("backward", n=n, d=d, sram=sram)
    assert memory.held == 0


@pytest.mark.parametrize("d", [4, 16])
def test_the_largest_blocks_that_fit_are_taken(d):
    """One number less, and a block is smaller; blocks of sram / 4 d, as in the paper, burst it."""
    memory = Memory(sram=2 * d * (5 * d + 2))
    assert block_size(d, memory.sram) == 2 * d
    assert block_size(d, memory.sram - 1) == 2 * d - 1
    size = memory.sram // (4 * d)
    with memory.room():
        for rows in size, size, d, d:  # K, V; Q, O
            memory.hold(torch.zeros(rows, d))
        for _ in "lm":
            memory.hold(torch.zeros(d))
        refused = pytest.raises(ValueError, match=f"taken; got {size * size} more")
        with refused:
            memory.hold(torch.zeros(size, size))


# --- how it grows


def slope(form, name, low, high, **sizes):
    """By which power of one size the traffic grows."""
    moved = [numbers_moved(form, **{**sizes, name: size}) for size in (low, high)]
    return log(moved[1] / moved[0]) / log(high / low)


def test_growth_is_that_of_theta():
    """N² d² / M for flash, N d + N² for the naive form: over a grid, and power by power."""
    grid = [
        (n, d, m * d * d)
        for n, d, m in product((2048, 8192, 32768), (32, 64, 128), (6, 12, 24))
        if n > 10 * m * d
    ]
    assert len(grid) >= 10
    flash = [numbers_moved("flash", n=n, d=d, sram=m) / (n * n * d * d / m) for n, d, m in grid]
    naive = [numbers_moved("naive", n=n, d=d, sram=m) / (n * d + n * n) for n, d, m in grid]
    assert max(flash) < 1.2 * min(flash)
    assert max(naive) < 1.6 * min(naive)
    large = {"n": 2**20, "d": 64, "sram": 2**16}
    powers = {"n": (2**20, 2**21), "d": (64, 128), "sram": (2**16, 2**17)}
    found = {form: [slope(form, s, *p, **large) for s, p in powers.items()] for form in FORWARDS}
    assert found["flash"] == pytest.approx([2, 2, -1], abs=0.1)
    assert found["flash2"] == pytest.approx([2, 2, -1], abs=0.1)
    assert found["naive"] == pytest.approx([2, 0, 0], abs=0.5)


def test_queries_outside_move_two_thirds():
    sizes = {"n": 2**20, "d": 64, "sram": 2**16}
    ratio = numbers_moved("flash2", **sizes) / numbers_moved("flash", **sizes)
    assert ratio == pytest.approx(2 / 3, rel=0.05)


@pytest.mark.parametrize(("n", "d"), [(64, 16), (100, 24)])
def test_crossover_is_where_the_counters_cross(n, d):
    """In a smaller memory flash moves more than the naive form; never with queries outside."""
    q, k, v = draw(3, n, d)
    sram = crossover(n=n, d=d)

    def moved(form, sram):
        memory = Memory(sram=sram)
        FORWARDS[form](memory, q, k, v)
        return memory.traffic

    assert moved("flash", sram) < moved("naive", sram)
    assert moved("flash", sram - 1) >= moved("naive", sram - 1)
    for size in sram - 1, 5 * d + 2:
        assert numbers_moved("flash2", n=n, d=d, sram=size) < numbers_moved(
            "naive", n=n, d=d, sram=size
        )


# --- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Memory(sram=0), "sram must be an integer of at least 1; got 0"),
        (lambda: block_size(0, 9), "d must be an integer of at least 1; got 0"),
        (lambda: block_size(2, 11), "sram must be an integer of at least 12; got 11"),
        (
            lambda: numbers_moved("fast", n=8, d=2, sram=99),
            'form must be one of naive, flash, flash2, backward; got "fast"',
        ),
        (
            lambda: numbers_moved("naive", n=0, d=2, sram=99),
            "n must be an integer of at least 1; got 0",
        ),
        (lambda: crossover(n=0, d=2), "n must be an integer of at least 1; got 0"),
        (lambda: crossover(n=8, d=0), "d must be an integer of at least 1; got 0"),
        (
            lambda: naive_attention(Memory(sram=30), *torch.zeros(3, 32, 2)),
            "the fast memory holds 30 numbers, 0 of them taken; got 32 more",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


class Watched(Memory):
    """Remembers how full the fast memory was at its fullest."""

    most = 0

    def hold(self, t):
        t = super().hold(t)
        self.most = max(self.most, self.held)
        return t


def test_what_queries_have_read_lies_in_the_fast_memory():
    """Of 2022's form the three are loaded; with queries outside they are made there, and stay."""
    n, d, sram = 40, 4, 30 * 22
    q, k, v = torch.randn(3, n, d)
    large, small = block_size(d, sram), d
    for attend in flash_attention, flash2_attention:
        memory = Watched(sram=sram)
        attend(memory, q, k, v)
        vectors = {flash_attention: (2 * large, small), flash2_attention: (large, 2 * small)}
        kept = {flash_attention: small, flash2_attention: large}[attend] * (d + 2)
        assert memory.most == sum(vectors[attend]) * d + kept + large * small
