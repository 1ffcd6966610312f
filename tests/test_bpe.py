"""The training of BPE against recounting, by hand, and against Hugging Face."""

import json
import re
from collections import Counter
from itertools import islice, pairwise

import pytest
from corpora import CORPUS, ONE, SPECIAL, SURROGATE, explore
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tfm_ref import bpe_merges, train_bpe
from tfm_ref.pretokens import pretoken_pattern


def by_hugging_face(words, n_merges):
    """Train on words, with the bytes as characters in the order of their values."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("\n")
    base = 0x4E00
    trainer = trainers.BpeTrainer(
        vocab_size=256 + n_merges,
        initial_alphabet=[chr(base + b) for b in range(256)],
        show_progress=False,
    )
    lines = "\n".join("".join(chr(base + b) for b in word.encode()) for word in words)
    tokenizer.train_from_iterator([lines], trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(bytes(ord(c) - base for c in part) for part in pair) for pair in merges]


def test_trains_as_hugging_face():
    """The same merges in the same order, ties included, once the bytes have the same order."""
    words = pretoken_pattern().findall(CORPUS)
    found = [(left, right) for left, right, _ in islice(bpe_merges(CORPUS), 200)]
    assert found == by_hugging_face(words, 200)


def by_recounting(texts, special_tokens=()):
    """Count all pairs anew for each merge: the form to read."""
    texts = [texts] if isinstance(texts, str) else texts
    for name in special_tokens:
        texts = [part for text in texts for part in text.split(name)]
    counts = Counter(word for text in texts for word in pretoken_pattern().findall(text))
    words = {tuple(bytes([b]) for b in word.encode()): n for word, n in counts.items()}
    ids = {bytes([b]): b for b in range(256)}
    while True:
        pairs = Counter()
        for word, n in words.items():
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs:
            return
        left, right = min(pairs, key=lambda p: (-pairs[p], ids[p[0]], ids[p[1]]))
        yield left, right, pairs[left, right]
        assert left + right not in ids, "no two merges make the same token"
        ids[left + right] = len(ids)
        after = Counter()
        for word, n in words.items():
            joined = list(word)
            for i in range(len(word) - 1):
                if joined[i : i + 2] == [left, right]:
                    joined[i : i + 2] = [left + right, b""]
            after[tuple(filter(None, joined))] += n
        words = after


@settings(explore, max_examples=200)
@given(st.lists(st.text("ab é", max_size=60), min_size=1, max_size=3).filter(any))
@example(["a" * 50])
@example(["abababa babab"])
def test_training_equals_recounting(corpus):
    assert list(bpe_merges(corpus)) == list(by_recounting(corpus))


def test_training_equals_recounting_on_text():
    found = islice(bpe_merges(CORPUS, special_tokens=["cat"]), 300)
    assert list(found) == list(islice(by_recounting(CORPUS, ["cat"]), 300))


def test_merges_by_hand():
    """In "low lower lowest" l, o and o, w stand three times; l is the smaller byte."""
    found = [(left + right, count) for left, right, count in bpe_merges("low lower lowest")]
    assert found[:4] == [(b"lo", 3), (b"low", 3), (b" low", 2), (b" lowe", 2)]
    assert [count for _, count in found[4:]] == [1, 1, 1]


def test_ties():
    """Among equals: the smaller id on the left, then on the right; an older token is smaller."""
    assert next(bpe_merges(["ca", "ab", "bc"]))[:2] == (b"a", b"b")
    assert next(bpe_merges(["ac", "ab"]))[:2] == (b"a", b"b")
    found = [m.left + m.right for m in bpe_merges(["ba", "ba", "aa", "aa", "bac", "aac"])]
    assert found == [b"aa", b"ba", b"aac", b"bac"]


def test_overlapping_pairs_count_each_place():
    assert [(m.left + m.right, m.count) for m in bpe_merges("aaaa")] == [(b"aa", 3), (b"aaaa", 1)]


def test_no_merge_crosses_texts_or_special_tokens():
    assert list(bpe_merges(["a", "a", "b"])) == []
    assert list(bpe_merges("a<s>a<s>b", special_tokens=["<s>"])) == []
    assert list(bpe_merges("x<s>x", special_tokens=["<s", "<s>"])) == []
    assert train_bpe("<s>ab<s>", n_merges=1, special_tokens=["<s>"]).merges == [(b"a", b"b")]


def test_sizes():
    by_merges = train_bpe(CORPUS, n_merges=50, special_tokens=SPECIAL)
    by_size = train_bpe(CORPUS, vocab_size=256 + 50 + 4, special_tokens=SPECIAL)
    assert by_merges.merges == by_size.merges
    assert by_merges.vocab_size == by_size.vocab_size == 310
    assert list(by_merges.special_tokens.values()) == [306, 307, 308, 309]
    assert train_bpe("a", n_merges=0).vocab_size == 256
    assert train_bpe("ab", vocab_size=256).merges == []


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": ""}, "the corpus must hold at least one character; got none"),
        ({"texts": []}, "the corpus must hold at least one character; got none"),
        ({"texts": "a\ud800"}, SURROGATE + "0: surrogates not allowed"),
        ({"n_merges": -1}, "n_merges must be an integer of at least 0; got -1"),
        ({"n_merges": 1.0}, "n_merges must be an integer of at least 0; got 1.0"),
        ({"n_merges": None}, "give n_merges or vocab_size; got None and None"),
        ({"vocab_size": 300}, "give n_merges or vocab_size; got 1 and 300"),
        (
            {"n_merges": None, "vocab_size": 257, "special_tokens": ["<a>", "<b>"]},
            "vocab_size, with 256 bytes and 2 special tokens, must be an integer of at least 258; "
            "got 257",
        ),
        ({"n_merges": 3}, "the corpus has 2 merges; 3 were asked for"),
        ({"n_merges": None, "vocab_size": 259}, "the corpus has 2 merges; 3 were asked for"),
        ({"special_tokens": [""]}, ONE + "['']"),
        ({"special_tokens": "<s>"}, ONE + "'<s>'"),
    ],
)
def test_training_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train_bpe(**{"texts": "abc", "n_merges": 1, **arguments})


def test_merges_refuse_a_text_for_a_list():
    with pytest.raises(ValueError, match=re.escape(ONE + "'<s>'")):
        next(bpe_merges("a<s>b", special_tokens="<s>"))
