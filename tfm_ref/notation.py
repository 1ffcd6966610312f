"""The letters of the book: one source for annotations, einsums and the page "Notation"."""

from typing import NamedTuple


class Axis(NamedTuple):
    """One axis of a tensor: what it counts and how it is spelled in code and in formulas."""

    meaning: str
    code: str
    symbol: str


AXES = {
    "b": Axis("sequences in a batch", "batch", "b"),
    "h": Axis("attention heads", "n_heads", "h"),
    "n": Axis("positions that ask: queries, or tokens of x", "len_q", "n"),
    "m": Axis("positions that answer: keys and values", "len_k", "m"),
    "d": Axis("numbers that describe one token between layers", "d_model", r"d_\text{model}"),
    "k": Axis("numbers in one query or one key", "head_dim", "d_k"),
    "v": Axis("numbers in one value", "v_head_dim", "d_v"),
}
"""Letter of an axis, as it stands in annotations such as ``Float[Tensor, "b h n k"]``."""
