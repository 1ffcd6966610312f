"""Whole models: what each may see, what its parts share, and what they refuse."""

import re
from dataclasses import replace

import pytest
import torch
from oracles import draw, redraw
from small_models import BOTH, DECODER, ENCODER, LEARNED, B, M, N, ids, made, reach
from torch.testing import assert_close

from tfm_ref import (
    DecoderLM,
    Encoder,
    EncoderDecoder,
    MultiHeadAttention,
    build,
    causal_mask,
    padding_mask,
    prefix_mask,
)

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


def test_what_is_tied_is_one_matrix():
    for config in DECODER, ENCODER, BOTH:
        model = build(config)
        assert model.head.proj.weight is model.embedding.tokens.weight
        untied = build(replace(config, tied_embeddings=False))
        assert untied.head.proj.weight is not untied.embedding.tokens.weight
        numbers = [sum(p.numel() for p in m.parameters()) for m in (model, untied)]
        assert numbers[1] - numbers[0] == 11 * 12


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
