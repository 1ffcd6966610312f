"""Sizes: counts and caches by hand; tests/test_zoo.py has those of public models."""

import re
from dataclasses import replace

import pytest
from oracles import tiny

from tfm_ref import MODELS, build, full_size, kv_cache_bytes
from tfm_ref.sizes import ParameterCount

GPT2 = full_size("GPT-2 small")


def test_parameter_count_by_hand():
    count = ParameterCount(total=100, active=60, embedding=20, head=10)
    assert (count.without_embeddings, count.active_without_lookup) == (70, 40)
    tied = ParameterCount(total=100, active=60, embedding=20, head=0)
    assert (tied.without_embeddings, tied.active_without_lookup) == (80, 60)


def test_caches_with_windows_and_sources():
    """Gemma 2 2B: 13 layers remember all, 13 no more than 4,096; a source is remembered apart."""
    model = full_size("Gemma-2-2B")
    per_layer = 2 * 4 * 256 * 2
    assert kv_cache_bytes(model, 10_000) == per_layer * 13 * (10_000 + 4096)
    assert kv_cache_bytes(model, 4096) == per_layer * 26 * 4096
    assert kv_cache_bytes(model, 0) == 0
    sinks = build(replace(tiny(MODELS["Mistral-7B-v0.1"].config), n_first=2))
    per_token = kv_cache_bytes(sinks)
    assert [kv_cache_bytes(sinks, n) for n in (4, 5, 100)] == [n * per_token for n in (4, 5, 5)]
    bart = full_size("BART-large")
    assert kv_cache_bytes(bart, 3, source_length=5) == 2 * 1024 * 12 * (3 + 5) * 2
    assert kv_cache_bytes(bart, 3, bytes_per_number=1) == 2 * 1024 * 12 * 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: kv_cache_bytes(GPT2, -1),
            "length must be an integer of at least 0",
        ),
        (
            lambda: kv_cache_bytes(GPT2, source_length=-1),
            "source_length must be an integer of at least 0; got -1",
        ),
        (
            lambda: kv_cache_bytes(GPT2, bytes_per_number=0),
            "bytes_per_number must be an integer of at least 1; got 0",
        ),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        wrong()
