"""The directive ``{axes}``: the table of axis letters, from the source that the package uses."""

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from tfm_ref.notation import AXES


class Axes(SphinxDirective):
    """A table with one row per axis letter."""

    def run(self) -> list[nodes.Node]:
        """Write the table in MyST."""
        rows = ["| letter | counts | in code | in formulas |", "|---|---|---|---|"]
        rows += [f"| `{k}` | {a.meaning} | `{a.code}` | ${a.symbol}$ |" for k, a in AXES.items()]
        table = nodes.Element()
        self.state.nested_parse(StringList(rows, self.get_source_info()[0]), 0, table)
        return table.children


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("axes", Axes)
