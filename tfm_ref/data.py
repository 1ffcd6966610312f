"""What the chapters train on."""

from importlib.resources import files


def corpus() -> str:
    """Give tales, letters and explanations from a harbour town, in plain English.

    Returns:
        The text, 110 kB: a paragraph or a title per line, a blank line after each.

    Reference:
        Written for this book, and under the licence of the package.

    Example:
        >>> corpus()[:32]
        'The Harbour at Six in the Mornin'
    """
    return files("tfm_ref").joinpath("corpus.txt").read_text(encoding="utf-8")
