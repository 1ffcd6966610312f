"""Whole models: what each may see, what its parts share, and what they refuse."""

import re
from dataclasses import replace

import pytest
import torch
from oracles import draw, redraw
from torch import nn
from torch.testing import assert_close

from tfm_ref import (
    DecoderLM,
    Encoder,
    EncoderDecoder,
    MultiHeadAttention,
    QueryScaling,
    TransformerConfig,
    attention_maps,
    build,
    causal_mask,
    padding_mask,
    prefix_mask,
    sliding_window_mask,
)
from tfm_ref.models import Embedding, Head, Stack

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


# --- what each may see


@pytest.mark.parametrize("norm_placement", ["pre", "post", "both"])
def test_a_decoder_sees_the_past_and_an_encoder_all(norm_placement):
    decoder = made(replace(DECODER, norm_placement=norm_placement))
    encoder = made(replace(ENCODER, norm_placement=norm_placement))
    assert torch.equal(reach(decoder, ids(N)), causal_mask(N)[0, 0])
    assert reach(encoder, ids(N)).all()


def test_encoder_and_decoder_differ_by_the_mask_alone():
    decoder, encoder = made(DECODER), made(ENCODER)
    encoder.load_state_dict(decoder.state_dict())
    assert not torch.equal(encoder(ids(N)), decoder(ids(N)))
    assert_close(encoder(ids(N), mask=causal_mask(N)), decoder(ids(N)))


def test_a_prefix_language_model_is_an_encoder_with_a_mask():
    encoder, mask = made(ENCODER), prefix_mask(N, prefix=3)
    assert torch.equal(reach(lambda tokens: encoder(tokens, mask=mask), ids(N)), mask[0, 0])


def test_the_target_sees_its_past_and_all_of_the_source():
    model, source, target = made(BOTH), ids(M, 1), ids(N)
    assert torch.equal(reach(lambda t: model(source, t), target), causal_mask(N)[0, 0])
    assert reach(lambda s: model(s, target), source).all()
    assert reach(model.encode, source).all()


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


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(side):
    real = torch.tensor([N, 4])
    mask = padding_mask(real, N, side=side)
    positions = (mask[:, 0, 0].cumsum(-1) - 1).clamp(min=0)
    for config in DECODER, ENCODER:
        model = made(config)
        y = model(ids(N), mask=mask, positions=positions)[1, mask[1, 0, 0]]
        assert_close(y, model(ids(N)[1:, mask[1, 0, 0]])[0])
    model, target = made(BOTH), ids(3, 2)
    y = model(ids(N), target, source_mask=mask, source_positions=positions)
    assert_close(y[1:], model(ids(N)[1:, mask[1, 0, 0]], target[1:]))
    y = model(ids(M), ids(N), target_mask=mask, target_positions=positions)[1, mask[1, 0, 0]]
    assert_close(y, model(ids(M)[1:], ids(N)[1:, mask[1, 0, 0]])[0])


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


# --- maps and states


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


# --- embedding and head


def test_what_is_tied_is_one_matrix():
    for config in DECODER, ENCODER, BOTH:
        model = build(config)
        assert model.head.proj.weight is model.embedding.tokens.weight
        untied = build(replace(config, tied_embeddings=False))
        assert untied.head.proj.weight is not untied.embedding.tokens.weight
        numbers = [sum(p.numel() for p in m.parameters()) for m in (model, untied)]
        assert numbers[1] - numbers[0] == 11 * 12


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


def test_pool():
    model = made(replace(ENCODER, pooler=True))
    first = model.encode(ids(N))[:, 0]
    assert_close(model.pool(ids(N)), torch.tanh(first @ model.pooler.weight.T + model.pooler.bias))
    assert_close(made(ENCODER).pool(ids(N)), made(ENCODER).encode(ids(N))[:, 0])


def test_encoder_decoder_in_two_steps():
    model = made(BOTH)
    context = model.encode(ids(M))
    assert torch.equal(model.decode(ids(N), context), model(ids(M), ids(N)))


def test_what_a_stack_is_made_of():
    """An encoder has no cross-attention, a decoder of two stacks has one in every block."""
    model = EncoderDecoder(BOTH)
    assert [len(model.encoder.blocks), len(model.decoder.blocks)] == [2, 3]
    assert all(block.cross_attention is None for block in model.encoder.blocks)
    assert all(isinstance(b.cross_attention, MultiHeadAttention) for b in model.decoder.blocks)
    assert model.decoder.config.is_causal
    assert not model.encoder.config.is_causal


# --- training, dtypes, devices


@pytest.mark.parametrize("name", ["dropout", "attention_dropout"])
def test_dropout_is_for_training(name):
    model = made(replace(DECODER, **{name: 0.5}))
    assert torch.equal(model(ids(N)), made(DECODER)(ids(N)))
    model.train()
    assert not torch.equal(model(ids(N)), model(ids(N)))


def test_dropout_reaches_the_tokens_at_the_entrance():
    model = made(replace(DECODER, dropout=0.5)).train()
    zeros = (model.hidden_states(ids(N))[0] == 0).double().mean()
    assert 0.3 < zeros < 0.7


@pytest.mark.parametrize("config", [DECODER, ENCODER, BOTH], ids=["decoder", "encoder", "both"])
def test_every_parameter_learns(config):
    model = redraw(build(replace(config, attention_bias="qvo"))).double()
    given = (ids(M), ids(N)) if config.n_encoder_layers else (ids(N),)
    model(*given).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("config", [DECODER, LEARNED, BOTH], ids=["decoder", "learned", "both"])
def test_state_dict_and_export(config, tmp_path):
    model, other = made(config), build(config).double().eval()
    given = (ids(M), ids(N)) if config.n_encoder_layers else (ids(N),)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(*given), model(*given))
    exported = torch.export.export(model, given, strict=False).module()
    assert_close(exported(*given), model(*given))


def test_on_the_meta_device():
    with torch.device("meta"):
        for config in DECODER, LEARNED:
            assert build(config)(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 11)


def test_build_gives_what_the_config_describes():
    for config, kind in (DECODER, DecoderLM), (ENCODER, Encoder), (BOTH, EncoderDecoder):
        assert type(build(config)) is kind


# --- what is refused


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Encoder(DECODER), "an Encoder needs is_causal = False; got True: use DecoderLM"),
        (lambda: DecoderLM(ENCODER), "a DecoderLM needs is_causal = True; got False: use Encoder"),
        (lambda: DecoderLM(BOTH), "DecoderLM has one stack; got n_encoder_layers = 2: use Encod"),
        (lambda: EncoderDecoder(DECODER), "needs n_encoder_layers of at least 1; got 0"),
        (lambda: build(DECODER)(ids(N) + 1), "tokens must lie in 0 <= number < vocab_size (11)"),
        (lambda: build(DECODER)(ids(N) - 1), "got -1 to 9"),
        (lambda: build(DECODER)(ids(N).double()), "must be int64 or int32 of shape (batch, length"),
        (lambda: build(DECODER)(ids(N)[0]), "and not be empty; got torch.int64 of shape (7,)"),
        (lambda: build(DECODER)(ids(N)[:, :0]), "got torch.int64 of shape (2, 0)"),
        (lambda: build(DECODER)(ids(N), segments=ids(N)), "segments need n_segments of at least 1"),
        (
            lambda: build(replace(DECODER, n_segments=2))(ids(N), segments=ids(N)),
            "segments must lie in 0 <= number < vocab_size (2)",
        ),
        (
            lambda: build(DECODER)(ids(N), mask=causal_mask(N - 1)),
            "each of size 1 or that of the s",
        ),
        (
            lambda: build(replace(DECODER, window=2))(ids(N), mask=causal_mask(N)[0, 0]),
            "mask must have 4 axes (batch, heads, len_q, len_k)",
        ),
        (
            lambda: build(replace(DECODER, window=2))(ids(N), mask=causal_mask(N).int()),
            "mask must be a boolean tensor (True = may attend); got torch.int32",
        ),
        (
            lambda: build(DECODER)(ids(N), positions=torch.arange(3)[None]),
            "must fit batch 2 and le",
        ),
        (
            lambda: build(replace(DECODER, positions="learned", max_seq_len=5))(ids(N)),
            "positions must lie in 0 <= position < max_seq_len (5); got 0 to 6",
        ),
        (lambda: build(BOTH)(ids(M), ids(N)[:1]), "must have the same batch"),
        (
            lambda: build(BOTH).decoder(draw(B, N, 12)),
            "a block with cross_attention needs a context",
        ),
    ],
)
def test_refusals(wrong, message, no_shape_checks):
    with pytest.raises(ValueError, match=re.escape(message)):
        wrong()
