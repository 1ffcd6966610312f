"""Figures: ``{chapter-figure}`` shows a chapter's figure again; no image goes without alt text."""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from _ext.chapters import chapters, section_of

logger = logging.getLogger(__name__)


class ChapterFigure(SphinxDirective):
    """Show the figure of this name, with a link to the section that draws it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Copy the figure from the chapter that has it."""
        self.env.note_reread()
        for chapter, doctree in chapters(self.env):
            for figure in doctree.findall(nodes.figure):
                if self.arguments[0] in figure["names"]:
                    return [self.copy(figure, chapter)]
        raise self.error(f"no chapter has a figure named {self.arguments[0]}")

    def copy(self, figure: nodes.figure, chapter: str) -> nodes.figure:
        """Make the same figure for this page."""
        image = next(figure.findall(nodes.image))
        caption = next(figure.findall(nodes.caption)).children
        section = section_of(figure)
        address = self.env.app.builder.get_relative_uri(self.env.docname, chapter)
        title = section.next_node(nodes.title).astext()
        link = nodes.reference("", title, refuri=f"{address}#{section['ids'][0]}", internal=True)
        text = nodes.paragraph("", "", *(node.deepcopy() for node in caption))
        text += [nodes.Text(" From: "), link]
        image = nodes.image("", uri=image["original_uri"], alt=image["alt"])
        return nodes.figure("", image, nodes.legend("", text))  # a legend takes no number


def require_alt(app: Sphinx, doctree: nodes.document) -> None:
    """Warn, which fails the build, of an image that a blind reader would miss."""
    for image in doctree.findall(nodes.image):
        if not image.get("alt"):
            logger.warning("image without alt text", location=image)


def setup(app: Sphinx) -> None:
    """Register the directive and the check."""
    app.add_directive("chapter-figure", ChapterFigure)
    app.connect("doctree-read", require_alt)
