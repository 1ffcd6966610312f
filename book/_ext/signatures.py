"""Long signatures stand on several lines; Sphinx makes these a list of definitions, undefined."""

import re

from sphinx.application import Sphinx

LINES = re.compile(r"<dl>\n((?:<dd>.*</dd>\n)+)</dl>")


def mend(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Turn the lists into plain lines, which screen readers read as one signature."""
    context["body"] = LINES.sub(
        lambda match: re.sub("<(/?)dd>", r"<\1div>", match[1]), context.get("body", "")
    )


def setup(app: Sphinx) -> None:
    """Mend each page before it is written."""
    app.connect("html-page-context", mend)
