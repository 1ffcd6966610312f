"""The directive ``names``: all that ``tfm_ref`` exports, in the order of the page's modules."""

import re
from collections.abc import Iterator
from inspect import getdoc
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

import tfm_ref

MODULE = re.compile(r"automodule:: (\S+)")


class Names(SphinxDirective):
    """A list with one line per name, each linked to its place on the page."""

    def run(self) -> list[nodes.Node]:
        """Write the list in reStructuredText, as the docstrings are."""
        page = Path(self.env.doc2path(self.env.docname)).read_text("utf-8")
        lines = [line for module in MODULE.findall(page) for line in lines_of(module)]
        if len(lines) != len(tfm_ref.__all__):
            raise self.error(f"{len(tfm_ref.__all__)} names, {len(lines)} of them on this page")
        parent = nodes.Element()
        self.state.nested_parse(StringList(lines, "names"), 0, parent)
        return parent.children


def lines_of(module: str) -> Iterator[str]:
    """Say in a line what each exported name of a module is, in the order of its source."""
    analyzer = ModuleAnalyzer.for_module(module)
    analyzer.analyze()
    data = {
        name: "\n".join(lines) for (owner, name), lines in analyzer.attr_docs.items() if not owner
    }
    for name in sorted({*analyzer.tags, *data} & {*tfm_ref.__all__}, key=analyzer.tagorder.get):
        doc = data.get(name) or getdoc(getattr(tfm_ref, name))
        yield f"- :py:obj:`~{module}.{name}`: {doc.splitlines()[0]}"


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("names", Names)
