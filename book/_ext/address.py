"""Pages name the repository as ``{{ repository }}``; its address stands in _config.yml."""

from sphinx.application import Sphinx


def insert(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the address in place of its name, in code blocks too."""
    source[0] = source[0].replace(
        "{{ repository }}", app.config.html_theme_options["repository_url"]
    )


def setup(app: Sphinx) -> None:
    """Register the substitution."""
    app.connect("source-read", insert)
