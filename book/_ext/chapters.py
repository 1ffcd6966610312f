"""What pages of book/ need to look into the chapters, which are read before them."""

from collections.abc import Iterator

import yaml
from docutils import nodes
from sphinx.environment import BuildEnvironment


def chapters(env: BuildEnvironment) -> Iterator[tuple[str, nodes.document]]:
    """Give the name and the content of each notebook, in the order of _toc.yml."""
    toc = yaml.safe_load((env.srcdir / "_toc.yml").read_text())
    for part in toc["parts"]:
        for chapter in part["chapters"]:
            if chapter["file"].startswith("notebooks/"):
                yield chapter["file"], env.get_doctree(chapter["file"])


def section_of(node: nodes.Node) -> nodes.section:
    """Find the section that a node stands in."""
    while not isinstance(node, nodes.section):
        node = node.parent
    return node
