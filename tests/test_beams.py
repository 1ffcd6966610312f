"""Beam search against plain loops, enumeration and the public library, and what is refused."""

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from texts import (
    BOTH,
    CONFIGS,
    DECODER,
    PAD,
    PUBLIC,
    STOPS,
    B,
    N,
    T,
    V,
    arguments,
    generate,
    ids,
    log_probs,
    made,
    rows,
    telling,
    theirs_and_ours,
)
from torch.testing import assert_close

from tfm_ref import beam_search, greedy
from tfm_ref.beams import PENALTIES, _best


def plain_beams(model, row, n_beams, lp, stop, length=T):
    """Beam search as one would write it on paper: lists, and no stopping."""
    beams, done = [([], 0.0)], []
    for step in range(1, length + 1):
        after = log_probs(model, row, [text for text, _ in beams]).tolist()
        longer = [
            ([*text, token], total + p)
            for (text, total), row_of in zip(beams, after, strict=True)
            for token, p in enumerate(row_of)
        ]
        longer.sort(key=lambda text: -text[1])
        over = [text[-1] in stop or step == length for text, _ in longer]
        done += [
            (text, total / lp(step))
            for (text, total), ends in zip(longer[:n_beams], over, strict=False)
            if ends
        ]
        beams = [beam for beam, ends in zip(longer, over, strict=True) if not ends][:n_beams]
        if not beams:
            break
    return sorted(done, key=lambda text: -text[1])[:n_beams]


def every_text(model, row, stop, lp, length):
    """Score every text that there is, best first."""
    texts, scored = [([], 0.0)], []
    for step in range(1, length + 1):
        after = log_probs(model, row, [text for text, _ in texts]).tolist()
        texts = [
            ([*text, token], total + p)
            for (text, total), row_of in zip(texts, after, strict=True)
            for token, p in enumerate(row_of)
        ]
        over = [text[-1] in stop or step == length for text, _ in texts]
        scored += [(t, s / lp(step)) for (t, s), ends in zip(texts, over, strict=True) if ends]
        texts = [text for text, ends in zip(texts, over, strict=True) if not ends]
    return sorted(scored, key=lambda text: -text[1])


def lists(found, i):
    """Give the hypotheses of a row as lists, with their scores."""
    pairs = zip(found.tokens[i], found.lengths[i], found.scores[i], strict=True)
    return [(text[:n].tolist(), float(score)) for text, n, score in pairs if n]


def assert_same_texts(got, expected):
    assert [text for text, _ in got] == [text for text, _ in expected]
    assert_close(*(torch.tensor([s for _, s in texts]).double() for texts in (got, expected)))


def gnmt(power):
    return lambda length: ((5 + length) / 6) ** power


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("power", [-1.0, 0.0, 0.6, 2.0])
@pytest.mark.parametrize("config", [DECODER, BOTH], ids=["decoder", "both"])
def test_with_a_beam_for_every_text_it_is_exhaustive_search(config, power, penalty):
    """All texts of at most 3 tokens, in order of their scores."""
    model = made(replace(config, vocab_size=4))
    given = {name: ids_ % 4 for name, ids_ in arguments(model).items()}
    terms = {"length_penalty": power, "penalty": penalty, "stop": 2, "max_new_tokens": 3}
    found = beam_search(model, **given, **terms, n_beams=45)
    for i, row in enumerate(rows(given)):
        expected = every_text(model, row, [2], lambda n: PENALTIES[penalty](n, power), 3)
        assert len(expected) == 1 + 3 + 9 * 4
        assert_same_texts(lists(found, i), expected)
    assert (found.scores[:, 40:] == -math.inf).all()
    assert (found.lengths[:, 40:] == 0).all()
    assert (found.tokens[:, 40:] == 2).all()


@pytest.mark.parametrize(("n_beams", "power"), [(1, 0.6), (3, 0.0), (4, 0.6), (4, 3.0), (5, -0.5)])
@pytest.mark.parametrize("name", ["MHA, rope", "encoder-decoder", "learned"])
def test_beams_are_those_of_paper_and_pencil(name, n_beams, power):
    """Row by row, without stopping: so padding, batch and stopping have changed nothing."""
    model, stop = made(CONFIGS[name]), [3, 7]
    terms = {"n_beams": n_beams, "length_penalty": power, "stop": stop}
    for padded in False, True:
        given = arguments(model, padded)
        found = beam_search(model, **given, **terms, max_new_tokens=T)
        for i, row in enumerate(rows(given)):
            expected = plain_beams(model, row, n_beams, gnmt(power), stop)
            assert_same_texts(lists(found, i), expected)


def test_scores_are_those_of_a_full_run():
    for config in DECODER, BOTH:
        model = made(config)
        given = arguments(model)
        found = beam_search(model, **given, max_new_tokens=T, stop=[3, 7], length_penalty=0.8)
        assert len(set(found.lengths.flatten().tolist())) > 1
        assert found.scores.dtype == torch.float64
        assert found.tokens.shape[-1] == found.lengths.max()
        for i, row in enumerate(rows(given)):
            assert (found.scores[i].diff() <= 0).all()
            for text, score in lists(found, i):
                total = sum(
                    log_probs(model, row, [text[:n]])[0, token] for n, token in enumerate(text)
                )
                assert_close(float(total / gnmt(0.8)(len(text))), score)


def test_one_beam_is_greedy():
    """Content with the first text, always; else, with a penalty, a longer one may be better."""
    for config in DECODER, BOTH:
        model = made(config)
        given = arguments(model) | {"max_new_tokens": T, "stop": [3, 7]}
        expected = greedy(model, **given)
        for terms in {"early_stopping": True, "length_penalty": 5.0}, {"length_penalty": 0.0}:
            assert torch.equal(
                beam_search(model, **given, n_beams=1, **terms).tokens[:, 0], expected
            )
        free = {**given, "stop": None}
        assert torch.equal(
            beam_search(model, **free, n_beams=1).tokens[:, 0], greedy(model, **free)
        )


def test_more_beams_find_texts_that_are_no_worse():
    """Not a law, as beams crowd each other out, but what they are for: seen over all rows."""
    model, prompt = made(DECODER), ids(N, batch=40)
    terms = {"max_new_tokens": T, "length_penalty": 0.0}
    best = [beam_search(model, prompt, **terms, n_beams=k).scores[:, 0].mean() for k in (1, 4, 12)]
    assert best[0] < best[1] < best[2]


@pytest.mark.parametrize("power", [0.0, 0.6])
def test_stopping_comes_before_the_last_token(power):
    """And when it comes, nothing that the model might still say could be better."""
    model, calls = made(DECODER), []
    model.head.proj.weight.data[3] += 1.0
    model.stack.register_forward_pre_hook(lambda *_: calls.append(1))
    prompt = ids(N, batch=1)
    terms = {"n_beams": 2, "length_penalty": power, "stop": [3, 7]}
    found = beam_search(model, prompt, **terms, max_new_tokens=30)
    assert len(calls) < 30
    expected = plain_beams(model, {"prompt": prompt}, 2, gnmt(power), [3, 7], 30)
    assert_same_texts(lists(found, 0), expected)


@pytest.mark.parametrize(("n_beams", "power", "sure"), [(1, 5.0, 1), (2, -3.0, 1), (2, -3.0, 4)])
def test_stopping_changes_nothing(n_beams, power, sure):
    """Neither where longer texts gain by the penalty, nor where they lose."""
    model, prompt, stop = made(DECODER), ids(N, batch=12), [3, 7, 1, 9]
    model.head.proj.weight.data *= sure
    terms = {"n_beams": n_beams, "length_penalty": power, "stop": stop, "max_new_tokens": 9}
    found = beam_search(model, prompt, **terms)
    for i in range(12):
        row = {"prompt": prompt[i : i + 1]}
        assert_same_texts(lists(found, i), plain_beams(model, row, n_beams, gnmt(power), stop, 9))


def test_early_stopping_takes_the_first():
    model, calls = made(DECODER), []
    model.stack.register_forward_pre_hook(lambda *_: calls.append(1))
    terms = {"max_new_tokens": 20, "n_beams": 3, "stop": [3, 7, 1], "length_penalty": 3.0}
    patient, steps = beam_search(model, ids(N), **terms), len(calls)
    hasty = beam_search(model, ids(N), **terms, early_stopping=True)
    assert len(calls) - steps < steps
    assert (hasty.scores <= patient.scores).all()
    assert (hasty.scores < patient.scores).any()
    assert hasty.scores.isfinite().all()


def test_a_row_that_is_done_does_not_wait_for_the_others():
    model = made(DECODER)
    for early_stopping in True, False:
        terms = {"stop": [3, 7], "early_stopping": early_stopping, "max_new_tokens": T}
        together = beam_search(model, ids(N), **terms)
        for i in range(B):
            alone = beam_search(model, ids(N)[i : i + 1], **terms)
            assert_same_texts(lists(together, i), lists(alone, 0))


def test_of_equals_the_first_is_the_better():
    """A model to which all tokens are alike writes by the order of the numbers."""
    model = made(DECODER)
    model.head.proj.weight.data.zero_()
    assert (greedy(model, ids(N), max_new_tokens=2) == 0).all()
    found = beam_search(model, ids(N), max_new_tokens=2, n_beams=15)
    pairs = [*itertools.product(range(V), repeat=2)]
    assert found.tokens[0].tolist() == [[*p] for p in pairs[:15]]
    found = beam_search(model, ids(N), max_new_tokens=2, n_beams=3, stop=1, length_penalty=0.0)
    assert lists(found, 0)[0] == ([1], pytest.approx(-math.log(V)))
    assert [text for text, _ in lists(found, 0)] == [[1], [0, 0], [0, 1]]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 40))
def test_the_best_are_those_of_a_stable_sort(scores, number):
    scores = torch.tensor([scores, scores[::-1]]) / 1.0
    scores[scores == 3] = -math.inf
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    best, places = _best(scores, number)
    assert torch.equal(best, ordered[:, :number])
    assert torch.equal(places, order[:, :number])


def test_penalties_by_hand():
    """Of 7 tokens, GNMT's is 2^α and the library's 7^α; without α there is none."""
    assert [PENALTIES[name](7, 1.0) for name in ("gnmt", "power")] == [2.0, 7.0]
    assert [PENALTIES[name](7, 0.0) for name in ("gnmt", "power")] == [1.0, 1.0]
    assert PENALTIES["gnmt"](1, 0.6) == 1.0
    assert_close(PENALTIES["gnmt"](25, 0.6), 5**0.6)


def test_texts_that_there_are_not():
    """If every text is one token long, more beams than tokens find no more."""
    model = made(replace(DECODER, vocab_size=4))
    found = beam_search(model, ids(N) % 4, max_new_tokens=2, n_beams=9, stop=range(4), pad=3)
    assert (found.lengths == torch.tensor([1] * 4 + [0] * 5)).all()
    assert (found.scores[:, :4] > -math.inf).all()
    assert (found.scores[:, 4:] == -math.inf).all()
    assert (found.tokens[:, 4:] == 3).all()


def test_log_probabilities_of_half_precision_are_those_of_float32():
    model = made(DECODER).bfloat16()
    with torch.no_grad():
        logits = model(ids(N), mask=torch.ones(B, 1, 1, N).bool())[:, -1]
    found = beam_search(model, ids(N), max_new_tokens=1, n_beams=V, length_penalty=0.0)
    assert_close(found.scores, logits.float().log_softmax(-1).sort(descending=True).values)


# --- the public library


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize(
    ("power", "early_stopping"), [(0.0, "never"), (1.0, "never"), (2.0, "never"), (1.0, True)]
)
def test_beams_are_those_of_the_library(name, power, early_stopping):
    ours, theirs, given, named = theirs_and_ours(name)
    stop = [*STOPS, *telling(greedy(ours, **given, max_new_tokens=12))]
    terms = {"length_penalty": power, "early_stopping": early_stopping, "eos_token_id": stop}
    tokens, scores = generate(theirs, named, **terms, num_beams=4, num_return_sequences=4)
    found = beam_search(
        ours,
        **given,
        max_new_tokens=12,
        length_penalty=power,
        penalty="power",
        early_stopping=early_stopping is True,
        stop=stop,
        pad=PAD,
    )
    assert torch.equal(found.tokens.flatten(0, 1), tokens)
    assert_close(found.scores.flatten().float(), scores, atol=1e-4, rtol=1e-4)
    assert power or len(set(found.lengths.flatten().tolist())) > 1


# --- what is refused


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (
            {"max_new_tokens": 0},
            "max_new_tokens must be an integer of at least 1; got 0",
        ),
        (
            {"n_beams": 0, "max_new_tokens": 9**4},
            "n_beams must be an integer of at least 1; got 0",
        ),
        (
            {"n_beams": 14, "max_new_tokens": 1},
            "n_beams must be an integer from 1 to 13; got 14",
        ),
        ({"penalty": "length"}, "penalty must be one of gnmt, power; got"),
        ({"length_penalty": math.nan}, "length_penalty must be finite; got"),
    ],
)
def test_refusals(terms, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        beam_search(made(DECODER), ids(N), **{"max_new_tokens": T, **terms})
