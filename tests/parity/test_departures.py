"""Where public code departs from the papers or from its authors, both are built here."""

from dataclasses import replace

import pytest
import torch
from oracles import redraw
from parity.cases import CASES, SIZES, Case
from parity.test_parity import arguments, ids, pair, settings
from torch.testing import assert_close

from tfm_ref import MODELS, build, config_from_hf, to_hf
from tfm_ref.convert import from_hf
from tfm_ref.masks import padding_mask
from tfm_ref.position_biases import ALiBi
from tfm_ref.position_embeddings import sinusoidal_encoding

NEAR = {"atol": 3e-5, "rtol": 3e-5}
CASE = {case.name: case for case in CASES}


def rebuilt(model, **choices):
    """Give the same weights to a model that makes other choices."""
    other = build(replace(model.config, **choices)).eval()
    other.load_state_dict(model.state_dict())
    return other


@torch.no_grad()
def test_bert_of_its_authors_approximates_gelu():
    """google-research/bert computes GELU by tanh, the public library exactly."""
    ours, theirs = pair(CASE["BERT"])
    tokens, named = arguments(CASE["BERT"])
    exact = theirs(**named).logits
    authors = rebuilt(ours, activation="gelu_tanh")(*tokens)
    assert MODELS["BERT-base"].config.activation == "gelu_tanh"
    assert_close(ours(*tokens), exact, **NEAR)
    assert 1e-4 < (authors - exact).abs().max() < 1e-1


@torch.no_grad()
def test_falcon_divides_alibi_by_the_root_of_head_dim():
    """ALiBi adds its bias to the scaled scores; Falcon adds it before it scales them."""
    case = Case("Falcon, ALiBi", "FalconConfig", SIZES | {"alibi": True, "parallel_attn": True})
    theirs = redraw(case.build("sdpa"))  # version 5.23 adds the bias twice in "eager"
    plain = settings(theirs)
    with pytest.raises(ValueError, match="alibi must be False; got True"):
        config_from_hf(plain)
    ours = from_hf(theirs.state_dict(), plain | {"alibi": False, "rope_theta": 10_000.0})
    paper = rebuilt(ours, positions="alibi")
    expected = theirs(ids(21)).logits
    assert not torch.allclose(paper(ids(21)), expected, atol=1e-2)

    class Divided(ALiBi):
        def bias(self, q_positions, k_positions):
            return super().bias(q_positions, k_positions) / 8**0.5

    paper.stack.positions = Divided(n_heads=4)
    assert_close(paper(ids(21)), expected, **NEAR)


@torch.no_grad()
def test_llama_4_counts_padding_as_tokens():
    """By their places in the batch it scales queries; ours stand where they would alone."""
    case = replace(CASE["Llama 4"], settings=CASE["Llama 4"].settings | {"floor_scale": 3})
    ours, theirs = pair(case)
    tokens, mask = ids(21), padding_mask(torch.tensor([21, 13, 2]), 21, side="left")
    real = mask[:, 0, 0]
    places = (real.cumsum(-1) - 1).clamp(min=0)
    named = {"attention_mask": real.long(), "position_ids": places}
    padded, alone = theirs(tokens, **named).logits[1, 8:], theirs(tokens[1:2, 8:]).logits[0]
    assert_close(ours(tokens, mask=mask, positions=places)[1, 8:], alone, **NEAR)
    assert not torch.allclose(padded, alone, atol=1e-2)
    unscaled = case.settings | {"attn_temperature_tuning": False}
    ours, theirs = pair(replace(case, settings=unscaled))
    given = {"mask": mask, "positions": places}
    assert_close(ours(tokens, **given)[real], theirs(tokens, **named).logits[real], **NEAR)


def test_marian_writes_sines_before_cosines():
    """The paper of 2017 alternates them: the same numbers, in another order."""
    table = CASE["Marian"].build().model.encoder.embed_positions.weight
    positions = torch.arange(len(table))[None]
    assert_close(sinusoidal_encoding(positions, 32, halves=True)[0], table, **NEAR)
    paper = sinusoidal_encoding(positions, 32)[0]
    assert not torch.allclose(paper, table, atol=0.1)
    assert_close(torch.cat([paper[:, ::2], paper[:, 1::2]], -1), table, **NEAR)


@torch.no_grad()
def test_t5_does_not_scale_its_scores():
    """All others divide by the root of head_dim, as the paper of 2017; T5 does not."""
    ours, theirs = pair(CASE["T5"])
    tokens, named = arguments(CASE["T5"])
    scaled = rebuilt(ours, attention_scale=None)(*tokens)
    assert_close(ours(*tokens), theirs(**named).logits, **NEAR)
    assert (scaled - ours(*tokens)).abs().max() > 1e-2


@torch.no_grad()
def test_version_5_ties_t5_1_1():
    """T5 1.1 has two matrices; version 5 of transformers builds it with one, and says tied."""
    case = CASE["T5 1.1, tied"]
    theirs = redraw(case.build())
    assert theirs.lm_head.weight is theirs.shared.weight
    assert settings(theirs)["tie_word_embeddings"]
    ours = from_hf(theirs.state_dict(), settings(theirs))
    assert ours.config.tied_embeddings
    assert not ours.config.scale_logits
    files_of_version_4 = settings(theirs) | {"tie_word_embeddings": False}
    del files_of_version_4["scale_decoder_outputs"]
    untied = config_from_hf(files_of_version_4)
    assert not untied.tied_embeddings
    assert not untied.scale_logits
    assert "lm_head.weight" in to_hf(build(untied), "t5")
