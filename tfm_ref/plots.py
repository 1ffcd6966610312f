"""The house style, and the pictures and tables that more than one chapter draws."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, distinct for colour-blind readers."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""One marker per colour, so that curves stay apart in grey."""


def use_house_style() -> None:
    """Set matplotlib's defaults for the book. Call once, at the top of a chapter."""
    cycle = plt.cycler(color=COLORS) + plt.cycler(marker=MARKERS)
    plt.rcParams.update(
        {
            "axes.prop_cycle": cycle,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 11,
            "figure.constrained_layout.use": True,
            "figure.dpi": 130,
            "figure.figsize": (7, 3),
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "image.cmap": "Blues",
            "legend.frameon": False,
            "lines.markersize": 4,
        }
    )


def attention_map(
    weights: Float[Tensor, "n m"],
    queries: Sequence[str],
    keys: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Draw weights as a grid: a row is a query, a column a key, dark is 1, white is 0.

    Weights of 0.1 and more are written into their cells; a weight of exactly 0, as a mask
    leaves it, is a dot.

    Args:
        weights: attention weights of one head, each from 0 to 1.
        queries: label of each row.
        keys: label of each column; the queries' labels if not given.
        ax: where to draw; a new figure if not given.
        title: what the map shows.

    Returns:
        The axes that hold the map.

    Raises:
        ValueError: if the weights are not a matrix with one label per row and per column.
    """
    keys = queries if keys is None else keys
    if tuple(weights.shape) != (len(queries), len(keys)):
        raise ValueError(
            f"weights must have one row per query and one column per key, "
            f"({len(queries)}, {len(keys)}); got {tuple(weights.shape)}"
        )
    if ax is None:
        _, ax = plt.subplots(figsize=(0.45 * len(keys) + 1.5, 0.35 * len(queries) + 1.5))
    grid = weights.detach().float().cpu().numpy()
    ax.imshow(grid, vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(range(len(keys)), keys, rotation=45, ha="left", rotation_mode="anchor")
    ax.set_yticks(range(len(queries)), queries)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="key", ylabel="query", title=title)
    for i, j in np.argwhere(grid >= 0.1):
        color = "white" if grid[i, j] > 0.5 else "black"
        ax.text(j, i, f"{grid[i, j]:.1f}", ha="center", va="center", color=color, fontsize=8)
    for i, j in np.argwhere(grid == 0):
        ax.text(j, i, "·", ha="center", va="center", color="gray")
    return ax


@dataclass(frozen=True, repr=False)
class Table:
    """Show rows below a header: as a table in a notebook and in the book, else as its Markdown.

    Args:
        header: name of each column.
        rows: the rows, each with one entry per column.

    Raises:
        ValueError: if a row has not one entry per column.

    Example:
        >>> Table(["n", "n²"], [(2, 4), (3, 9)])
        | n | n² |
        |---|---|
        | 2 | 4 |
        | 3 | 9 |
    """

    header: Sequence[str]
    rows: Iterable[Sequence[Any]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", [tuple(row) for row in self.rows])
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"a row must have one entry per column ({len(self.header)}); got {row}"
                )

    def __repr__(self) -> str:
        lines = [self.header, *self.rows]
        lines = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
        return "\n".join([lines[0], "|" + "---|" * len(self.header), *lines[1:]])

    _repr_markdown_ = __repr__
