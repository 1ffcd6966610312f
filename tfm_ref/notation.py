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
    "g": Axis("heads of keys and values", "n_kv_heads", "g"),
    "r": Axis("query heads that share a key head", "n_heads // n_kv_heads", "h / g"),
    "n": Axis("positions that ask: queries, or tokens of x", "len_q", "n"),
    "m": Axis("positions that answer: keys and values", "len_k", "m"),
    "t": Axis("tokens so far: those that a cache holds, and the new ones", "cache.length + n", "t"),
    "d": Axis("numbers that describe one token between layers", "d_model", r"d_\text{model}"),
    "k": Axis("numbers in one query or one key", "head_dim", "d_k"),
    "v": Axis("numbers in one value", "v_head_dim", "d_v"),
    "l": Axis("numbers in one latent of keys and values", "kv_lora_rank", "d_c"),
    "f": Axis("numbers between the two layers of a feed-forward", "d_ff", r"d_\text{ff}"),
    "e": Axis("experts of a mixture", "n_experts", "E"),
    "c": Axis("experts that one token is sent to", "top_k", r"k_\text{top}"),
    "a": Axis("assignments of a token to an expert", "n * top_k", r"n k_\text{top}"),
    "w": Axis("tokens of the vocabulary", "vocab_size", r"\lvert \mathcal{V} \rvert"),
    "y": Axis("tokens that a model writes", "new_tokens", "y"),
    "s": Axis("texts that beam search keeps", "n_beams", "s"),
    "u": Axis("processes that share the work", "world_size", "u"),
    "p": Axis("pairs of numbers that turn together", "head_dim // 2", "d_k / 2"),
}
"""Letter of an axis, as it stands in annotations such as ``Float[Tensor, "b h n k"]``."""


class Symbol(NamedTuple):
    """One symbol of the formulas: its name, its axes for one sequence and one head, what it is."""

    name: str
    axes: str
    meaning: str


SYMBOLS = {
    "X": Symbol("tokens", "n d", "one row per token"),
    "W_Q": Symbol("projection to queries", "d k", "learned"),
    "W_K": Symbol("projection to keys", "d k", "learned"),
    "W_V": Symbol("projection to values", "d v", "learned"),
    "W_O": Symbol("projection of the output", "v d", "learned"),
    "Q": Symbol("queries", "n k", "$XW_Q$"),
    "K": Symbol("keys", "m k", "$XW_K$; in cross-attention, of another sequence"),
    "V": Symbol("values", "m v", "$XW_V$; of the same sequence as the keys"),
    "S": Symbol("scores", "n m", r"$QK^\top / \sqrt{d_k}$"),
    "A": Symbol("weights", "n m", r"$\operatorname{softmax}(S)$, row by row"),
    "O": Symbol("output of a head", "n v", "$AV$, one mixture of values per query"),
    "Y": Symbol("output of a layer", "n d", "$OW_O$, summed over the heads"),
}
"""Symbol of the formulas, as TeX."""
