"""Tables of names: how a family's files name and hold the tensors of a model.

A table has one line for each tensor: our module, theirs, and in brackets the form in which theirs
holds ours; a name of theirs that ends in .weight or .bias, or is one of experts, is a tensor's, as
is ours beside it. ``*`` is the number of a layer, ``#`` that of an expert; ``+`` joins our modules
that one tensor of theirs holds; ``|`` is another spelling, read and never written. What stands in
two lines is stored twice, and must agree.
"""

import re
from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tfm_ref.config import TransformerConfig


class Form(NamedTuple):
    """Take a tensor of theirs apart, and put it together again.

    Args:
        split: from their tensor, our shapes and our config to our tensors.
        merge: from our tensors and our config to theirs.
    """

    split: Callable[[Tensor, list[torch.Size], TransformerConfig], list[Tensor]]
    merge: Callable[[list[Tensor], TransformerConfig], Tensor]


def _turned(t: Tensor) -> Tensor:
    """Swap the axes of a matrix, of each matrix in a stack, and leave a vector as it is."""
    return t.mT if t.ndim > 1 else t


def _split_groups(t: Tensor, shapes: list[torch.Size], config: TransformerConfig) -> list[Tensor]:
    """Take apart rows of the query heads of a group, their key head, and their value head."""
    g = config.n_kv_heads or config.n_heads
    r = config.n_heads // g
    return [part.flatten(0, 2) for part in t.unflatten(0, (g, r + 2, -1)).split([r, 1, 1], 1)]


def _merge_groups(ts: list[Tensor], config: TransformerConfig) -> Tensor:
    g = config.n_kv_heads or config.n_heads
    heads = config.n_heads // g, 1, 1
    grouped = [t.unflatten(0, (g, s, -1)) for t, s in zip(ts, heads, strict=True)]
    return torch.cat(grouped, 1).flatten(0, 2)


FORMS = {
    "": Form(lambda t, shapes, c: [t], lambda ts, c: ts[0]),
    "turned": Form(lambda t, shapes, c: [_turned(t)], lambda ts, c: _turned(ts[0])),
    "rows": Form(
        lambda t, shapes, c: list(t.split([shape[0] for shape in shapes])),
        lambda ts, c: torch.cat(ts),
    ),
    "columns": Form(
        lambda t, shapes, c: list(_turned(t).split([shape[0] for shape in shapes])),
        lambda ts, c: _turned(torch.cat(ts)),
    ),
    "groups": Form(_split_groups, _merge_groups),
    "row": Form(lambda t, shapes, c: [t[0]], lambda ts, c: ts[0][None]),
    "gain - 1": Form(lambda t, shapes, c: [t + 1], lambda ts, c: ts[0] - 1),
    "turned halves": Form(
        lambda t, shapes, c: list(t.mT.chunk(2, 1)), lambda ts, c: torch.cat(ts, 1).mT
    ),
    "halves": Form(lambda t, shapes, c: list(t.chunk(2, 1)), lambda ts, c: torch.cat(ts, 1)),
    "woven": Form(
        lambda t, shapes, c: [
            t[..., i::2] if len(shapes[0]) == 2 else t[..., i::2].mT for i in (0, 1)
        ],
        lambda ts, c: torch.stack([t if t.ndim == 2 else t.mT for t in ts], -1).flatten(-2),
    ),
}
"""How a tensor of theirs holds ours, by name.

turned: a matrix that multiplies from the right; rows, columns: several beside one another;
groups: by group of query heads that share a key head; row: with one more axis; gain - 1: a gain
that is stored less 1; halves: of all experts, gate and up; turned halves: the same, each matrix
turned; woven: the same, number by number.
"""


class Line(NamedTuple):
    """One line of a table of names, for one layer and one kind of parameter."""

    ours: list[str]
    theirs: str
    form: Form
    written: bool


def read_names(table: str, ours: Container[str], config: TransformerConfig) -> Iterator[Line]:
    """Read a table, with the layers and parameters that a model has.

    Args:
        table: the table of names.
        ours: the names of the model's tensors.
        config: the model's choices.
    """
    n_layers = max(config.n_layers, config.n_encoder_layers)
    for line in filter(None, table.splitlines()):
        other, modules, theirs, form = re.fullmatch(
            r"(\| )?(\S+) +(\S+) *(?:\[(.*)\])?", line
        ).groups()
        head, dot, joined = modules.rpartition(".")
        in_full = theirs.endswith((".weight", ".bias")) or ".experts." in theirs
        for layer in range(n_layers if "*" in modules else 1):
            for kind in ("",) if in_full else ("", ".weight", ".bias"):
                names = [
                    f"{head}{dot}{name}{kind}".replace("*", str(layer))
                    for name in joined.split("+")
                ]
                if all(name in ours for name in names):
                    name = f"{theirs}{kind}".replace("*", str(layer))
                    yield Line(names, name, FORMS[form or ""], written=other is None)
