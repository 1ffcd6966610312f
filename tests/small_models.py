"""Models small enough to test by hand: their configs, tokens, and what reaches what."""

from dataclasses import replace

import torch
from oracles import redraw

from tfm_ref import TransformerConfig, build

SIZES = {"vocab_size": 11, "d_model": 12, "n_layers": 3, "n_heads": 4, "d_ff": 10}
DECODER = TransformerConfig(**SIZES, positions="rope", head_dim=4, norm_placement="pre")
ENCODER = replace(DECODER, is_causal=False)
LEARNED = replace(ENCODER, positions="learned", max_seq_len=20)
BOTH = replace(DECODER, n_encoder_layers=2)
B, N, M = 2, 7, 5


def ids(length, seed=0):
    return torch.randint(0, 11, (B, length), generator=torch.Generator().manual_seed(seed))


def made(config):
    """Build a model with weights that all matter, in float64."""
    return redraw(build(config)).double().eval()


def reach(run, tokens):
    """Say for each output which tokens change it."""
    y = run(tokens)
    seen = torch.zeros(y.shape[1], tokens.shape[1], dtype=torch.bool)
    for j in range(tokens.shape[1]):
        other = tokens.clone()
        other[:, j] = (other[:, j] + 1) % 11
        seen[:, j] = (run(other) != y).flatten(2).any(-1).any(0)
    return seen
