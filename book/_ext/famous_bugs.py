"""The directive ``{famous-bugs}``: what tests/famous_bugs catches, with the code as it stands."""

import sys
from collections.abc import Iterator
from inspect import getdoc, getsource
from pathlib import Path
from textwrap import dedent

import torch
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from _ext.chapters import chapters

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from famous_bugs.bug import PARTS, Bug, bugs_of

HEADS = {"wrong": "Wrong:", "right": "Right:", "ours": "In `tfm_ref`:", "test": "The test:"}


class FamousBugs(SphinxDirective):
    """One section per part of the book, therein one per bug."""

    def run(self) -> list[nodes.Node]:
        """Write all bugs, and measure what each does."""
        self.env.note_reread()
        self.titles = {
            f"{Path(name).name}#{section['ids'][0]}": ", ".join(
                part.next_node(nodes.title).astext() for part in (doctree, section)
            )
            for name, doctree in chapters(self.env)
            for section in doctree.findall(nodes.section)
        }
        return [self.part(part) for part in PARTS]

    def part(self, part: str) -> nodes.section:
        """Write the bugs of one part of the book."""
        bugs = map(self.bug, bugs_of(part))
        return nodes.section("", nodes.title(text=part.capitalize()), *bugs, ids=[part])

    def bug(self, bug: type[Bug]) -> nodes.section:
        """Write one bug: its story, where it is told, and its members in their order."""
        if bug.chapter and bug.chapter not in self.titles:
            raise self.error(f"{bug.__name__}: no section {bug.chapter}")
        title, _, story = getdoc(bug).partition("\n\n")
        section = nodes.section("", nodes.title(text=title), ids=[nodes.make_id(bug.__name__)])
        text = "\n\n".join([story, " ".join(self.references(bug)), *members(bug)])
        lines = StringList(text.splitlines(), f"{bug.__module__}.{bug.__name__}")
        self.state.nested_parse(lines, 0, section)
        return section

    def references(self, bug: type[Bug]) -> Iterator[str]:
        """Name the section of the book that tells it, and where it was seen."""
        if bug.chapter:
            page, _, anchor = bug.chapter.partition("#")
            yield f"More in [{self.titles[bug.chapter]}](../notebooks/{page}.ipynb#{anchor})."
        if bug.seen:
            address = "https://github.com/{}/issues/{}"
            threads = (f"[{seen}]({address.format(*seen.split('#'))})" for seen in bug.seen)
            yield f"Seen in {', '.join(threads)}."


def members(bug: type[Bug]) -> Iterator[str]:
    """Show the code of a bug, and measure it."""
    for name, member in vars(bug).items():
        if name == "measure":
            wrong, right = (measured(bug, code) for code in (bug.wrong, bug.right))
            yield f"{getdoc(member)}: **{wrong}** if wrong, **{right}** if right."
        elif callable(member):
            yield HEADS.get(name, "")
            yield f"```python\n{dedent(getsource(member))}```"


def measured(bug: type, code: object) -> str:
    """Take the number of a bug from the same random numbers as the tests do."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return f"{float(bug.measure(code)):.3g}"


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("famous-bugs", FamousBugs)
