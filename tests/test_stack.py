"""Stacks: what windows, positions and norms change, layer by layer."""

from dataclasses import replace

import pytest
import torch
from small_models import BOTH, DECODER, ENCODER, M, N, ids, made, reach
from torch.testing import assert_close

from tfm_ref import (
    QueryScaling,
    attention_maps,
    build,
    causal_mask,
    sliding_window_mask,
)
from tfm_ref.stack import Stack


def test_windows_reach_further_layer_by_layer():
    """Three windows of 2, one on the other, reach 3 tokens back; a layer without one, all."""
    local = made(replace(DECODER, window=2))
    assert torch.equal(reach(local, ids(N)), sliding_window_mask(N, window=4)[0, 0])
    mixed = made(replace(DECODER, window=2, global_every=3))
    assert torch.equal(reach(mixed, ids(N)), causal_mask(N)[0, 0])
    maps = attention_maps(mixed, ids(N))
    for layer, weights in enumerate(maps.values()):
        mask = causal_mask(N) if layer == 2 else sliding_window_mask(N, window=2)
        assert torch.equal(weights > 0, mask.expand_as(weights))


def test_chunks_do_not_see_each_other():
    model = made(replace(DECODER, window=3, chunked=True))
    i, j = torch.arange(N)[:, None], torch.arange(N)
    assert torch.equal(reach(model, ids(N)), (j <= i) & (i // 3 == j // 3))


def test_positions_are_passed_on():
    """RoPE sees distances alone; learned positions see where the sequence begins."""
    rotary, learned = made(DECODER), made(replace(DECODER, positions="learned", max_seq_len=20))
    shifted = torch.arange(N)[None] + 9
    assert_close(rotary(ids(N)), rotary(ids(N), positions=shifted), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(learned(ids(N)), learned(ids(N), positions=shifted))
    assert torch.equal(learned(ids(N)), learned(ids(N), positions=torch.arange(N)[None]))


def test_both_stacks_are_told_their_positions():
    model = made(replace(BOTH, positions="learned", max_seq_len=20))
    shift = torch.arange(20)[None]
    y = model(ids(M), ids(N))
    assert torch.equal(
        y,
        model(ids(M), ids(N), source_positions=shift[:, :M], target_positions=shift[:, :N]),
    )
    assert not torch.allclose(y, model(ids(M), ids(N), source_positions=shift[:, 1 : M + 1]))
    assert not torch.allclose(y, model(ids(M), ids(N), target_positions=shift[:, 1 : N + 1]))


def test_the_first_position_moves_all():
    config = replace(DECODER, positions="learned", max_seq_len=9, first_position=2)
    model, plain = made(config), made(replace(config, first_position=0))
    assert model.stack.positions.table.shape == (11, 12)
    state = model.state_dict()
    state["stack.positions.table"] = state["stack.positions.table"][2:]
    plain.load_state_dict(state)
    assert torch.equal(model(ids(N)), plain(ids(N)))


def test_layers_without_a_window_may_know_no_positions():
    """Without positions a layer takes tokens in any order; with a window of 1 the others, too."""
    config = replace(DECODER, n_layers=2, window=1, global_every=2, global_positions=False)
    order = torch.tensor([2, 0, 1, 3, 4, 5, 6])
    for model, same in (
        (made(config), True),
        (made(replace(config, global_positions=True)), False),
    ):
        last = model(ids(N))[:, -1]
        assert torch.allclose(last, model(ids(N)[:, order])[:, -1]) == same


def test_layers_with_a_window_know_their_positions_all_the_same():
    config = replace(DECODER, window=3, global_every=2)
    both, one = made(config), made(replace(config, global_positions=False))
    states, expected = one.hidden_states(ids(N)), both.hidden_states(ids(N))
    assert torch.equal(states[1], expected[1])
    assert not torch.allclose(states[2], expected[2], atol=1e-3)


def test_layers_without_a_window_may_scale_late_queries():
    """From position 3 on, in layers 2 and 4 of 4; where nothing has a window, in all."""
    config = replace(DECODER, n_layers=4, window=2, global_every=2)
    strong = QueryScaling(length=4, strength=9.0)
    plain, scaled = made(config), made(replace(config, query_scaling=strong))
    one, other = (model.hidden_states(ids(N)) for model in (plain, scaled))
    assert_close(one[:2], other[:2])
    assert_close(one[2][:, :3], other[2][:, :3])
    assert ((one[2] - other[2])[:, 3:].abs().amax(-1) > 1e-3).all()
    maps = attention_maps(scaled, ids(N))
    q = scaled.stack.blocks[1].attention
    x = scaled.stack.blocks[1].attention_norm(other[1])
    rotation = scaled.stack.positions.rotation(torch.arange(N)[None])
    terms = {"is_causal": True, "rotation": rotation}
    factors = strong(torch.arange(N)[None])
    expected = q.attention_weights(x, query_scale=factors, **terms)
    assert_close(maps["stack.blocks.1.attention"], expected)
    every = made(replace(DECODER, query_scaling=strong)).hidden_states(ids(N))
    assert not torch.allclose(every[1], made(DECODER).hidden_states(ids(N))[1], atol=1e-3)


def test_queries_are_scaled_by_their_positions():
    """Not by their numbers in the table; and not by their places after padding."""
    config = replace(DECODER, query_scaling=QueryScaling(length=3, strength=5.0))
    model, late = made(config), torch.arange(N)[None] + 1
    assert not torch.allclose(model(ids(N)), model(ids(N), positions=late), atol=1e-3)
    learned = replace(config, positions="learned", max_seq_len=20)
    table, shifted = made(learned), made(replace(learned, first_position=2))
    state = table.state_dict()
    padding = torch.zeros(2, 12, dtype=torch.double)
    state["stack.positions.table"] = torch.cat([padding, state["stack.positions.table"]])
    shifted.load_state_dict(state)
    assert_close(shifted(ids(N)), table(ids(N)))


def test_layers_without_a_window_may_keep_queries_and_keys_as_they_are():
    config = replace(DECODER, window=2, global_every=3, qk_norm="rms_norm_no_gain", norm_eps=0.1)
    every, local = made(config), made(replace(config, global_qk_norm=False))
    norms = [[block.attention.q_norm for block in model.stack.blocks] for model in (every, local)]
    assert [norm is not None for norm in norms[0]] == [True, True, True]
    assert [norm is not None for norm in norms[1]] == [True, True, False]
    assert {norm.eps for norm in norms[0]} == {0.1}
    assert every.state_dict().keys() == local.state_dict().keys()
    gains = made(replace(config, qk_norm="rms_norm"))
    assert gains.stack.blocks[0].attention.k_norm.weight.shape == (4,)


def test_layers_with_a_window_may_have_another_base():
    """At a base of their own, they turn as a model with that base, in which all have windows."""
    local = replace(DECODER, n_layers=1, window=4)
    one = made(replace(local, global_every=2, local_rope_theta=7.0))
    assert_close(one(ids(N)), made(replace(local, rope_theta=7.0))(ids(N)))
    other = made(replace(local, global_every=1, local_rope_theta=7.0))
    assert_close(other(ids(N)), made(replace(local, window=None))(ids(N)))


def test_biases_of_positions_follow_the_dtype():
    for positions in "alibi", "t5":
        for dtype in torch.bfloat16, torch.float64:
            model = build(replace(DECODER, positions=positions)).to(dtype)
            assert model(ids(N)).dtype == dtype


@pytest.mark.parametrize(("config", "bidirectional"), [(DECODER, False), (ENCODER, True)])
def test_t5_tells_later_keys_apart_where_there_are_any(config, bidirectional):
    stack = Stack(replace(config, positions="t5"))
    assert stack.positions.buckets["bidirectional"] == bidirectional
    both = build(replace(BOTH, positions="t5"))
    assert both.encoder.positions.buckets["bidirectional"]
    assert not both.decoder.positions.buckets["bidirectional"]


@pytest.mark.parametrize("norm_placement", ["pre", "post", "both"])
def test_hidden_states(norm_placement):
    model = made(replace(DECODER, norm_placement=norm_placement, embedding_norm=True))
    states = model.hidden_states(ids(N))
    assert len(states) == 4
    assert torch.equal(states[-1], model.encode(ids(N)))
    assert torch.equal(model.head(states[-1]), model(ids(N)))
    assert_close(states[0], model.stack.embedding_norm(model.embedding(ids(N))))
    assert (model.stack.norm is None) == (norm_placement == "post")
    assert {block.norm_placement for block in model.stack.blocks} == {norm_placement}


def test_dropout_reaches_the_tokens_at_the_entrance():
    model = made(replace(DECODER, dropout=0.5)).train()
    zeros = (model.hidden_states(ids(N))[0] == 0).double().mean()
    assert 0.3 < zeros < 0.7
