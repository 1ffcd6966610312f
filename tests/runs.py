"""Small runs that tests of training and of its checkpoints share."""

import os
import random
import textwrap
from functools import partial
from pathlib import Path

import torch

from tfm_ref import (
    EncoderDecoder,
    TokenBatches,
    TransformerConfig,
    fit,
    label_smoothed_cross_entropy,
    noam_lr,
    set_seed,
)

ROOT = Path(__file__).parents[1]
IDS = {"pad": 0, "bos": 1, "eos": 2}
LENGTHS = [(random.Random(i).randint(1, 9), random.Random(-i).randint(0, 9)) for i in range(60)]
PAIRS = [([3 + i] * m, [3 + i] * n) for i, (m, n) in enumerate(LENGTHS)]


CONFIG = TransformerConfig(
    **{"vocab_size": 70, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 12},
    n_encoder_layers=1,
    dropout=0.2,
)


def loss(model, batch):
    logits = model(batch.source, batch.target_in, source_mask=batch.source_mask)
    return label_smoothed_cross_entropy(logits, batch.target_out)


def adam(model):
    return torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9)


def run(n_steps=8, *, config=CONFIG, loss=loss, weights=0, **terms):
    """Train a small model over more than one epoch; give it, its optimizer and the losses."""
    set_seed(weights)
    model = EncoderDecoder(config).to(terms.pop("dtype", torch.float32))
    optimizer = terms.pop("optimizer", adam)(model)
    batches = TokenBatches(pairs=PAIRS[:20], max_tokens=40, **IDS)
    assert 2 < len(batches.rows(0)) < 6  # with 8 steps, there is a second epoch
    terms = {"max_norm": 1.0, "every": 3, "device": "cpu"} | terms
    terms = {"lr": partial(noam_lr, d_model=8, warmup=4)} | terms
    losses = fit(
        model, terms.pop("batches", batches), loss, optimizer=optimizer, n_steps=n_steps, **terms
    )
    return model, optimizer, losses


SCRIPT = f"""
import os, sys, json, signal, time
from datetime import timedelta
import torch
from tfm_ref import *
torch.set_num_threads(1)
PAIRS = [([3 + i] * (1 + i % 5), [3 + i] * (i % 7)) for i in range(21)]
batches = TokenBatches(pairs=PAIRS, max_tokens=40, **{IDS})
def loss(model, batch):
    logits = model(batch.source, batch.target_in, source_mask=batch.source_mask)
    return label_smoothed_cross_entropy(logits, batch.target_out)
def train(n_steps=30, loss=loss, batches=batches, dropout=0.0, **terms):
    set_seed(int(os.environ.get("RANK", 0)))
    model = EncoderDecoder(TransformerConfig(
        vocab_size=70, d_model=8, n_layers=1, n_heads=2, d_ff=12, n_encoder_layers=1,
        dropout=dropout,
    )).to(terms.pop("dtype", torch.float32))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.98), eps=1e-9)
    terms = {{"max_norm": 1.0, "every": 1, "device": "cpu"}} | terms
    losses = fit(model, batches, loss, optimizer=optimizer, n_steps=n_steps, **terms)
    return losses, {{name: t.tolist() for name, t in model.state_dict().items()}}
"""


def script(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT + textwrap.dedent(text), encoding="utf-8")
    return path


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
