"""Keep what the last run of all tests has found, for the book's page on its own state.

python tools/status.py _build/tests.xml
"""

import json
import os
import platform
import sys
from collections import Counter
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "book/status"
SOURCES = {
    "the package": ["tfm_ref", "pyproject.toml"],
    "the notebooks": ["notebooks"],
    "the tests": ["tests"],
    "the other pages": ["book", "_config.yml", "_toc.yml"],
}
SUITES = {  # a test counts where its module's name begins first
    "conformance of all attention": "tests.conformance.",
    "parity with public models": "tests.parity.",
    "famous bugs": "tests.famous_bugs.",
    "guards of the notebooks": "tests.notebooks.",
    "site in a browser": "tests.site.",
    "the package, module by module": "tests.",
    "examples of its docstrings": "tfm_ref",
    "cells of the notebooks": "notebooks.",
}
KINDS = {".css", ".ipynb", ".md", ".py", ".svg", ".toml", ".txt", ".yml"}


def files(paths: list[str]) -> list[Path]:
    """List the files of one kind of source, in a fixed order."""
    found = [f for path in paths for f in (ROOT / path, *sorted((ROOT / path).rglob("*")))]
    shown = [f for f in found if not any(p.startswith(".") for p in f.relative_to(ROOT).parts)]
    return [f for f in shown if f.suffix in KINDS]


def digests() -> dict[str, str]:
    """Give a number for each kind of source that changes with it."""
    return {
        name: sha256(b"".join(file.read_bytes() for file in files(paths))).hexdigest()[:16]
        for name, paths in SOURCES.items()
    }


def suite_of(case: ElementTree.Element) -> str:
    """Say where a test counts."""
    name = case.get("classname") + "."
    return next(suite for suite, start in SUITES.items() if name.startswith(start))


def outcome_of(case: ElementTree.Element) -> str:
    """Say how a test went: the report names what did not pass."""
    kinds = {child.tag for child in case}
    return (
        "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
    )


def record_of(report: Path) -> dict[str, object]:
    """Sum up a report of pytest, and say what it was made with.

    Args:
        report: the file that ``pytest --junitxml`` has written.

    Returns:
        When, on what and how long the tests ran, how those of each suite went, the processor
        seconds of each notebook, and a number for each kind of source.

    Raises:
        ValueError: if a source is newer than the report, which is then of other sources.
    """
    newer = [
        file.relative_to(ROOT).as_posix()
        for paths in SOURCES.values()
        for file in files(paths)
        if file.stat().st_mtime > report.stat().st_mtime
    ]
    if newer:
        raise ValueError(f"changed since the tests ran: {', '.join(newer)}; run make test first")
    (run,) = ElementTree.parse(report).getroot()
    counts: dict[str, Counter] = {suite: Counter() for suite in SUITES}
    notebooks = {}
    for case in run.iter("testcase"):
        counts[suite_of(case)][outcome_of(case)] += 1
        for found in case.iterfind("properties/property[@name='processor seconds']"):
            notebooks[case.get("classname").split(".")[1]] = round(float(found.get("value")), 1)
    return {
        "date": run.get("timestamp")[:10],
        "minutes": round(float(run.get("time")) / 60, 1),
        "system": f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "transformers", "jupyter-book")},
        "suites": {suite: dict(sorted(count.items())) for suite, count in counts.items()},
        "notebooks": dict(sorted(notebooks.items())),
        "sources": digests(),
    }


def main() -> None:
    """Write the record of one version of Python and of PyTorch; an older one is replaced."""
    record = record_of(Path(sys.argv[1]))
    FOLDER.mkdir(exist_ok=True)
    python = ".".join(record["python"].split(".")[:2])
    path = FOLDER / f"python-{python}-torch-{record['torch'].split('+')[0]}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
