"""The directives ``{axes}`` and ``{symbols}``: tables of what tfm_ref.notation defines."""

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from tfm_ref.notation import AXES, SYMBOLS
from tfm_ref.plots import Table


class Axes(SphinxDirective):
    """A table with one row per axis letter."""

    def table(self) -> Table:
        """Make the table."""
        rows = [(f"`{k}`", a.meaning, f"`{a.code}`", f"${a.symbol}$") for k, a in AXES.items()]
        return Table(["letter", "counts", "in code", "in formulas"], rows)

    def run(self) -> list[nodes.Node]:
        """Write the table in MyST."""
        lines = StringList(repr(self.table()).splitlines(), self.get_source_info()[0])
        parent = nodes.Element()
        self.state.nested_parse(lines, 0, parent)
        return parent.children


class Symbols(Axes):
    """A table with one row per symbol; its shape in the symbols of the axes."""

    def table(self) -> Table:
        """Make the table."""
        rows = []
        for tex, symbol in SYMBOLS.items():
            shape = r" \times ".join(AXES[letter].symbol for letter in symbol.axes.split())
            rows.append((f"${tex}$", symbol.name, f"${shape}$", symbol.meaning))
        return Table(["symbol", "name", "shape", "is"], rows)


def setup(app: Sphinx) -> None:
    """Register the directives."""
    app.add_directive("axes", Axes)
    app.add_directive("symbols", Symbols)
