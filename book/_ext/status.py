"""The directive ``{status}``: the recorded runs of the tests, and of the GPU's measurements."""

import json
import sys
from collections.abc import Iterator, Mapping
from inspect import getdoc
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from _ext.chapters import chapters
from tfm_ref.benchmarks import BENCHMARKS
from tfm_ref.plots import Table
from tfm_ref.records import load_record

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from status import FOLDER, SUITES, digests

MEASURED = {name: getdoc(benchmark.run) for name, benchmark in BENCHMARKS.items()} | {
    "multi30k": "Train the base model of 2017 on Multi30k, and translate with it."
}


class Status(SphinxDirective):
    """Tables of the runs, of the notebooks and of the GPU's records."""

    def run(self) -> list[nodes.Node]:
        """Write the tables in MyST."""
        self.env.note_reread()
        runs = [json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.json"))]
        titles = {
            Path(name).name: next(doctree.findall(nodes.title)).astext()
            for name, doctree in chapters(self.env)
        }
        text = "\n\n".join([*tests(runs), *notebooks(runs, titles), *gpu()])
        parent = nodes.Element()
        self.state.nested_parse(
            StringList(text.splitlines(), "status"), 0, parent, match_titles=True
        )
        return parent.children


def name_of(run: Mapping) -> str:
    """Name a run in the head of a table."""
    return f"Python {run['python']}, PyTorch {run['torch']}"


def tests(runs: list[Mapping]) -> Iterator[str]:
    """Say where the tests ran and how they went."""
    yield "## Tests"
    if not runs:
        yield "No run has been recorded: `make test`, then `make status`."
        return
    facts = {
        "date": lambda run: run["date"],
        "on": lambda run: run["system"],
        "minutes": lambda run: run["minutes"],
        "numpy": lambda run: run["numpy"],
        "transformers": lambda run: run["transformers"],
        "jupyter-book": lambda run: run["jupyter-book"],
        "changed since then": lambda run: ", ".join(changed(run)) or "nothing",
    }
    rows = [(fact, *map(read, runs)) for fact, read in facts.items()]
    rows += [(suite, *(went(run["suites"][suite]) for run in runs)) for suite in SUITES]
    yield repr(Table(["what", *map(name_of, runs)], rows))


def changed(run: Mapping) -> Iterator[str]:
    """Name the sources that are no longer what was tested."""
    now = digests()
    return (name for name, digest in run["sources"].items() if digest != now[name])


def went(counts: Mapping[str, int]) -> str:
    """Say how the tests of a suite went."""
    return ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items()) or "not run"


def notebooks(runs: list[Mapping], titles: Mapping[str, str]) -> Iterator[str]:
    """Say how long each notebook takes."""
    yield "## Notebooks"
    yield "Seconds of one processor core that each notebook takes, from its first cell to its last."
    rows = [
        (
            f"[{title}](../notebooks/{name}.ipynb)",
            *(run["notebooks"].get(name, "not run") for run in runs),
        )
        for name, title in titles.items()
    ]
    rows.append(("all", *(round(sum(run["notebooks"].values()), 1) for run in runs)))
    yield repr(Table(["chapter", *map(name_of, runs)], rows))


def gpu() -> Iterator[str]:
    """Say what has been measured on a GPU."""
    yield "## Measured on a GPU"
    rows = []
    for name, what in MEASURED.items():
        record = load_record(name) or {"where": {"device": "not yet recorded", "date": ""}}
        where, state = record["where"], {True: "this", False: "older", None: ""}
        code = state[record.get("is_current")]
        rows.append((what.splitlines()[0], where["device"], where["date"][:10], code))
    yield repr(Table(["what", "device", "date", "code"], rows))


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("status", Status)
