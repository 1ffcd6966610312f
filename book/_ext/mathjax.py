"""Formulas are set by a MathJax that the book carries, taken from sphinx-mathjax-offline."""

import json
from importlib.metadata import files
from shutil import copytree

from sphinx.application import Sphinx

SCRIPT = "mathjax/mathjax.js"
# What sets TeX as HTML, with MathML for screen readers; without the menu, a third of the weight.
PARTS = (
    "startup",
    "core",
    "input/tex",
    "output/chtml",
    "output/chtml/fonts/tex.js",
    "a11y/assistive-mml",
)
ON_DEMAND = ("output/chtml/fonts/woff-v2", "input/tex/extensions")


def copy(app: Sphinx, error: Exception | None) -> None:
    """Join the parts into one script, and copy what it loads on demand."""
    if error or app.builder.format != "html":
        return
    (start,) = (f for f in files("sphinx-mathjax-offline") if f.name == "startup.js")
    source, target = start.locate().parent, app.outdir / "_static/mathjax"
    for folder in ON_DEMAND:
        copytree(source / folder, target / folder, dirs_exist_ok=True)
    parts = [(source / part).with_suffix(".js").read_text("utf-8") for part in PARTS]
    parts.append(f"MathJax.loader.preLoad(...{json.dumps(['loader', *PARTS])});")
    (app.outdir / "_static" / SCRIPT).write_text("\n;".join(parts), "utf-8")


def setup(app: Sphinx) -> None:
    """Point Sphinx to the copy."""
    app.config.mathjax_path = SCRIPT
    app.connect("build-finished", copy)
