"""Pre-tokens against GPT-2's own pattern, character by character."""

import sys

import regex
from corpora import assigned, explore, texts
from hypothesis import example, given
from hypothesis import strategies as st

from tfm_ref.pretokens import pretoken_pattern

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@given(st.integers(0, sys.maxunicode).filter(lambda i: not 0xD800 <= i < 0xE000).map(chr))
@explore
@example("\x1c")
@example("\x85")
def test_classes_are_unicodes(char):
    """A character is split from a letter, a number and a sign as the package regex splits it."""
    if assigned(char):
        text = f"a{char}a1{char}1.{char}. {char} "
        assert pretoken_pattern().findall(text) == regex.findall(PATTERN, text)


@explore
@given(texts)
@example("it's don't they're I've I'm we'll he'd 'RE 'x ''s y'all's  'tis '")
def test_pretokens_are_gpt2s(text):
    assert pretoken_pattern().findall(text) == regex.findall(PATTERN, text)


def test_white_space_is_unicodes():
    spaces = [c for c in map(chr, range(0x3001)) if regex.match(r"\p{White_Space}", c)]
    assert len(spaces) == 25
    assert all(pretoken_pattern().findall(f"a{c}{c}b")[1] == c for c in spaces)
    assert pretoken_pattern().findall("a\x1c\x1cb") == ["a", "\x1c\x1c", "b"]
