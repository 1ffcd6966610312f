"""Speed on one thread of the CPU, where it can as a ratio. `make bench` prints it."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from time import process_time

import pytest
import stopwatch

from tfm_ref import corpus, train_bpe


def fresh(measure, *args):
    """Measure in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *args).result()


@pytest.mark.parametrize(("length", "least"), [(512, 1.4), (1024, 2.0)])
def test_multi_head_attention_against_torch_module(length, least):
    """The base model's layer, batch 8, causal, float32, forward; theirs as it is by default."""
    for _ in range(3):  # a busy machine may spoil a measurement
        gain, plain = fresh(stopwatch.multi_head_attention, length)
        if gain >= least:
            break
    what = f"nn.MultiheadAttention / MultiHeadAttention, causal, N = {length}"
    print(f"\n{what}: {gain:.2f} (at least {least}); need_weights=False: {plain:.2f}")
    assert gain >= least


def test_tiles_against_the_naive_form():
    """Causal, float32, N = 1,024, forward."""
    for _ in range(3):  # a busy machine may spoil a measurement
        gain, fused = fresh(stopwatch.tiled)
        if gain >= 2.0:
            break
    what = "scaled_dot_product_attention / tiled_attention, causal, N = 1024"
    print(f"\n{what}: {gain:.2f} (at least 2.0); PyTorch's kernel: {fused:.2f}")
    assert gain >= 2.0


def test_mixture_of_experts_against_its_loop():
    """Narrow experts (64), where it matters: of wide ones the products take nearly all time."""
    least = {((8, 2), 1024, True): 1.1, ((64, 8), 1024, True): 1.4}
    best = {}
    for _ in range(3):  # a busy machine may spoil a cell
        gains = fresh(stopwatch.mixture_of_experts)
        best = {cell: max(gain, best.get(cell, 0)) for cell, gain in gains.items()}
        slow = {cell for cell, gain in best.items() if gain < least.get(cell, 0.95)}
        if not slow:
            break
    print()
    for cell, gain in best.items():
        (n_experts, top_k), n_tokens, backward = cell
        what = f"{n_experts} experts, top {top_k}, {n_tokens} tokens{', backward' * backward}"
        print(f"loop / sorted, {what}: {gain:.2f} (at least {least.get(cell, 0.95)})")
    assert len(best) == 12
    assert not slow


@pytest.mark.parametrize(
    ("measure", "least"),
    [
        (stopwatch.generation, dict.fromkeys([(1, 16), (1, 128), (8, 16), (8, 128)], 1.4)),
        (stopwatch.caching, {(1, 128): 3.0, (1, 496): 8.0, (8, 128): 10.0, (8, 496): 25.0}),
    ],
    ids=["transformers", "no cache"],
)
def test_generation(measure, least):
    """A small GPT-2 with a cache: against transformers; and against itself without a cache.

    Of one row of text, a small model takes most of its time to be called, cached or not: the
    weights are read once for all rows, so that a batch shows what the cache saves.
    """
    best, slow = {}, {}
    for _ in range(6):  # a busy machine may spoil a cell
        best = {cell: max(gain, best.get(cell, 0)) for cell, gain in fresh(measure).items()}
        slow = {cell for cell, gain in best.items() if gain < least[cell]}
        if not slow:
            break
    print()
    for (batch, length), gain in best.items():
        what = f"batch {batch}, "
        if measure is stopwatch.generation:
            what = f"transformers / ours, {what}prompt {length}, 64 new tokens"
        else:
            what = f"no cache / cache, {what}prompt 16, {length} new tokens"
        print(f"{what}: {gain:.2f} (at least {least[batch, length]})")
    assert best.keys() == least.keys()
    assert not slow


def test_decoding_with_grouped_queries():
    """One query, 32 heads over 8, float32: against PyTorch's ``enable_gqa``."""
    best = {}
    for _ in range(5):  # a busy machine may spoil a cell
        for length, gain in fresh(stopwatch.grouped_decoding).items():
            best[length] = max(gain, best.get(length, 0))
        if min(best.values()) >= 1.3:
            break
    print()
    for length, gain in best.items():
        print(f"enable_gqa / fused_attention, {length} keys: {gain:.2f} (at least 1.3)")
    assert len(best) == 2
    assert min(best.values()) >= 1.3


def test_bpe_training():
    """1,000 merges on the corpus, in time of one core."""
    start = process_time()
    tokenizer = train_bpe(corpus(), n_merges=1000)
    seconds = process_time() - start
    print(f"\ntrain_bpe, 1,000 merges on the corpus: {seconds:.2f} s (at most 5)")
    assert tokenizer.vocab_size == 1256
    assert seconds < 5
