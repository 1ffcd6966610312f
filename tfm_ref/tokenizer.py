"""Byte-level byte-pair encoding (BPE): from text to integers and back, with nothing lost.

Text is cut into pre-tokens, roughly words with the space before them. Each becomes its UTF-8
bytes, and neighbours are merged pair by pair, in the order that training found. No token crosses
the border of a pre-token, and no text is unknown, since all 256 bytes are tokens.

A lone surrogate is no character and is refused, except U+DC80 to U+DCFF, which stand for the
bytes 80 to FF as in PEP 383: ``data.decode("utf-8", "surrogateescape")`` makes any bytes a text,
and :meth:`BPETokenizer.decode_bytes` gives them back.
"""

import json
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import cache
from heapq import heappop, heappush
from itertools import pairwise
from operator import index
from os import PathLike
from pathlib import Path
from typing import SupportsIndex

from tfm_ref.pretokens import pretoken_pattern, special_pattern

BATCH = 4096  # characters that encode_iterable gathers before it looks for borders


class BPETokenizer:
    """Turn text into ids and ids into text, by the merges that training found.

    In each pre-token the pair of neighbours that was learned first is merged, the leftmost of
    equals, until no pair is left that was learned.

    Args:
        merges: pairs of tokens, in the order of training.
        special_tokens: their names, which get the last ids; or a mapping of names to ids.
        vocab: id of each byte and merged token; if not given, 0 to 255 and then as merged.

    Raises:
        ValueError: if a merge stands twice or is made of unknown tokens, vocab holds other tokens
            than the bytes and those that the merges make, the ids are not 0, 1, 2, ..., each
            once, or a special token is empty, no text, or stands twice.

    Example:
        >>> tokenizer = BPETokenizer([(b"l", b"o"), (b"lo", b"w")], ["<eos>"])
        >>> tokenizer.encode("low<eos>")
        [257, 60, 101, 111, 115, 62]
        >>> tokenizer.encode("low<eos>", allow_special=True)
        [257, 258]
    """

    def __init__(
        self,
        merges: Iterable[tuple[bytes, bytes]],
        special_tokens: Sequence[str] | Mapping[str, int] = (),
        *,
        vocab: Mapping[bytes, int] | None = None,
    ) -> None:
        self._rank: dict[tuple[bytes, bytes], int] = {}
        known = {bytes([b]): b for b in range(256)}
        for n, (left, right) in enumerate(merges):
            if not {left, right} <= known.keys():
                raise ValueError(
                    f"a merge must join bytes or tokens made before it; merge {n} joins "
                    f"{left!r} and {right!r}"
                )
            if (left, right) in self._rank:
                raise ValueError(f"merges must differ; {(left, right)} stands twice")
            self._rank[left, right] = n
            known.setdefault(left + right, len(known))
        self.merges = list(self._rank)
        self.vocab = known if vocab is None else dict(vocab)
        if odd := self.vocab.keys() ^ known.keys():
            raise ValueError(
                "vocab must hold the 256 bytes and what the merges make, and nothing else; "
                f"{len(odd)} tokens differ, such as {min(odd)!r}"
            )
        self._special, names = special_pattern(special_tokens), list(special_tokens)
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"special tokens must differ; {name!r} stands twice")
        if not isinstance(special_tokens, Mapping):
            special_tokens = {name: len(known) + i for i, name in enumerate(names)}
        self.special_tokens = dict(special_tokens)
        ids = sorted([*self.vocab.values(), *self.special_tokens.values()])
        if ids != list(range(len(ids))):
            wrong = next(i for i, got in enumerate(ids) if got != i)
            raise ValueError(
                f"the ids of {len(ids)} tokens must be 0 to {len(ids) - 1}, each once; "
                f"in order, {ids[wrong]} stands in the place of {wrong}"
            )
        self._tokens = {i: token for token, i in self.vocab.items()}
        for name, i in self.special_tokens.items():
            self._tokens[i] = name.encode(errors="surrogateescape")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included: the rows that an embedding needs."""
        return len(self._tokens)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Turn a text into ids; a lone surrogate that stands for no byte is a ValueError.

        With ``allow_special`` the names of special tokens become their ids, the longest where
        several fit. Without it they are text like any other: what a user types can then never
        become a special token.
        """
        return list(self._encode(text, allow_special, final=True))

    def encode_iterable(
        self, texts: Iterable[str], *, allow_special: bool = False
    ) -> Iterator[int]:
        """Turn one long text, which comes in pieces, into the ids that it has as a whole.

        Memory does not grow with the text: what is held is at most a few thousand characters, or
        a few times the longest piece or pre-token where that is more.

        Args:
            texts: the pieces, cut anywhere, in the names of special tokens too.
            allow_special: as in :meth:`encode`.

        Example:
            >>> from tfm_ref import train_bpe
            >>> tokenizer = train_bpe("low lower lowest", n_merges=2)
            >>> list(tokenizer.encode_iterable(["l", "ow", "er"])) == tokenizer.encode("lower")
            True
        """
        waiting, length, enough = [], 0, BATCH
        for text in texts:
            waiting.append(text)
            length += len(text)
            if length >= enough:
                rest = yield from self._encode("".join(waiting), allow_special, final=False)
                waiting, length, enough = [rest], len(rest), max(BATCH, 2 * len(rest))
        yield from self._encode("".join(waiting), allow_special, final=True)

    def decode(self, ids: Iterable[SupportsIndex], *, errors: str = "replace") -> str:
        """Turn ids into text; what is no id of the vocabulary is a ValueError.

        Args:
            ids: the ids, special ones included.
            errors: what to do with bytes that are no UTF-8, as in ``bytes.decode``. The default
                puts U+FFFD in their place, so the ids of half a character give no half of it.
        """
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """Turn ids into bytes, which any sequence of ids has; otherwise as :meth:`decode`."""
        parts = []
        for place, i in enumerate(ids):
            try:
                parts.append(self._tokens[index(i)])
            except (KeyError, TypeError):
                raise ValueError(
                    f"ids must be integers from 0 to {self.vocab_size - 1}; got {i!r} at {place}"
                ) from None
        return b"".join(parts)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the tokenizer to a JSON file, bytes in GPT-2's alphabet of printable characters."""
        data = {
            "vocab": {_spell(token): i for token, i in self.vocab.items()},
            "merges": [[_spell(left), _spell(right)] for left, right in self.merges],
            "special_tokens": self.special_tokens,
        }
        Path(path).write_text(json.dumps(data, ensure_ascii=False), "utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "BPETokenizer":
        """Read what :meth:`save` has written; any other file is a ValueError."""
        data = json.loads(Path(path).read_text("utf-8"))
        parts = ("vocab", "merges", "special_tokens")
        if not isinstance(data, dict) or any(part not in data for part in parts):
            raise ValueError(f"the file must be a JSON object with {', '.join(parts)}; got {path}")
        vocab = {_unspell(token): i for token, i in data["vocab"].items()}
        merges = [(_unspell(left), _unspell(right)) for left, right in data["merges"]]
        return cls(merges, data["special_tokens"], vocab=vocab)

    @classmethod
    def from_gpt2(
        cls, vocab_json: str | PathLike[str], merges_txt: str | PathLike[str]
    ) -> "BPETokenizer":
        """Read the two files of GPT-2's tokenizer, and of others in that form.

        ``vocab_json`` holds the id of each token, in GPT-2's alphabet; what is neither a byte nor
        made by a merge is a special token. ``merges_txt`` has a line for each merge, its two parts
        with a space between; a file of another form is a ValueError.
        """
        lines = Path(merges_txt).read_text("utf-8").split("\n")
        if lines[0].startswith("#version"):
            del lines[0]
        merges = []
        for line in filter(None, lines):
            pair = line.split(" ")
            if len(pair) != 2 or not all(pair):
                raise ValueError(f"a merge must be two parts with a space between; got {line!r}")
            merges.append((_unspell(pair[0]), _unspell(pair[1])))
        ordinary = {*_alphabet(), *(_spell(left + right) for left, right in merges)}
        entries = json.loads(Path(vocab_json).read_text("utf-8"))
        vocab = {_unspell(token): i for token, i in entries.items() if token in ordinary}
        special = {name: i for name, i in entries.items() if name not in ordinary}
        return cls(merges, special, vocab=vocab)

    def _encode(self, text: str, allow_special: bool, final: bool) -> Generator[int, None, str]:
        """Yield the ids of what further text cannot change; return the rest of the text.

        Further text may change the last two pre-tokens ("'" and "r" may become "'re") and whatever
        may be the beginning of a special token.
        """
        start, end = 0, len(text)
        if allow_special:
            end -= 0 if final else max(map(len, self.special_tokens), default=1) - 1
            for match in self._special.finditer(text):
                if match.start() >= end:
                    break
                for word in pretoken_pattern().findall(text, start, match.start()):
                    yield from self._ids(word)
                yield self.special_tokens[match.group()]
                start = match.end()
        last: deque[re.Match[str]] = deque()
        for match in pretoken_pattern().finditer(text, start, end):
            last.append(match)
            if final or len(last) > 2:
                yield from self._ids(last.popleft().group())
        return text[last[0].start() if last else start :]

    def _ids(self, word: str) -> list[int]:
        """Merge neighbours by rank, the leftmost of equals first, in n log n steps."""
        tokens = [bytes([b]) for b in word.encode(errors="surrogateescape")]
        n, rank = len(tokens), self._rank
        left, right = list(range(-1, n - 1)), list(range(1, n + 1))
        heap = sorted((rank[pair], i) for i, pair in enumerate(pairwise(tokens)) if pair in rank)
        while heap:
            first, i = heappop(heap)
            j = right[i]
            if j == n or rank.get((tokens[i], tokens[j])) != first:
                continue  # one of the two has been merged with another
            tokens[i], tokens[j], right[i] = tokens[i] + tokens[j], b"", right[j]
            if right[i] < n:
                left[right[i]] = i
            for a, b in ((left[i], i), (i, right[i])):
                if a >= 0 and b < n and (tokens[a], tokens[b]) in rank:
                    heappush(heap, (rank[tokens[a], tokens[b]], a))
        return [self.vocab[token] for token in tokens if token]


@cache
def _alphabet() -> str:
    """Give GPT-2's printable character for each byte: itself where it is one, else U+0100 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return "".join(chr(b if b in plain else next(others)) for b in range(256))


def _spell(token: bytes) -> str:
    """Write a token in GPT-2's alphabet."""
    return "".join(map(_alphabet().__getitem__, token))


def _unspell(token: str) -> bytes:
    """Read a token that is written in GPT-2's alphabet."""
    try:
        return bytes(map(_alphabet().index, token))
    except ValueError:
        raise ValueError(f"a token must be written in GPT-2's alphabet; got {token!r}") from None
