"""Where a text is cut before anything is merged: into pre-tokens, and at special tokens."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from itertools import groupby


@cache
def pretoken_pattern() -> re.Pattern[str]:
    r"""Build GPT-2's pattern, whose matches are the pre-tokens, for Python's own ``re``.

    ``'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`` with Unicode's
    letters, numbers and white space; ``encoder.py`` of GPT-2 takes the package ``regex`` for it.
    (Python's ``\w`` and ``\d`` are others, and its ``\s`` has U+001C to U+001F as well.)

    Example:
        >>> pretoken_pattern().findall("It's  42 cats!")
        ['It', "'s", ' ', ' 42', ' cats', '!']
    """
    ranges: defaultdict[str, str] = defaultdict(str)
    for major, group in groupby(range(0x110000), lambda i: unicodedata.category(chr(i))[0]):
        run = list(group)
        ranges[major] += rf"\U{run[0]:08x}-\U{run[-1]:08x}"
    letter, number = ranges["L"], ranges["N"]
    space = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    return re.compile(
        rf"'s|'t|'re|'ve|'m|'ll|'d| ?[{letter}]+| ?[{number}]+| ?[^{space}{letter}{number}]+"
        rf"|[{space}]+(?![^{space}])|[{space}]+"
    )


def special_pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Build a pattern that finds special tokens, the longest first, and nothing if there are none.

    Args:
        names: the special tokens.

    Raises:
        ValueError: if they are no list of texts, or one is empty.

    Example:
        >>> special_pattern(["<eos>"]).split("one<eos>two")
        ['one', 'two']
    """
    names = names if isinstance(names, str) else list(names)
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"special_tokens must be a list of texts, none empty; got {names!r}")
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
