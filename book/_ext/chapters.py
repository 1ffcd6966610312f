"""What pages of book/ need to look into the chapters, which are read before them."""

from collections.abc import Iterator
from functools import cache

from docutils import nodes
from sphinx.environment import BuildEnvironment


def chapters(env: BuildEnvironment) -> Iterator[tuple[str, nodes.document]]:
    """Give the name and the content of each notebook, in the order of their numbers."""
    for name in sorted(name for name in env.found_docs if name.startswith("notebooks/")):
        yield name, doctree(env, name)


@cache
def doctree(env: BuildEnvironment, name: str) -> nodes.document:
    """Load a chapter once for all pages that look into it; what they show, they copy."""
    return env.get_doctree(name)


def section_of(node: nodes.Node) -> nodes.section:
    """Find the section that a node stands in."""
    while not isinstance(node, nodes.section):
        node = node.parent
    return node
