"""The directive ``{commonly-said}``: each statement, its verdict and the section that settles it.

The statements stand in ``commonly_said.yml`` beside the page. A row names its section and what it
finds there: a line that a ``cell`` prints, a ``source`` that is linked, or words of the ``text``.
The build fails where that is no longer so.
"""

from pathlib import Path

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from _ext.chapters import chapters
from _ext.claims import HOLDS, REFUTED

logger = logging.getLogger(__name__)

STRAIGHT = str.maketrans("‘’“”", "''\"\"")
VERDICTS = {
    "holds": "Holds",
    "depends": "Depends",
    "wrong": "Not so",
    "unknown": "Cannot be checked",
}


class CommonlySaid(SphinxDirective):
    """A count, then one list per chapter."""

    def run(self) -> list[nodes.Node]:
        """Settle each row in its chapter."""
        self.env.note_reread()
        path = Path(self.get_source_info()[0]).with_name("commonly_said.yml")
        self.env.note_dependency(path)
        table = yaml.safe_load(path.read_text("utf-8"))
        pages = {Path(name).name: (name, doctree) for name, doctree in chapters(self.env)}
        verdicts = [row["verdict"] for rows in table.values() for row in rows.values()]
        counts = (f"{words}: {verdicts.count(name)}." for name, words in VERDICTS.items())
        parts = [nodes.paragraph(text=" ".join(counts))]
        for chapter, rows in table.items():
            name, doctree = pages.get(chapter, (chapter, nodes.document("", "")))
            sections = {i: each for each in doctree.findall(nodes.section) for i in each["ids"]}
            items = [self.item(row_id, row, name, sections) for row_id, row in rows.items()]
            title = next(doctree.findall(nodes.title), nodes.title(text=chapter)).deepcopy()
            parts.append(nodes.section("", title, nodes.bullet_list("", *items), ids=[chapter]))
        return parts

    def item(
        self, row_id: str, row: dict, name: str, sections: dict[str, nodes.section]
    ) -> nodes.list_item:
        """Write what is said, the verdict, and a link to where it is settled."""
        place = f"{name}#{row['section']}"
        shown = []
        if row["section"] not in sections:
            logger.warning("%s: there is no section %s", row_id, place)
        elif not (shown := settled_by(row, sections[row["section"]])):
            logger.warning("%s: %s does not show %s", row_id, place, row)
        address = f"{self.env.app.builder.get_relative_uri(self.env.docname, name)}"
        link = nodes.reference("", "", *shown, refuri=f"{address}#{row['section']}", internal=True)
        said, messages = self.parse_inline(row["said"])
        verdict = nodes.strong("", f"{VERDICTS[row['verdict']]}.")
        text = nodes.paragraph("", "", *said, nodes.Text(" "), verdict, nodes.Text(" "), link)
        return nodes.list_item("", text, *messages, ids=[row_id.lower()], classes=["said"])


def settled_by(row: dict, section: nodes.section) -> list[nodes.Node]:
    """Give what a reader finds in the section: a printed claim, or else its heading."""
    heading = [node.deepcopy() for node in section.next_node(nodes.title).children]
    if "cell" in row:
        outputs = (n for n in section.findall(nodes.literal_block) if "stream" in n["classes"])
        lines = {line for output in outputs for line in output.astext().splitlines()}
        claims = {HOLDS + row["cell"], REFUTED + row["cell"]}
        return [nodes.Text(claim.replace(REFUTED, "✗ ")) for claim in claims & lines]
    if "source" in row:
        links = {link.get("refuri") for link in section.findall(nodes.reference)}
        return heading if row["source"] in links else []
    words = " ".join(section.astext().translate(STRAIGHT).split())
    return heading if row["text"] in words else []


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("commonly-said", CommonlySaid)
