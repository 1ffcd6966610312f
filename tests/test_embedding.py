"""Embedding and head, by hand."""

from dataclasses import replace

import torch
from oracles import draw, redraw
from small_models import DECODER
from torch import nn
from torch.testing import assert_close

from tfm_ref.embedding import Embedding, Head


def test_embedding_by_hand():
    config = replace(DECODER, d_model=16, head_dim=4, n_segments=2)
    embedding = redraw(Embedding(config))
    tokens, segments = torch.tensor([[3, 7]]), torch.tensor([[0, 1]])
    first, second = embedding.segments.weight
    table = embedding.tokens.weight
    expected = torch.stack([4 * table[3] + first, 4 * table[7] + second])
    assert_close(embedding(tokens, segments)[0], expected)
    assert_close(embedding(tokens)[0, 1], 4 * table[7] + first)
    plain = redraw(Embedding(replace(config, scale_embeddings=False, n_segments=0)))
    assert torch.equal(plain(tokens)[0], plain.tokens.weight[[3, 7]])


def test_embeddings_begin_with_a_norm_of_one():
    weight = Embedding(replace(DECODER, vocab_size=2000, d_model=64)).tokens.weight
    assert_close(weight.square().sum(-1).mean(), torch.tensor(1.0), atol=0.02, rtol=0)


def test_head_by_hand():
    x = draw(1, 1, 16)
    config = replace(DECODER, d_model=16, head_bias=True, scale_logits=True, logit_softcap=2.0)
    head = redraw(Head(config))
    raw = head.proj.weight @ x[0, 0] / 4 + head.proj.bias
    assert_close(head(x)[0, 0], 2 * (raw / 2).tanh())
    head = redraw(Head(replace(DECODER, d_model=16, head_transform=True, activation="gelu")))
    changed = nn.functional.gelu(head.transform.weight @ x[0, 0] + head.transform.bias)
    assert_close(head(x)[0, 0], head.proj.weight @ head.norm(changed))
