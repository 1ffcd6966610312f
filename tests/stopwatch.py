"""Measurements that run in a process of their own, since other tests leave memory about."""

from functools import partial
from statistics import median
from time import process_time

import torch
from torch import nn

from tfm_ref import MultiHeadAttention, causal_mask


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


def multi_head_attention(length):
    """Measure the base model's layer, batch 8, causal, float32, forward, against PyTorch's."""
    torch.set_num_threads(1)
    ours = MultiHeadAttention(d_model=512, n_heads=8).eval()
    theirs = nn.MultiheadAttention(512, 8, bias=False, batch_first=True).eval()
    x, future = torch.randn(8, length, 512), ~causal_mask(length)[0, 0]
    theirs = partial(theirs, x, x, x, attn_mask=future, is_causal=True)
    fused = partial(theirs, need_weights=False)
    with torch.no_grad():
        return speedup(partial(ours, x, is_causal=True), theirs, fused)
