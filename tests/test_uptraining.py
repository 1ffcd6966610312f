"""Fewer key and value heads: each the mean of those whose place it takes."""

import re
from dataclasses import replace

import pytest
import torch
from oracles import redraw
from torch.testing import assert_close

from tfm_ref import MultiHeadAttention, TransformerConfig, build, kv_cache_bytes, pool_kv_heads


@pytest.mark.parametrize("bias", [False, True])
def test_key_and_value_heads_are_pooled_by_hand(bias):
    """Heads 0 and 1 give head 0, 2 and 3 give head 1: neighbours, as they are shared."""
    layer = MultiHeadAttention(d_model=1, n_heads=4, head_dim=2, v_head_dim=1, bias=bias)
    with torch.no_grad():
        layer.k_proj.weight.copy_(torch.tensor([1.0, 10, 3, 30, 5, 50, 9, 90])[:, None])
        layer.v_proj.weight.copy_(torch.tensor([1.0, 2, 4, 8])[:, None])
        if bias:
            layer.k_proj.bias.copy_(torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7]))
            layer.v_proj.bias.copy_(torch.tensor([0.0, 2, 4, 8]))
    pooled = pool_kv_heads(layer, 2)
    assert (pooled.n_kv_heads, pooled.cache_width, layer.n_kv_heads) == (2, 2 * 3, 4)
    assert pooled.k_proj.weight[:, 0].tolist() == [2, 20, 7, 70]
    assert pooled.v_proj.weight[:, 0].tolist() == [1.5, 6]
    if bias:
        assert pooled.k_proj.bias.tolist() == [1, 2, 5, 6]
        assert pooled.v_proj.bias.tolist() == [1, 6]
    assert pool_kv_heads(pooled, 1).k_proj.weight[:, 0].tolist() == [4.5, 45]
    assert repr(pooled.k_proj) == repr(torch.nn.Linear(1, 4, bias=bias))
    assert torch.equal(pooled.q_proj.weight, layer.q_proj.weight)


def test_pooling_leaves_frozen_what_is_frozen():
    layer = MultiHeadAttention(d_model=4, n_heads=2)
    layer.k_proj.weight.requires_grad_(False)
    pooled = pool_kv_heads(layer, 1)
    assert not pooled.k_proj.weight.requires_grad
    assert pooled.v_proj.weight.requires_grad


@pytest.mark.parametrize("n_encoder_layers", [0, 1])
@torch.no_grad()
def test_pooling_equal_heads_changes_nothing(n_encoder_layers):
    """Biases and norms of keys too; the config and the cache are those of the fewer heads."""
    config = TransformerConfig(
        vocab_size=13,
        d_model=24,
        n_layers=2,
        n_heads=4,
        d_ff=10,
        n_encoder_layers=n_encoder_layers,
        attention_bias=True,
        qk_norm="rms_norm",
    )
    few = redraw(build(replace(config, n_kv_heads=2))).double().eval()
    many = build(config).double().eval()
    state = {
        name: t.unflatten(0, (2, 1, -1)).expand(-1, 2, -1, *[-1] * (t.ndim - 1)).flatten(0, 2)
        if re.search(r"[kv]_proj", name)
        else t
        for name, t in few.state_dict().items()
    }
    many.load_state_dict(state)
    pooled = pool_kv_heads(many, 2)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    args = (tokens, tokens) if n_encoder_layers else (tokens,)
    for model in many, pooled:
        assert_close(model(*args), few(*args), atol=1e-10, rtol=0)
    assert pooled.config == few.config
    assert kv_cache_bytes(pooled, 7) == kv_cache_bytes(few, 7)
    for name, t in few.state_dict().items():
        assert_close(pooled.state_dict()[name], t)
    assert many.config == config


def test_pooling_refuses_what_cannot_be_pooled():
    layer = MultiHeadAttention(d_model=12, n_heads=6, n_kv_heads=3)
    for number in 2, 6:
        message = rf"n_kv_heads \({number}\) must divide the heads .*; got 3"
        with pytest.raises(ValueError, match=message):
            pool_kv_heads(layer, number)
    with pytest.raises(ValueError, match="got none"):
        pool_kv_heads(torch.nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="n_kv_heads must be an integer of at least 1; got 0"):
        pool_kv_heads(layer, 0)
