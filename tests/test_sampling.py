"""Filters and distributions against hand-made ones and those of the public library."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import draw
from torch.testing import assert_close
from transformers import LogitsProcessorList
from transformers.generation import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tfm_ref import sampling_probs, top_k_filter, top_p_filter

V = 13


def test_filters_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).log()
    infinite = -math.inf
    assert top_k_filter(logits, 1).exp().tolist() == [[0.5, 0, 0], [0, pytest.approx(0.6), 0]]
    kept = top_p_filter(logits, 0.55) > infinite
    assert kept.tolist() == [[True, True, False], [False, True, False]]
    kept = top_p_filter(logits, 0.65) > infinite
    assert kept.tolist() == [[True, True, False], [False, True, True]]
    even = torch.zeros(4)
    assert (top_k_filter(even, 2) > infinite).all()  # all equal the last that is kept
    assert (top_p_filter(even, 0.5) > infinite).tolist() == [True, True, False, False]
    assert (top_p_filter(even, 0.51) > infinite).tolist() == [True, True, True, False]
    assert (top_p_filter(even, 1e-30) > infinite).tolist() == [True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_what_float32_keeps(dtype):
    """Sums of thousands of small probabilities need more than eight bits."""
    logits = draw(2, 20_000).to(dtype)
    for top_p in 0.5, 0.9, 0.99:
        kept, expected = (top_p_filter(x, top_p) > -math.inf for x in (logits, logits.float()))
        assert torch.equal(kept, expected)


def test_what_keeps_all_changes_nothing():
    logits = 30 * draw(50, V)
    assert torch.equal(top_k_filter(logits, V), logits)
    assert torch.equal(top_p_filter(logits, 1.0), logits)
    assert torch.equal(sampling_probs(logits), logits.softmax(-1))
    assert torch.equal(sampling_probs(logits, temperature=2.0), (logits / 2).softmax(-1))


@given(st.floats(0.1, 5), st.integers(1, V), st.floats(0.01, 1), st.integers(0, 99))
def test_the_distribution_is_that_of_the_library(temperature, top_k, top_p, seed):
    """In the same order: temperature, top-k, top-p."""
    logits = 2 * draw(4, V, seed=seed).double()
    warpers = TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)
    expected = LogitsProcessorList(warpers)(None, logits).softmax(-1)
    got = sampling_probs(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    assert_close(got, expected)
    assert_close(top_k_filter(logits, top_k), TopKLogitsWarper(top_k)(None, logits))
    assert_close(top_p_filter(logits, top_p), TopPLogitsWarper(top_p)(None, logits))


@given(st.floats(0.01, 0.99), st.integers(0, 99))
def test_top_p_keeps_the_fewest_that_reach_it(top_p, seed):
    probs = draw(V, seed=seed).double().softmax(-1)
    kept = probs[top_p_filter(probs.log(), top_p) > -math.inf]
    assert kept.sum() >= top_p - 1e-12
    assert kept.sum() - kept.min() < top_p
    assert kept.min() > max([p for p in probs if p not in kept], default=0)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"temperature": 0.0}, "temperature must be finite and above 0; got 0.0"),
        ({"temperature": 0.0}, "At 0 nothing is left to chance: use greedy"),
        ({"temperature": math.inf}, "must be finite and above 0; got inf"),
        ({"top_p": 0.0}, "top_p must lie in 0 < top_p <= 1; got 0.0"),
        ({"top_p": 1.5}, "top_p must lie in 0 < top_p <= 1; got 1.5"),
        ({"top_k": 0}, "top_k must be an integer from 1 to 13; got 0"),
        ({"top_k": 14}, "top_k must be an integer from 1 to 13; got 14"),
    ],
)
def test_refusals(terms, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sampling_probs(torch.zeros(2, V), **terms)
