"""Something to look at while a cell trains, which leaves nothing behind."""

import sys
import time
from collections.abc import Callable, Collection, Iterator

EVERY = 0.2  # seconds between two lines


def progress(items: Collection, label: str = "step") -> Iterator:
    """Pass the items on one by one, and say how many have passed to whoever is watching.

    In JupyterLab and Colab a line below the cell says it, in a terminal the last line; it is
    gone at the end, with all that the cell has printed before. Where nobody watches, such as in
    nbclient, nbval or a log, nothing is written: there a front end does not allow input.

    Args:
        items: what to go through, of known length.
        label: what one item is.

    Yields:
        The items.

    Example:
        >>> sum(progress(range(4)))
        6
    """
    show, last = _watcher(), -EVERY
    try:
        for i, item in enumerate(items):
            if show and time.monotonic() - last >= EVERY:
                show(f"{label} {i + 1} of {len(items)}")
                last = time.monotonic()
            yield item
    finally:
        if show:
            show("")


def _watcher() -> Callable[[str], None] | None:
    """Find what shows a line to someone who is watching; an empty line removes it."""
    if "IPython" in sys.modules:
        from IPython import get_ipython
        from IPython.display import clear_output

        def below_the_cell(line: str) -> None:
            clear_output(wait=bool(line))
            print(line, end="", flush=True)

        kernel = getattr(get_ipython(), "kernel", None)
        if kernel is not None:
            return below_the_cell if getattr(kernel, "_allow_stdin", False) else None
    if sys.stderr is not None and sys.stderr.isatty():
        return lambda line: print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
    return None
