"""Measurements that run in a process of their own, since other tests leave memory about."""

from functools import partial
from itertools import product
from statistics import median
from time import process_time

import torch
from torch import nn

from tfm_ref import (
    MoELayer,
    MultiHeadAttention,
    causal_mask,
    fused_attention,
    scaled_dot_product_attention,
    tiled_attention,
)


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


def tiled():
    """Measure tiles against the naive form, and PyTorch's kernel: 8 heads of 64, N = 1,024."""
    torch.set_num_threads(1)
    q, k, v = torch.randn(3, 1, 8, 1024, 64)
    runs = tiled_attention, scaled_dot_product_attention, fused_attention
    with torch.no_grad():
        return speedup(*(partial(run, q, k, v, is_causal=True) for run in runs))


def mixture_of_experts():
    """Measure experts sorted, each projection one product, against the loop; 64 wide, float32.

    By number of experts, top_k, number of tokens, and whether there is a backward. A large tensor
    that is freed tells the allocator to keep its pages, as any training does: else one large
    tensor costs more than many small ones.
    """
    torch.set_num_threads(1)
    torch.empty(2**22)
    gains = {}
    for cell in product([(8, 2), (64, 8)], [4, 64, 1024], [False, True]):
        (n_experts, top_k), n_tokens, backward = cell
        sizes = {"d_model": 64, "d_ff": 64, "n_experts": n_experts, "top_k": top_k}
        layers = [MoELayer(**sizes, backend=name) for name in ("sorted", "naive")]
        layers[1].load_state_dict(layers[0].state_dict())
        x = torch.randn(1, n_tokens, 64)

        def run(layer, x=x, backward=backward):
            for _ in range(max(1, 256 // x.shape[1])):
                with torch.set_grad_enabled(backward):
                    y = layer(x)
                if backward:
                    y.square().sum().backward()
                    layer.zero_grad()

        (gains[cell],) = speedup(*(partial(run, layer) for layer in layers))
    return gains
