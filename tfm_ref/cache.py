"""What decoding remembers, so that each step computes only what is new."""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Integer
from torch import Tensor

from tfm_ref.validation import check_size


class KVCache:
    """Remember what one attention keeps of each token: its keys and values, or its latent.

    Room for all tokens is taken once, with the first of them; none is copied again.

    Args:
        max_len: number of tokens of each sequence for which there is room; as many as come first
            if not given.

    Raises:
        ValueError: if max_len is not an integer of at least 1.

    Example:
        >>> import torch
        >>> cache = KVCache(max_len=5)
        >>> _ = cache.append(torch.zeros(1, 2, 3, 8))
        >>> cache.append(torch.ones(1, 2, 1, 8))[0].shape, cache.length
        (torch.Size([1, 2, 4, 8]), 4)
    """

    def __init__(self, max_len: int | None = None) -> None:
        if max_len is not None:
            check_size("max_len", max_len)
        self.max_len, self.length = max_len, 0
        self._room: list[Tensor] = []

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Remember new tokens.

        Args:
            new: tensors (batch, ..., n, width), each with its own numbers of the n new tokens.

        Returns:
            The tensors of all tokens so far, the new ones last: views, not copies.

        Raises:
            ValueError: if there is no tensor or no room, if shapes or dtypes are not those of the
                first tokens, or if the tensors need gradients. Nothing is remembered then.
        """
        n = self._check(new)
        for room, t in zip(self._room, new, strict=True):
            room.narrow(-2, self.length, n).copy_(t)
        self.length += n
        return self.tensors

    def _check(self, new: tuple[Tensor, ...]) -> int:
        """Refuse what does not fit, take the room for the first, and count the new tokens."""
        if not new:
            raise ValueError("a cache remembers at least one tensor; got none")
        n, rooms = new[0].shape[-2], self._room
        max_len = self.max_len or (rooms[0].shape[-2] if rooms else n)
        if self.length + n > max_len:
            raise ValueError(f"the cache has room for {max_len} tokens; got {self.length} + {n}")
        if not rooms:
            slots = self._slots(max_len)
            rooms = [t.new_empty((*t.shape[:-2], slots, t.shape[-1])) for t in new]
        for room, t in zip(rooms, new, strict=True):
            expected = (*room.shape[:-2], n, room.shape[-1])
            if t.shape != expected or t.dtype != room.dtype:
                raise ValueError(
                    f"the cache holds {room.dtype} and expects shape {tuple(expected)}; "
                    f"got {t.dtype} of shape {tuple(t.shape)}"
                )
            if t.requires_grad:
                raise ValueError("a cache keeps no gradients: use it under torch.no_grad()")
        self._room = rooms
        return n

    def _slots(self, max_len: int) -> int:
        """Say for how many tokens memory is taken."""
        return max_len

    def columns(self, n: int, *, device: torch.device | None = None) -> None:
        """Say which tokens ``append`` of n new ones will give: all, and for that stands None."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Give the tensors of all tokens so far."""
        return tuple(room.narrow(-2, 0, min(self.length, room.shape[-2])) for room in self._room)

    @property
    def n_bytes(self) -> int:
        """Count the memory taken, in bytes."""
        return sum(room.numel() * room.element_size() for room in self._room)

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first ``length``.

        Raises:
            ValueError: if there are fewer.
        """
        self.check_truncate(length)
        self.length = length

    def check_truncate(self, length: int) -> None:
        """Refuse a length to which the cache cannot go back, and change nothing."""
        check_size("length", length, least=0, most=self.length)

    def reset(self) -> None:
        """Forget all tokens, and give their memory back: what comes next may have another batch."""
        self.truncate(0)
        self._room = []

    def reorder(self, indices: Integer[Tensor, " b"]) -> None:
        """Let row i become what row ``indices[i]`` was; there may be more rows or fewer."""
        self._room = [room[indices] for room in self._room]


class RollingCache(KVCache):
    """Remember what an attention with a window still needs: the last tokens, and maybe the first.

    A token takes the place of the one that it drives out of the window, so that memory is taken
    for ``n_first + window`` tokens, however many have passed. What is remembered after one new
    token is all in its sight. Of several at once each needs the window's mask, for the tokens
    that :meth:`columns` names.

    Args:
        window: number of tokens that the last token sees, itself among them.
        n_first: number of first tokens that stay for ever.
        max_len: number of tokens of each sequence that may pass; any, if not given.

    Raises:
        ValueError: if window or max_len is not an integer of at least 1, or n_first of at least 0.

    Reference:
        Jiang et al. 2023, "Mistral 7B", section 2, "Rolling Buffer Cache". Xiao et al. 2023,
        "Efficient Streaming Language Models with Attention Sinks", section 3.2, with 4 first
        tokens. They number positions by the place in the cache, so that none exceeds its size,
        and turn the keys anew at each step; here keys stay turned by their true positions, as in
        a model that has the same mask and no cache.

    Example:
        >>> import torch
        >>> cache = RollingCache(3, n_first=1)
        >>> for token in torch.arange(6.0).view(6, 1, 1, 1):
        ...     columns, seen = cache.columns(1), cache.append(token)[0]
        >>> seen.flatten(), columns, cache.columns(2)
        (tensor([0., 4., 5., 3.]), tensor([0, 4, 5, 3]), tensor([0, 4, 5, 6, 7]))
    """

    def __init__(self, window: int, *, n_first: int = 0, max_len: int | None = None) -> None:
        super().__init__(max_len)
        check_size("window", window)
        check_size("n_first", n_first, least=0)
        self.window, self.n_first = window, n_first
        self.max_len = math.inf if max_len is None else max_len
        self._lost = 0  # of the tokens before this one, only the first are left

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Remember new tokens; arguments and errors are those of :meth:`KVCache.append`.

        Returns:
            The tensors of the tokens that :meth:`columns` names: of all, while nothing has been
            forgotten; then a view for one new token, and a copy for several.
        """
        end = self.length + new[0].shape[-2]
        if end <= self.n_first + self.window:
            return super().append(*new)
        n, seen = self._check(new), ()
        if n == 1:
            place = self.n_first + (self.length - self.n_first) % self.window
            for room, t in zip(self._room, new, strict=True):
                room[..., place : place + 1, :] = t
        else:
            columns = self.columns(n, device=new[0].device)
            old, last = self._places(columns[:-n]), self._places(columns[-self.window :])
            pairs = zip(self._room, new, strict=True)
            seen = tuple(torch.cat([room[..., old, :], t], -2) for room, t in pairs)
            for room, t in zip(self._room, seen, strict=True):
                room[..., : self.n_first, :] = t[..., : self.n_first, :]
                room[..., last, :] = t[..., -self.window :, :]
        self.length, self._lost = end, max(self._lost, end - self.window)
        return seen or self.tensors

    def columns(
        self, n: int, *, device: torch.device | None = None
    ) -> Integer[Tensor, " m"] | None:
        """Number the tokens that ``append`` of n new ones will give, in its order.

        Args:
            n: number of new tokens.
            device: where to build the numbers.

        Returns:
            Their columns in the whole sequence, so that ``mask[..., columns]`` fits them; None
            means all, in order.
        """
        end, first = self.length + n, max(self.n_first, self.length - self.window + 1)
        if end <= self.n_first + self.window:
            return None
        columns = torch.arange(end, device=device)
        if n > 1:
            return torch.cat([columns[: self.n_first], columns[first:]])
        kept = torch.cat([columns[: self.n_first], columns[-self.window :]])
        return torch.empty_like(kept).index_copy(0, self._places(kept), kept)

    def _places(self, columns: Integer[Tensor, " m"]) -> Integer[Tensor, " m"]:
        """Say where the tokens of these columns lie."""
        rolled = self.n_first + (columns - self.n_first) % self.window
        return columns.where(columns < self.n_first, rolled)

    def _slots(self, max_len: float) -> int:
        return min(max_len, self.n_first + self.window)

    def check_truncate(self, length: int) -> None:
        """Refuse a length to which the cache cannot go back, and change nothing.

        Raises:
            ValueError: if there are fewer tokens, or if the next token would see some that are
                forgotten.
        """
        super().check_truncate(length)
        least = self._lost + self.window - 1
        if self.n_first < length < least and self.n_first < self._lost:
            raise ValueError(
                f"the cache has forgotten tokens {self.n_first} to {self._lost - 1}, and its "
                f"window is {self.window}: the length must be at most {self.n_first} or at least "
                f"{least}; got {length}"
            )

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first ``length``; raises as :meth:`check_truncate`."""
        super().truncate(length)
        self._lost = min(self._lost, length)


class StackCache:
    """Remember what every attention of a stack keeps of each token, and where the token stands.

    Args:
        layers: what the self-attention of each block remembers with.
        max_len: number of tokens of each sequence for which there is room.

    Raises:
        ValueError: if there is no layer, or max_len is not an integer of at least 1.

    Example:
        >>> import torch
        >>> from tfm_ref import DecoderLM, TransformerConfig
        >>> config = TransformerConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=16)
        >>> model, tokens = DecoderLM(config), torch.tensor([[3, 1, 4]])
        >>> cache = model.new_cache(max_len=3)
        >>> with torch.no_grad():
        ...     steps = [model(token, cache=cache) for token in tokens.split(1, dim=1)]
        ...     torch.allclose(torch.cat(steps, 1), model(tokens), atol=1e-6)
        True
    """

    def __init__(self, layers: Sequence[KVCache], max_len: int) -> None:
        check_size("n_layers", len(layers))
        self.positions = KVCache(max_len)
        self.layers = [(cache, KVCache()) for cache in layers]

    def __iter__(self) -> Iterator[KVCache]:
        """Go through all caches but those of contexts."""
        yield self.positions
        yield from (cache for cache, _ in self.layers)

    @property
    def length(self) -> int:
        """Count the tokens of each sequence that have passed through all blocks."""
        return self.layers[-1][0].length

    @property
    def n_bytes(self) -> int:
        """Count the memory that all attentions take, in bytes."""
        return sum(cache.n_bytes for caches in self.layers for cache in caches)

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first ``length``; a context for cross-attention stays.

        Raises:
            ValueError: if there are fewer, or if a layer with a window has forgotten some that
                the next token would see. Nothing is changed then.
        """
        for cache in self:
            cache.check_truncate(length)
        for cache in self:
            cache.truncate(length)

    def reset(self) -> None:
        """Forget all tokens, and the context for cross-attention."""
        for cache in (self.positions, *(cache for caches in self.layers for cache in caches)):
            cache.reset()

    def reorder(self, indices: Integer[Tensor, " b"]) -> None:
        """Let sequence i become what sequence ``indices[i]`` was, as beam search needs it.

        Args:
            indices: a row for each sequence from now on; there may be more or fewer than before.
        """
        for cache in (self.positions, *(cache for caches in self.layers for cache in caches)):
            cache.reorder(indices)
