"""The training of byte-pair encoding (BPE): which neighbours to merge, and in which order."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import islice, pairwise
from typing import NamedTuple

from tfm_ref.pretokens import pretoken_pattern, special_pattern
from tfm_ref.tokenizer import BPETokenizer
from tfm_ref.validation import check_size


class Merge(NamedTuple):
    """Two neighbours that training joins into one token, and how often they stood so."""

    left: bytes
    right: bytes
    count: int


def bpe_merges(
    texts: str | Iterable[str], *, special_tokens: Iterable[str] = ()
) -> Iterator[Merge]:
    """Find the pairs to merge, one after another, until no pre-token has two parts.

    Each time it is the most frequent pair of neighbours. Among equals it is the one whose left
    part has the smaller id, then whose right part has: bytes come before merged tokens, and older
    tokens before newer ones. No two merges make the same token.

    Args:
        texts: a text, or several; no pair crosses from one to the next.
        special_tokens: texts are cut there, and they teach nothing.

    Raises:
        ValueError: if there is no text, or a lone surrogate in it that stands for no byte, or if
            the special tokens are no list of texts.

    Reference:
        Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units",
        section 3.2, which has no rule for ties; over bytes, Radford et al. 2019, "Language Models
        are Unsupervised Multitask Learners", section 2.2.
        Hugging Face's ``tokenizers`` break ties as we do, with the bytes in another order.

    Example:
        >>> next(bpe_merges("low lower lowest"))
        Merge(left=b'l', right=b'o', count=3)
    """
    texts, cut = [texts] if isinstance(texts, str) else texts, special_pattern(special_tokens)
    parts = (part for text in texts for part in cut.split(text))
    counts = Counter(word for part in parts for word in pretoken_pattern().findall(part))
    if not counts:
        raise ValueError("the corpus must hold at least one character; got none")
    words = [list(word.encode(errors="surrogateescape")) for word in counts]
    times = list(counts.values())
    tokens = [bytes([b]) for b in range(256)]
    pairs: Counter[tuple[int, int]] = Counter()
    places: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for place, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += times[place]
            places[pair].add(place)
    heap = sorted((-count, pair) for pair, count in pairs.items())
    while heap:
        negative, pair = heappop(heap)
        if negative == 0 or pairs[pair] != -negative:
            continue  # out of date
        left, right = tokens[pair[0]], tokens[pair[1]]
        yield Merge(left, right, -negative)
        changed = set()
        for place in places.pop(pair):  # only the words that hold it are counted anew
            before, after = words[place], _replace(words[place], pair, len(tokens))
            for old in pairwise(before):
                pairs[old] -= times[place]
            for new in pairwise(after):
                pairs[new] += times[place]
                places[new].add(place)
            changed.update(pairwise(before), pairwise(after))
            words[place] = after
        tokens.append(left + right)
        for pair in changed:
            heappush(heap, (-pairs[pair], pair))


def train_bpe(
    texts: str | Iterable[str],
    *,
    n_merges: int | None = None,
    vocab_size: int | None = None,
    special_tokens: Sequence[str] = (),
) -> BPETokenizer:
    """Learn a tokenizer from text: the first merges of :func:`bpe_merges`.

    Args:
        texts: a text, or several; no token crosses from one to the next.
        n_merges: how many merges to learn; or
        vocab_size: how many tokens to have, bytes and special tokens included.
        special_tokens: names of tokens that get the last ids; the training text is cut there.

    Raises:
        ValueError: if not just one of n_merges and vocab_size is given, it is no integer or too
            small, or the corpus has fewer merges than asked for.

    Example:
        >>> tokenizer = train_bpe("low lower lowest", vocab_size=259)
        >>> tokenizer.encode("slow"), tokenizer.decode([115, 257])
        ([115, 257], 'slow')
    """
    least = BPETokenizer((), special_tokens).vocab_size  # bad names are refused here
    if (n_merges is None) == (vocab_size is None):
        raise ValueError(f"give n_merges or vocab_size; got {n_merges} and {vocab_size}")
    if n_merges is None:
        name = f"vocab_size, with 256 bytes and {least - 256} special tokens,"
        check_size(name, vocab_size, least=least)
        n_merges = vocab_size - least
    check_size("n_merges", n_merges, least=0)
    merges = list(islice(bpe_merges(texts, special_tokens=special_tokens), n_merges))
    if len(merges) < n_merges:
        raise ValueError(f"the corpus has {len(merges)} merges; {n_merges} were asked for")
    return BPETokenizer((merge[:2] for merge in merges), special_tokens)


def _replace(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Put a new token in the place of a pair, wherever it stands, from the left."""
    after: list[int] = []
    for token in word:
        if after and (after[-1], token) == pair:
            after[-1] = new
        else:
            after.append(token)
    return after
