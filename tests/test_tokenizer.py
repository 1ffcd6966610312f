"""The tokenizer against the public ones, against plain recounting, by hand, and what it refuses."""

import gc
import json
import random
import re
import tracemalloc
from functools import cache
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from corpora import CORPUS, ONE, SPACES, SPECIAL, SURROGATE, explore, pieces, texts
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tfm_ref import BPETokenizer, train_bpe
from tfm_ref.pretokens import pretoken_pattern
from tfm_ref.tokenizer import _alphabet


@cache
def ours():
    return train_bpe(CORPUS, n_merges=150, special_tokens=SPECIAL)


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """Train a byte-level BPE with Hugging Face's tokenizers, and load its two files."""
    folder = tmp_path_factory.mktemp("gpt2")
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([CORPUS], trainer)
    theirs.model.save(str(folder))
    return folder, theirs, BPETokenizer.from_gpt2(folder / "vocab.json", folder / "merges.txt")


# --- the public tokenizers


def test_the_files_give_the_whole_vocabulary(public):
    _, theirs, loaded = public
    assert loaded.vocab_size == theirs.get_vocab_size() == 400
    assert loaded.special_tokens == {name: theirs.token_to_id(name) for name in SPECIAL}
    assert len(loaded.merges) == 400 - 256 - len(SPECIAL)


@explore
@given(texts)
@example(CORPUS)
@example(SPACES + "a" + "a".join(SPACES))
@example("a\x1c\x1d b\x1e \x1f c\x85\x85d\u180e\u200b e")
@example("\ufeffx\x00\x01 ²Ⅷ٣ ǅ ʰ ª")
def test_equals_hugging_face(public, text):
    """Ids of any text, and the text of the ids, special tokens on; see :func:`assigned`."""
    _, theirs, loaded = public
    ids = theirs.encode(text).ids
    assert loaded.encode(text, allow_special=True) == ids
    assert loaded.decode(ids) == theirs.decode(ids, skip_special_tokens=False) == text


@explore
@given(st.lists(st.integers(0, 399), max_size=12))
def test_decodes_broken_characters_as_hugging_face(public, ids):
    _, theirs, loaded = public
    ordinary = [i for i in ids if i not in loaded.special_tokens.values()]
    assert loaded.decode(ordinary) == theirs.decode(ordinary)


def test_equals_gpt2_tokenizer_of_transformers(public):
    from transformers import GPT2Tokenizer

    _, _, loaded = public
    vocab = {
        **{"".join(_alphabet()[b] for b in token): i for token, i in loaded.vocab.items()},
        **loaded.special_tokens,
    }
    merges = [tuple("".join(_alphabet()[b] for b in t) for t in pair) for pair in loaded.merges]
    theirs = GPT2Tokenizer(vocab=vocab, merges=merges)
    for text in [CORPUS, SPACES, "a<|endoftext|> b", "it's 'tis\n\n x"]:
        assert loaded.encode(text, allow_special=True) == theirs.encode(text)


def twice():
    """Make abc by two merges."""
    return BPETokenizer([(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"a", b"bc")])


def test_two_merges_may_make_one_token():
    """Training does not, but other tokenizers may."""
    assert twice().vocab_size == 256 + 3
    assert twice().vocab[b"abc"] == 258


# --- encoding and decoding


@explore
@given(st.text(max_size=200))
@example("\x1c\x85\u2028\ufeff")
def test_any_text_comes_back(text):
    assert ours().decode(ours().encode(text)) == text
    assert ours().decode(ours().encode(text, allow_special=True)) == text


@explore
@given(st.binary(max_size=200))
def test_any_bytes_come_back(data):
    ids = ours().encode(data.decode("utf-8", "surrogateescape"))
    assert ours().decode_bytes(ids) == data
    assert ours().decode(ids, errors="surrogateescape").encode(errors="surrogateescape") == data
    assert ours().decode(ids) == data.decode("utf-8", "replace")


@explore
@given(st.lists(pieces, max_size=60), st.integers(1, 7), st.booleans(), st.integers(1, 12))
def test_pieces_give_the_ids_of_the_whole(parts, step, allow, batch):
    """The whole is cut at special tokens and into pre-tokens here, by other means."""
    text = "".join(parts)
    chunks = [text[i : i + step] for i in range(0, len(text), step)]
    found = in_pieces(chunks, batch, allow_special=allow)
    names = sorted(SPECIAL, key=len, reverse=True)
    split = re.split(f"({'|'.join(map(re.escape, names))})", text) if allow else [text]
    wanted = []
    for i, part in enumerate(split):
        if i % 2:
            wanted.append(ours().special_tokens[part])
        else:
            for word in pretoken_pattern().findall(part):
                wanted += greedy_by_rank(ours(), word.encode())
    assert found == wanted == ours().encode(text, allow_special=allow)


def greedy_by_rank(tokenizer, word):
    """Merge as the definition says it: look for the best pair of all, again and again."""
    tokens, ranks = [bytes([b]) for b in word], {p: n for n, p in enumerate(tokenizer.merges)}
    while found := [(ranks[p], i) for i, p in enumerate(pairwise(tokens)) if p in ranks]:
        _, i = min(found)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
    return [tokenizer.vocab[token] for token in tokens]


def in_pieces(pieces, batch, **options):
    """Let encode_iterable look for borders after a few characters, not thousands."""
    with patch("tfm_ref.tokenizer.BATCH", batch):
        return list(ours().encode_iterable(pieces, **options))


@pytest.mark.parametrize(
    "pieces",
    [
        ["it'", "s"],
        ["they'", "re"],
        ["they'r", "e"],
        ["they'l", "l", "s"],
        ["a  ", " b"],
        ["a ", " "],
        ["a\n", "\n", "b"],
        ["a \n", " b"],
        ["x<|end", "oftext|>", "<|end|>"],
        ["<|endoftext|><|e", "nd|>"],
        ["<|endoftext|><|e", "nde"],
        ["<|endoftext|><|end|", ">"],
        ["", "a", "", "b", ""],
        [],
    ],
)
@pytest.mark.parametrize("batch", [1, 4096])
def test_borders_of_pieces(pieces, batch):
    found = in_pieces(pieces, batch, allow_special=True)
    assert found == ours().encode("".join(pieces), allow_special=True)


def test_merging_by_hand():
    """By rank, not by length: bc was learned first, so abc is a and bc, though ab is known."""
    tokenizer = BPETokenizer([(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")])
    assert tokenizer.encode("abc") == [97, 256]
    assert tokenizer.encode("abab") == [257, 257]
    assert BPETokenizer([(b"a", b"a")]).encode("aaa") == [256, 97]  # from the left
    assert twice().encode("abc") == [258]
    later = BPETokenizer([(b"b", b"c"), (b"a", b"bc"), (b"a", b"b")])
    assert later.encode("abc") == [257]  # the pair a, b is out of date when its turn comes


def test_special_tokens():
    tokenizer = ours()
    ids = tokenizer.special_tokens
    text = "a<|endoftext|><|end|>b<|end|>"
    assert not set(ids.values()) & set(tokenizer.encode(text))
    longest = [97, ids["<|endoftext|><|end|>"], 98, ids["<|end|>"]]
    assert tokenizer.encode(text, allow_special=True) == longest
    assert tokenizer.decode(longest) == text
    assert BPETokenizer([], ["é"]).decode_bytes([256]) == "é".encode()
    assert BPETokenizer([], ["a.", "a"]).encode("ax", allow_special=True) == [257, 120]


def test_a_special_token_that_is_also_a_token_has_its_own_id():
    tokenizer = BPETokenizer([(b"a", b"b")], {"ab": 257, "c": 258})
    assert tokenizer.encode("abc") == [256, 99]
    assert tokenizer.encode("abc", allow_special=True) == [257, 258]


def test_ids_may_be_tensors():
    assert ours().decode(torch.tensor([97, 98])) == "ab"


def test_half_a_character():
    ids = ours().encode("🐈‍⬛")
    assert ours().decode(ids[:1]) == "\ufffd"
    assert ours().decode_bytes(ids[:1]) + ours().decode_bytes(ids[1:]) == "🐈‍⬛".encode()


# --- time and memory


def test_a_stream_takes_no_more_memory_than_its_pieces():
    """What is held does not grow with the stream: ten times the text, and not 100 kB more."""
    stream = random.Random(0)
    words = ["".join(stream.choices("abcdefgh", k=6)) for _ in range(100)]
    line = " ".join(words)
    tokenizer = train_bpe(line, n_merges=100)

    def peak(n):
        gc.collect()
        tracemalloc.start()
        count = sum(1 for _ in tokenizer.encode_iterable(line for _ in range(n)))
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return count, held

    _, short = peak(60)
    count, long = peak(600)
    assert count > 100_000
    assert long < short + 100_000 < 2_000_000


def test_a_long_run_without_a_border_takes_no_square_of_its_length():
    """A million letters, one piece at a time: steps are counted, not seconds."""
    tokenizer = train_bpe("ab", n_merges=1)
    seen = []
    encode = tokenizer._encode
    tokenizer._encode = lambda text, *args, **kw: (
        seen.append(len(text)) or encode(text, *args, **kw)
    )
    assert list(tokenizer.encode_iterable("ab" for _ in range(500_000))) == [256] * 500_000
    assert sum(seen) < 4 * 1_000_000


# --- files


def test_saved_and_loaded(tmp_path, public):
    for i, tokenizer in enumerate([ours(), public[2], twice()]):
        tokenizer.save(tmp_path / f"{i}.json")
        again = BPETokenizer.load(tmp_path / f"{i}.json")
        assert again.merges == tokenizer.merges
        assert again.vocab == tokenizer.vocab
        assert again.special_tokens == tokenizer.special_tokens
        assert again.encode(CORPUS) == tokenizer.encode(CORPUS)
        assert isinstance(json.loads((tmp_path / f"{i}.json").read_text("utf-8")), dict)


def test_a_merge_of_number_signs_is_no_comment(tmp_path):
    vocab = {c: i for i, c in enumerate(sorted(_alphabet()))} | {"##": 256, "#version": 257}
    (tmp_path / "v.json").write_text(json.dumps(vocab), "utf-8")
    for text in ["#version: 0.2\n# #\n", "# #\n", "#version: 0.2\r\n# #\r\n"]:
        (tmp_path / "m.txt").write_bytes(text.encode())
        tokenizer = BPETokenizer.from_gpt2(tmp_path / "v.json", tmp_path / "m.txt")
        assert tokenizer.merges == [(b"#", b"#")]
        assert tokenizer.special_tokens == {"#version": 257}
        assert tokenizer.encode("##!") == [256, sorted(_alphabet()).index("!")]


def test_the_alphabet_is_gpt2s():
    assert set(_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert _alphabet()[32] == "Ġ"
    assert _alphabet()[10] == "Ċ"
    assert len(set(_alphabet())) == 256


BYTES = {bytes([b]): b for b in range(256)}
VOCAB = "vocab must hold the 256 bytes and what the merges make, and nothing else; "


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ([(b"a", b"b"), (b"abc", b"d")],),
            "a merge must join bytes or tokens made before it; merge 1 joins b'abc' and b'd'",
        ),
        (
            ([(b"a", b"b"), (b"b", b"c"), (b"a", b"b")],),
            "merges must differ; (b'a', b'b') stands twice",
        ),
        (((), [""]), ONE + "['']"),
        (((), [7]), ONE + "[7]"),
        (((), "<s>"), ONE + "'<s>'"),
        (((), ["<s>", "<t>", "<s>"]), "special tokens must differ; '<s>' stands twice"),
        (((), ["a\ud800"]), SURROGATE + "1: surrogates not allowed"),
        (
            ((), {"<s>": 255}),
            "the ids of 257 tokens must be 0 to 256, each once; in order, 255 stands in the place "
            "of 256",
        ),
        (
            ((), {"<s>": 300}),
            "the ids of 257 tokens must be 0 to 256, each once; in order, 300 stands in the place "
            "of 256",
        ),
    ],
)
def test_tokenizers_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        BPETokenizer(*arguments)


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        (BYTES | {b"ab": 256}, VOCAB + "1 tokens differ, such as b'ab'"),
        ({b: i for b, i in BYTES.items() if i}, VOCAB + "1 tokens differ, such as b'\\x00'"),
    ],
)
def test_vocabularies_refused(vocab, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        BPETokenizer((), vocab=vocab)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([97, 256], "ids must be integers from 0 to 255; got 256 at 1"),
        ([-1], "ids must be integers from 0 to 255; got -1 at 0"),
        ([1.0], "ids must be integers from 0 to 255; got 1.0 at 0"),
        (["a"], "ids must be integers from 0 to 255; got 'a' at 0"),
    ],
)
def test_ids_refused(ids, message):
    for method in (BPETokenizer(()).decode, BPETokenizer(()).decode_bytes):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            method(ids)


@pytest.mark.parametrize("code", [0xD800, 0xDC7F, 0xDD00, 0xDFFF])
def test_lone_surrogates_refused(code):
    char = chr(code)
    with pytest.raises(ValueError, match=r"surrogates not allowed$"):
        ours().encode(f"a{char}")
    with pytest.raises(ValueError, match=r"surrogates not allowed$"):
        list(ours().encode_iterable(["a", char]))


@pytest.mark.parametrize("content", ["[]", '{"vocab": {}, "merges": []}', "3"])
def test_other_files_refused(tmp_path, content):
    (tmp_path / "t.json").write_text(content, "utf-8")
    message = "the file must be a JSON object with vocab, merges, special_tokens; got "
    with pytest.raises(ValueError, match=f"^{message}"):
        BPETokenizer.load(tmp_path / "t.json")


@pytest.mark.parametrize("line", ["a", "a b c", " a", "a ", "a  b"])
def test_malformed_merges_refused(tmp_path, line):
    (tmp_path / "v.json").write_text("{}", "utf-8")
    (tmp_path / "m.txt").write_text(f"#version: 0.2\n{line}\n", "utf-8")
    message = f"a merge must be two parts with a space between; got {line!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        BPETokenizer.from_gpt2(tmp_path / "v.json", tmp_path / "m.txt")


def test_tokens_outside_the_alphabet_refused(tmp_path):
    (tmp_path / "v.json").write_text("{}", "utf-8")
    (tmp_path / "m.txt").write_text("猫 a\n", "utf-8")
    message = "^a token must be written in GPT-2's alphabet; got '猫'"
    with pytest.raises(ValueError, match=message):
        BPETokenizer.from_gpt2(tmp_path / "v.json", tmp_path / "m.txt")
