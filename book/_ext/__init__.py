"""The book's own Sphinx extensions: one module, one purpose."""

import gc

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

MODULES = (
    "address",
    "assets",
    "claims",
    "commonly_said",
    "famous_bugs",
    "figures",
    "mathjax",
    "names",
    "notation",
    "signatures",
    "status",
)


def read_chapters_first(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Order the pages so that those of book/ can show what stands in the chapters."""
    docnames.sort(key=lambda docname: docname.startswith("book/"))


def setup(app: Sphinx) -> dict:
    """Load all modules."""
    gc.disable()  # nodes live to the end of a build: to look for garbage takes a third of its time
    for module in MODULES:
        app.setup_extension(f"{__name__}.{module}")
    app.connect("env-before-read-docs", read_chapters_first)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
