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
    from_hf,
    fused_attention,
    greedy,
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


def small_gpt2(width):
    """Make a GPT-2 of 4 layers, 4 heads and a vocabulary of 1,000: theirs, and ours."""
    from transformers import GPT2Config, GPT2LMHeadModel  # slow to import

    torch.set_num_threads(1)
    sizes = {"vocab_size": 1000, "n_embd": width, "n_layer": 4, "n_head": 4, "n_positions": 512}
    ends = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, **ends)).eval()
    return theirs, from_hf(theirs.state_dict(), theirs.config.to_dict())


def generation(width=128):
    """Measure greedy generation of 64 tokens with a cache: their ``generate``, and ours.

    By batch and length of the prompt.
    """
    theirs, ours = small_gpt2(width)
    gains = {}
    for batch, length in product((1, 8), (16, 128)):
        prompt = torch.randint(0, 1000, (batch, length))
        run = partial(greedy, ours, prompt, max_new_tokens=64)
        fixed = {"max_new_tokens": 64, "do_sample": False, "attention_mask": prompt >= 0}
        their_run = partial(theirs.generate, prompt, **fixed)
        assert torch.equal(run(), their_run()[:, length:])
        (gains[batch, length],) = speedup(run, their_run)
    return gains


def caching(width=128):
    """Measure greedy generation after a prompt of 16 without a cache, and with: a small GPT-2.

    By batch and number of new tokens. Without a cache only each 16th token is written, that in the
    middle of 16, and counts for all of them.
    """
    _, ours = small_gpt2(width)
    gains = {}
    for batch, new in product((1, 8), (128, 496)):
        text = torch.randint(0, 1000, (batch, 16 + new))
        cached = partial(greedy, ours, text[:, :16], max_new_tokens=new)

        def uncached(text=text):
            for length in range(24, text.shape[1], 16):
                greedy(ours, text[:, :length], max_new_tokens=1, use_cache=False)

        (gain,) = speedup(cached, uncached, rounds=1)
        gains[batch, new] = 16 * gain
    return gains


def grouped_decoding():
    """Measure one query over keys shared by groups of 4: ``enable_gqa``, and ours, by length."""
    torch.set_num_threads(1)
    gains = {}
    for length in 512, 2048:
        q, k, v = torch.randn(1, 32, 1, 64), *torch.randn(2, 1, 8, length, 64)
        fused = partial(nn.functional.scaled_dot_product_attention, q, k, v, enable_gqa=True)

        def repeated(run):
            with torch.no_grad():
                for _ in range(100):
                    run()

        runs = partial(fused_attention, q, k, v), fused
        (gains[length],) = speedup(*(partial(repeated, run) for run in runs))
    return gains
