"""Attention maps: those of the run, of every attention, and nothing left behind."""

import pytest
import torch
from small_models import BOTH, DECODER, B, M, N, ids, made
from torch import nn
from torch.testing import assert_close

from tfm_ref import (
    attention_maps,
    padding_mask,
)


def test_attention_maps_are_those_of_the_run():
    """From maps, values and the rest of each block, the hidden states come out as they did."""
    model = made(DECODER)
    maps, states = attention_maps(model, ids(N)), model.hidden_states(ids(N))
    for layer, block in enumerate(model.stack.blocks[:-1]):
        weights = maps[f"stack.blocks.{layer}.attention"]
        x = states[layer]
        attention = block.attention
        v = attention.v_proj(block.attention_norm(x)).unflatten(-1, (4, 4)).transpose(1, 2)
        x = x + attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.feed_forward(block.feed_forward_norm(x))
        assert_close(x, states[layer + 1])


def test_attention_maps_of_two_stacks():
    model, source = made(BOTH), ids(M, 1)
    mask = padding_mask(torch.tensor([M, 2]), M)
    maps = attention_maps(model, source, ids(N), source_mask=mask)
    assert list(maps) == [
        "encoder.blocks.0.attention",
        "encoder.blocks.1.attention",
        *[
            f"decoder.blocks.{i}.{kind}"
            for i in range(3)
            for kind in ("attention", "cross_attention")
        ],
    ]
    for name, weights in maps.items():
        keys = N if name.startswith("decoder") and "cross" not in name else M
        assert weights.shape == (B, 4, M if name.startswith("encoder") else N, keys)
        assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        if keys == M:
            assert (weights[1, ..., 2:] == 0).all()
            assert (weights[1, ..., :2] > 0).all()


def test_attention_maps_leave_nothing_behind():
    model = made(DECODER)
    with pytest.raises(ValueError, match="tokens must lie in"):
        attention_maps(model, torch.full((1, 3), 11))
    attention_maps(model, ids(N))
    hooks = [module._forward_pre_hooks for module in model.modules()]
    assert not any(hooks)
    assert attention_maps(nn.Linear(2, 2), torch.ones(2)) == {}
