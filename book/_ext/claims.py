"""The directive ``{claims}``: all that the stored outputs of the chapters check or refute."""

from itertools import groupby

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from _ext.chapters import chapters, section_of

HOLDS, REFUTED = "✓ ", "✗ not so: "


class Claims(SphinxDirective):
    """A count, then one section per chapter, therein one per section that claims something."""

    def run(self) -> list[nodes.Node]:
        """Collect the claims of all chapters."""
        self.env.note_reread()
        self.counts = dict.fromkeys((HOLDS, REFUTED), 0)
        pages = [self.chapter(name, doctree) for name, doctree in chapters(self.env)]
        count = f"{self.counts[HOLDS]} claims hold. {self.counts[REFUTED]} common claims do not."
        return [nodes.paragraph(text=count, classes=["claims-count"]), *pages]

    def chapter(self, name: str, doctree: nodes.document) -> nodes.section:
        """List a chapter's claims under the headings they stand under."""
        page = section(name, next(doctree.findall(nodes.title)))
        outputs = (n for n in doctree.findall(nodes.literal_block) if "stream" in n["classes"])
        for source, blocks in groupby(outputs, section_of):
            lines = [line for block in blocks for line in block.astext().splitlines()]
            claims = [line for line in lines if line.startswith((HOLDS, REFUTED))]
            if claims:
                address = f"{self.env.app.builder.get_relative_uri(self.env.docname, name)}"
                address += f"#{source['ids'][0]}"
                part = section(f"{name}-{source['ids'][0]}", source.next_node(nodes.title))
                part += nodes.bullet_list("", *(self.claim(c, address) for c in claims))
                page += part
        return page

    def claim(self, line: str, address: str) -> nodes.list_item:
        """Link one claim to its section, and count it."""
        mark = next(mark for mark in self.counts if line.startswith(mark))
        self.counts[mark] += 1
        link = nodes.reference("", line, refuri=address, internal=True, support_smartquotes=False)
        return nodes.list_item("", nodes.paragraph("", "", link), classes=["claim"])


def section(name: str, title: nodes.title) -> nodes.section:
    """Open a section with a copy of a chapter's heading."""
    return nodes.section("", title.deepcopy(), ids=[nodes.make_id(name)])


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("claims", Claims)
