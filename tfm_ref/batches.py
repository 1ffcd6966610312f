"""Batches: pairs of sequences, padded to one length, with as little padding as can be."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tfm_ref.losses import IGNORE
from tfm_ref.masks import padding_mask
from tfm_ref.validation import check_size


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Hold some pairs of sequences, padded on the right, as an encoder-decoder learns from them.

    Args:
        source: numbers of the tokens to read.
        source_mask: True = a token, False = padding.
        target_in: what the decoder is given: bos, then the target.
        target_out: what it is to say: the target, then eos; at padding
            :data:`~tfm_ref.losses.IGNORE`.

    Example:
        >>> batch = Batch.of([([5, 6, 7], [8]), ([5], [8, 9])], pad=0, bos=1, eos=2)
        >>> batch.source
        tensor([[5, 6, 7],
                [5, 0, 0]])
        >>> batch.target_in
        tensor([[1, 8, 0],
                [1, 8, 9]])
        >>> batch.target_out
        tensor([[   8,    2, -100],
                [   8,    9,    2]])
    """

    source: Int[Tensor, "b m"]
    source_mask: Bool[Tensor, "b 1 1 m"]
    target_in: Int[Tensor, "b n"]
    target_out: Int[Tensor, "b n"]

    @classmethod
    def of(
        cls,
        pairs: Iterable[tuple[Sequence[int], Sequence[int]]],
        *,
        pad: int,
        bos: int,
        eos: int,
    ) -> "Batch":
        """Pad pairs of source and target, which have no bos and no pad yet.

        Args:
            pairs: numbers of the tokens of source and target. An eos after the source, where it
                is wanted, is one of them.
            pad: number of the token that pads.
            bos: number of the token before every target.
            eos: number of the token after every target.

        Raises:
            ValueError: if there are no pairs.
        """
        pairs = list(pairs)
        check_size("the number of pairs", len(pairs))
        sources, targets = zip(*pairs, strict=True)

        def padded(rows: Iterable[Sequence[int]], value: int) -> Tensor:
            rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
            return pad_sequence(rows, True, value)

        source = padded(sources, pad)
        return cls(
            source=source,
            source_mask=padding_mask(torch.tensor([*map(len, sources)]), source.shape[1]),
            target_in=padded([[bos, *t] for t in targets], pad),
            target_out=padded([[*t, eos] for t in targets], IGNORE),
        )

    def __len__(self) -> int:
        """Count the pairs."""
        return len(self.source)

    def __getitem__(self, rows: slice) -> "Batch":
        """Take some of the pairs."""
        return self._each(lambda t: t[rows])

    def to(self, device: torch.device | str) -> "Batch":
        """Copy all to a device."""
        return self._each(lambda t: t.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(**{field.name: change(getattr(self, field.name)) for field in fields(self)})

    @property
    def n_tokens(self) -> int:
        """Count the targets, eos among them and padding not."""
        return int((self.target_out != IGNORE).sum())


def padding_share(batches: Iterable) -> float:
    """Say which share of the positions, of source and target, holds padding.

    Args:
        batches: each a :class:`Batch`.

    Example:
        >>> padding_share([Batch.of([([5, 6, 7], [8]), ([5], [8, 9])], pad=0, bos=1, eos=2)])
        0.25
    """
    real = positions = 0
    for batch in batches:
        real += int(batch.source_mask.sum()) + batch.n_tokens
        positions += batch.source.numel() + batch.target_out.numel()
    return 1 - real / positions


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatches:
    """Deal pairs of sequences into batches of like length, with no more than so many tokens.

    Each epoch shuffles all pairs, sorts them by length within chunks, cuts the row into batches
    and shuffles these. What an epoch gives follows from its number and the seed alone.

    Args:
        pairs: numbers of the tokens of source and target, as :meth:`Batch.of` takes them.
        max_tokens: bound of the padded size of a batch: its number of pairs times the longest
            source or target, eos included, whichever is longer.
        pad: number of the token that pads.
        bos: number of the token before every target.
        eos: number of the token after every target.
        seed: seed of the order.
        chunk: number of pairs that are sorted together; 1 sorts nothing.

    Raises:
        ValueError: if max_tokens or chunk is not an integer of at least 1, there are no pairs, a
            source is empty, or a pair alone is longer than max_tokens.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 5.1: pairs "batched together by
        approximate sequence length", about 25000 tokens of each language.

    Example:
        >>> pairs = [([5] * n, [6] * n) for n in (3, 1, 3, 1)]
        >>> batches = TokenBatches(pairs=pairs, max_tokens=8, pad=0, bos=1, eos=2)
        >>> sorted(tuple(batch.target_out.shape) for batch in batches(0))
        [(2, 2), (2, 4)]
    """

    pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    max_tokens: int
    pad: int
    bos: int
    eos: int
    seed: int = 0
    chunk: int = 4096

    def __post_init__(self) -> None:
        check_size("max_tokens", self.max_tokens)
        check_size("chunk", self.chunk)
        check_size("the number of pairs", len(self.pairs))
        for i, (source, _) in enumerate(self.pairs):
            if not len(source):
                raise ValueError(f"a source must have at least one token; got none in pair {i}")
            if self._length(i) > self.max_tokens:
                raise ValueError(
                    f"a pair must be no longer than max_tokens ({self.max_tokens}); "
                    f"got {self._length(i)} in pair {i}"
                )

    def _length(self, i: int) -> int:
        """Measure what a pair needs: its source, or its target with one token more."""
        source, target = self.pairs[i]
        return max(len(source), len(target) + 1)

    def rows(self, epoch: int) -> list[list[int]]:
        """Give the numbers of the pairs in each batch of an epoch."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.pairs)).tolist()
        chunks = (order[i : i + self.chunk] for i in range(0, len(order), self.chunk))
        batches, longest = [[]], 0
        for i in (i for chunk in chunks for i in sorted(chunk, key=self._length)):
            longest = max(longest, self._length(i))
            if (len(batches[-1]) + 1) * longest > self.max_tokens:
                batches.append([])
                longest = self._length(i)
            batches[-1].append(i)
        return [batches[i] for i in random.permutation(len(batches))]

    def __call__(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, counted from 0."""
        for rows in self.rows(epoch):
            pairs = [self.pairs[i] for i in rows]
            yield Batch.of(pairs, pad=self.pad, bos=self.bos, eos=self.eos)
