"""Texts of every kind, and special tokens, that tests of tokenizers share."""

import sys
import unicodedata
from functools import cache

import regex
from hypothesis import settings
from hypothesis import strategies as st

explore = settings(deadline=None, derandomize=True, max_examples=300)

SPECIAL = ["<|endoftext|>", "<|end|>", "<|endoftext|><|end|>", "<pad>"]
CORPUS = (
    "They're, we're, you're and they'll, we'll, you'll, they've, we've, you've. "
    "The cat sat on the mat because it was tired. The cats' mats weren't the cat's: they'd been "
    "sat on 12 times, 120 times, in 2017 and 1917!  Naïve café, Straße, ½ π², Ελλάδα, Привет мир, "
    "今日は良い天気です。 नमस्ते दुनिया, مرحبا 🐣🐈‍⬛!!!\n\n\tif x == 10:\r\n\t    return x  # done\n"
) * 3


@cache
def assigned(char):
    """Say whether a character is assigned both here and in the Unicode version of ``regex``.

    Python 3.11 has Unicode 14, 3.13 has 15.1, and the public tokenizers have tables of their own.
    A character that is assigned in one and not in the other is a letter here and a sign there.
    """
    return unicodedata.category(char) != "Cn" and not regex.match(r"\p{Cn}", char)


SPACES = "".join(c for c in map(chr, range(sys.maxunicode)) if c.isspace()) + "\u200b\u180e\ufeff"
chars = st.characters(exclude_categories=["Cs", "Cn"]).filter(assigned)
pieces = st.one_of(
    chars,
    st.sampled_from(sorted(set(CORPUS))),
    st.sampled_from(SPACES),
    st.sampled_from(["'s", "'ll", "'re", "'RE", "''t", " ", "  ", "\n", "\r\n", "'", "the", "12"]),
    st.sampled_from([*SPECIAL, "<|", "<|endof", "text|>", "<", ">"]),
)
texts = st.lists(pieces, max_size=40).map("".join)


SURROGATE = "'utf-8' codec can't encode character '\\ud800' in position "
ONE = "special_tokens must be a list of texts, none empty; got "
