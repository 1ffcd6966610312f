"""Batches by hand, and what holds for every order and every size."""

import re

import pytest
import torch
from runs import IDS, PAIRS

from tfm_ref import Batch, TokenBatches, padding_share


def test_a_batch_by_hand():
    batch = Batch.of([([5, 6, 7], [8]), ([5], [8, 9])], **IDS)
    assert batch.source.tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch.source_mask.tolist() == [[[[True] * 3]], [[[True, False, False]]]]
    assert batch.target_in.tolist() == [[1, 8, 0], [1, 8, 9]]
    assert batch.target_out.tolist() == [[8, 2, -100], [8, 9, 2]]
    assert (len(batch), batch.n_tokens) == (2, 5)
    assert padding_share([batch]) == 3 / 12
    assert padding_share([batch, batch[1:]]) == (3 + 2) / 18
    assert all(t.dtype == torch.int64 for t in (batch.source, batch.target_in, batch.target_out))


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="the number of pairs must be an integer of at least 1"):
        Batch.of([], **IDS)


def test_a_batch_of_an_empty_target_and_a_pad_that_is_not_zero():
    batch = Batch.of([([5], []), ([5, 6], [7])], pad=9, bos=1, eos=2)
    assert batch.source.tolist() == [[5, 9], [5, 6]]
    assert batch.target_in.tolist() == [[1, 9], [1, 7]]
    assert batch.target_out.tolist() == [[2, -100], [7, 2]]
    assert Batch.of([([], [5]), ([5], [5])], **IDS).source.dtype == torch.int64


def test_rows_and_devices():
    batch = Batch.of(PAIRS[:5], **IDS)
    part = batch[1::2]
    for name in "source", "source_mask", "target_in", "target_out":
        assert torch.equal(getattr(part, name), getattr(batch, name)[[1, 3]])
        assert getattr(batch.to("meta"), name).is_meta
    assert len(batch[9::2]) == 0


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_every_pair_once_and_no_batch_too_large(chunk):
    batches = TokenBatches(pairs=PAIRS, max_tokens=40, chunk=chunk, **IDS)
    seen = []
    for rows, batch in zip(batches.rows(3), batches(3), strict=True):
        seen += rows
        assert len(batch) * max(batch.source.shape[1], batch.target_in.shape[1]) <= 40
        assert torch.equal(batch.source[:, 0], torch.tensor([3 + i for i in rows]))
    assert sorted(seen) == list(range(60))


def test_sorting_saves_padding_and_fills_batches():
    def dealt(chunk):  # 1 sorts nothing
        return list(TokenBatches(pairs=PAIRS, max_tokens=40, chunk=chunk, **IDS)(0))

    assert padding_share(dealt(4096)) < padding_share(dealt(7)) < padding_share(dealt(1))
    assert len(dealt(4096)) < len(dealt(1))
    assert TokenBatches(pairs=PAIRS, max_tokens=40, **IDS).chunk == 4096
    sizes = [len(b) * max(b.source.shape[1], b.target_in.shape[1]) for b in dealt(4096)]
    assert sorted(sizes)[1] > 25  # only the last one of a chunk may be small


def test_a_long_pair_does_not_make_later_batches_small():
    """Sixteen pairs of length 1 fill two batches of 8, or three around one of length 8."""
    pairs = [([5], [])] * 16 + [([5] * 8, [])]
    batches = TokenBatches(pairs=pairs, max_tokens=8, chunk=1, **IDS)
    assert all(len(batches.rows(epoch)) <= 4 for epoch in range(5))


def test_the_order_follows_from_seed_and_epoch():
    def dealt(epoch, seed=0):
        return TokenBatches(pairs=PAIRS, max_tokens=40, seed=seed, **IDS).rows(epoch)

    torch.manual_seed(5)
    assert dealt(0) == dealt(0)
    assert dealt(0) != dealt(1)
    assert dealt(0) != dealt(0, seed=1)
    assert dealt(0, seed=1) != dealt(1)
    longest = [max(max(len(PAIRS[i][0]), len(PAIRS[i][1]) + 1) for i in rows) for rows in dealt(0)]
    assert longest != sorted(longest)  # batches are shuffled after sorting


def test_pairs_of_one_length_are_shuffled_among_batches():
    pairs = [([5], [6])] * 8
    first, second = (TokenBatches(pairs=pairs, max_tokens=8, **IDS).rows(e) for e in (0, 1))
    assert {frozenset(rows) for rows in first} != {frozenset(rows) for rows in second}
    assert [len(rows) for rows in first] == [4, 4]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1; got 0"),
        ({"chunk": 0}, "chunk must be an integer of at least 1; got 0"),
        ({"pairs": []}, "the number of pairs must be an integer of at least 1; got 0"),
        (
            {"pairs": [([5], [6]), ([], [6])]},
            "a source must have at least one token; got none in pair 1",
        ),
        (
            {"pairs": [([5], [6]), ([5] * 9, [])]},
            "a pair must be no longer than max_tokens (8); got 9 in pair 1",
        ),
        ({"pairs": [([5], [6] * 8)]}, "a pair must be no longer than max_tokens (8); got 9"),
    ],
)
def test_batches_refuse(terms, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenBatches(**{"pairs": PAIRS, "max_tokens": 8, **IDS} | terms)
