"""Each public model and ours, with the same weights: the same logits, states and gradients."""

import json

import pytest
import torch
from oracles import redraw
from parity.cases import CASES
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import DynamicCache

from tfm_ref import attention_maps, convert
from tfm_ref.balance import routings
from tfm_ref.masks import padding_mask

BATCH, LENGTH, SOURCE = 3, 21, 23
REAL = torch.tensor([LENGTH, 13, 2])  # tokens that are no padding, in each sequence


def public(case, dtype=torch.float32):
    """Build the public model, with weights that all matter."""
    theirs = case.build()
    fixed = {n: p.clone() for n, p in theirs.named_parameters() if n in case.fixed(theirs)}
    redraw(theirs)
    with torch.no_grad():
        for p in theirs.parameters():
            p *= case.spread
    theirs.load_state_dict(fixed, strict=False)
    for name, copied in case.copies.items():
        theirs.get_parameter(name).data = theirs.get_parameter(copied).data
    for buffer in case.learned_buffers(theirs):
        buffer.copy_(torch.randn(buffer.shape) / 2)
    return theirs.to(dtype)


def settings(theirs) -> dict:
    """Give the config as its config.json has it."""
    return json.loads(theirs.config.to_json_string(use_diff=False))


def pair(case, dtype=torch.float32):
    """Give ours, built from the state dict of theirs, and theirs."""
    theirs = public(case, dtype)
    return convert.from_hf(theirs.state_dict(), settings(theirs)), theirs


def ids(length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 61, (BATCH, length), generator=generator)


def arguments(case, tokens=None):
    """Give the tokens as ours takes them, and as theirs does."""
    tokens = ids(LENGTH) if tokens is None else tokens
    if case.kind == "both":
        source = ids(SOURCE, 1)
        return (source, tokens), {"input_ids": source, "decoder_input_ids": tokens}
    return (tokens,), {"input_ids": tokens}


def tolerance(case, dtype):
    """Say how close is equal: 3e-5, or in float64, where theirs keeps to it, 1e-10."""
    close = 1e-10 if dtype == torch.float64 and case.exact else 3e-5
    return {"atol": close, "rtol": close}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_logits_and_all_hidden_states(case, dtype):
    ours, theirs = pair(case, dtype)
    tokens, named = arguments(case)
    expected = theirs(**named, output_hidden_states=True)
    near = tolerance(case, dtype)
    assert_close(ours(*tokens), expected.logits, **near)
    if case.kind == "both":
        source = ours.encoder.states(ours.embedding(tokens[0]))
        assert_close([*source], [*expected.encoder_hidden_states], **near)
        context = expected.encoder_last_hidden_state
        target = ours.decoder.states(ours.embedding(tokens[1]), context)
        assert_close([*target], [*expected.decoder_hidden_states], **near)
    else:
        assert_close(ours.hidden_states(*tokens), [*expected.hidden_states], **near)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_attention_maps(case):
    """In every layer, with its windows, biases and sinks, the weights are theirs."""
    ours, theirs = pair(case)
    tokens, named = arguments(case)
    expected = theirs(**named, output_attentions=True)
    maps = attention_maps(ours, *tokens)
    if case.kind == "both":
        stacks = "encoder", "decoder", "cross"
        kinds = [expected[f"{name}_attentions"] for name in stacks]
        mine = [
            [w for name, w in maps.items() if name.startswith("encoder")],
            [w for name, w in maps.items() if name.startswith("dec") and "cross" not in name],
            [w for name, w in maps.items() if "cross" in name],
        ]
    else:
        kinds, mine = [expected.attentions], [[*maps.values()]]
    assert_close(mine, [[*kind] for kind in kinds], **tolerance(case, torch.float32))


@torch.no_grad()
def test_tokens_are_dropped_where_they_should_be():
    """Of Switch's two cases, one has room for all; else both would say the same."""
    for case in (c for c in CASES if c.name.startswith("Switch")):
        ours, _ = pair(case)
        with routings(ours) as found:
            ours(*arguments(case)[0])
        assert len(found) == (6 if "dropped" in case.name else 3)
        for routing in found.values():
            assert routing.kept.all() != ("dropped" in case.name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case):
    """What one step would change in theirs, it changes in ours: in units of the largest change."""
    ours, theirs = pair(case, torch.float64)
    tokens, named = arguments(case)
    weigh = torch.randn(BATCH, LENGTH, 61, dtype=torch.float64) / 1000
    (ours(*tokens) * weigh).sum().backward()
    (theirs(**named).logits * weigh).sum().backward()
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0 if p.grad is None else p.grad
        for name, copied in case.copies.items():
            theirs.get_parameter(name).copy_(theirs.get_parameter(copied))
    stepped = dict(convert.from_hf(theirs.state_dict(), settings(theirs)).named_parameters())
    largest = max(p.grad.abs().max() for p in ours.parameters() if p.grad is not None)
    for name, p in ours.named_parameters():
        if name not in case.buffers:
            step = torch.zeros_like(p) if p.grad is None else p.grad
            change = (stepped[name] - p) / largest
            near = tolerance(case, torch.float64)
            assert_close(change, step / largest, **near, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_padding(case, side):
    """With padding on either side, real tokens get the logits of theirs."""
    if case.counts_padding and side == "left":
        pytest.skip("theirs counts padding as tokens: see test_departures")
    ours, theirs = pair(case)
    length = SOURCE if case.kind == "both" else LENGTH
    mask = padding_mask(REAL, length, side=side)
    real = mask[:, 0, 0]
    places = (real.cumsum(-1) - 1).clamp(min=0)
    tokens, named = arguments(case)
    named["attention_mask"] = real.long()
    if case.kind == "both":
        places = torch.arange(length)[None]  # theirs count from the left, padding or not
        given = {"source_mask": mask, "source_positions": places}
        seen = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    else:
        if case.takes_positions(theirs):
            named["position_ids"] = places
        elif not case.relative:
            named["input_ids"] = tokens[0].where(real, theirs.config.pad_token_id)
        given, seen = {"mask": mask, "positions": places}, real
    got, expected = ours(*tokens, **given), theirs(**named).logits
    assert_close(got[seen], expected[seen], **tolerance(case, torch.float32))


@pytest.mark.parametrize("case", [c for c in CASES if c.kind == "decoder"], ids=str)
@torch.no_grad()
def test_their_cache_gives_what_we_compute_anew(case):
    ours, theirs = pair(case)
    tokens, cache, steps = ids(LENGTH), DynamicCache(config=theirs.config), []
    for start, stop in [(0, 9), (9, 10), (10, 19), (19, 20), (20, LENGTH)]:
        chunk = theirs(tokens[:, start:stop], past_key_values=cache, use_cache=True)
        steps.append(chunk.logits)
    assert_close(ours(tokens), torch.cat(steps, 1), **tolerance(case, torch.float32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_there_and_back(case, tmp_path):
    """Their files are read, ours are read by them, and nothing is lost or changed on the way."""
    theirs = public(case)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours = convert.load_safetensors(tmp_path / "theirs")
    tokens, named = arguments(case)
    with torch.no_grad():
        near = tolerance(case, torch.float32)
        assert_close(ours(*tokens), theirs(**named).logits, **near)
        written = convert.to_hf(ours, theirs.config.model_type)
        stored = set().union(*(load_file(f) for f in (tmp_path / "theirs").glob("*.safetensors")))
        assert stored <= written.keys() <= stored | theirs.state_dict().keys()
        again = convert.from_hf(written, settings(theirs))
        assert_close(again.state_dict(), ours.state_dict(), atol=1e-6, rtol=0)
        other = redraw(case.build())
        other = type(other).from_pretrained(
            None, config=other.config, state_dict={n: t.clone() for n, t in written.items()}
        )
        assert_close(other(**named).logits, theirs(**named).logits, **near)
