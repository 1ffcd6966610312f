"""Build each notebook from its text, and prove without running anything that the two agree.

notebooks/NN.md is edited and reviewed; notebooks/NN.ipynb is built from it, with outputs.

    python tools/notebooks.py build [--all]     run what has changed (or all) and store the outputs
    python tools/notebooks.py check             list what is stale, un-run or unchecked
"""

import argparse
import ast
import builtins
import hashlib
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
}
SECTIONS_WITHOUT_CODE = {"Summary"}
LARGEST = 600_000  # bytes
CALLS = {"check", "refute", "attempt"}
MACHINE_SPECIFIC = re.compile(r"/(home|root|tmp|usr|Users|content)/|[A-Z]:\\|\b0x[0-9a-f]{6,}")
SKIPPED = re.compile(r"nbval|raises-exception|skip-execution", re.IGNORECASE)


def read_text(path: Path) -> NotebookNode:
    """Turn a text into a notebook without outputs; cell ids follow from the sources."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    text = path.read_text("utf-8").replace("{{ repository }}", config["repository"]["url"])
    notebook = jupytext.reads(text, fmt="md:myst")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen = set()
    for cell in notebook.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()
        cell.id = next(digest[i : i + 8] for i in range(56) if digest[i : i + 8] not in seen)
        seen.add(cell.id)
    return notebook


def strip(notebook: NotebookNode) -> NotebookNode:
    """Return a copy without outputs and execution counts."""
    notebook = nbformat.from_dict(notebook)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    return notebook


def is_stale(path: Path) -> bool:
    """Say whether the notebook is missing or was built from another text."""
    built = path.with_suffix(".ipynb")
    return not built.exists() or strip(nbformat.read(built, 4)) != strip(read_text(path))


def build(path: Path) -> None:
    """Run a text from top to bottom in a fresh kernel and store the notebook with its outputs."""
    os.environ["OMP_NUM_THREADS"] = "1"
    notebook = read_text(path)
    with tqdm(total=len(notebook.cells), desc=path.stem, unit="cell") as bar:
        NotebookClient(
            notebook,
            timeout=600,
            resources={"metadata": {"path": path.parent}},
            record_timing=False,
            coalesce_streams=True,
            on_cell_complete=lambda cell, cell_index: bar.update(cell_index + 1 - bar.n),
        ).execute()
    notebook.metadata = nbformat.from_dict(METADATA)  # the kernel adds its Python version
    nbformat.write(notebook, path.with_suffix(".ipynb"))


def problems(path: Path) -> list[str]:
    """List what is wrong with a text and its notebook, as far as can be told without running."""
    built = path.with_suffix(".ipynb")
    if is_stale(path):
        return ["the text has changed since the notebook was built: run `make notebooks`"]
    notebook = nbformat.read(built, 4)
    found = []
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        found.append(f"cells were not run once each from top to bottom: {counts}")
    if not any(cell.outputs for cell in code_cells(notebook)):
        found.append("all outputs were stripped")
    if built.stat().st_size > LARGEST:
        found.append(f"{built.stat().st_size:,} bytes; at most {LARGEST:,} are allowed")
    for section, cells in sections(notebook).items():
        calls = [call for cell in cells for call in claims(cell)]
        if not calls and section not in SECTIONS_WITHOUT_CODE:
            found.append(f'section "{section}" checks nothing')
    marks = "".join(o.get("text", "")[:1] for c in code_cells(notebook) for o in c.outputs)
    marks = re.sub("[^☐☑]", "", marks)
    if marks != "☐☑" * (len(marks) // 2):
        found.append(f"each exercise must fail before its solution and pass after it: {marks}")
    for cell in code_cells(notebook):
        found += [f"cell {cell.execution_count}: {p}" for p in cell_problems(cell)]
    return found


def cell_problems(cell: NotebookNode) -> list[str]:
    """List what is wrong with one code cell."""
    found = []
    for name, evidence in claims(cell):
        if not depends_on_a_name(evidence):
            found.append(f"the evidence of {name} is a literal: {ast.unparse(evidence)}")
    if SKIPPED.search(cell.source + str(cell.metadata.get("tags", ""))):
        found.append("it asks not to be compared")
    for output in cell.outputs:
        text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
        if output.get("name") == "stderr" or output.output_type == "error":
            found.append(f"it stores {output.get('name', 'an error')}")
        if match := MACHINE_SPECIFIC.search(text):
            found.append(f"its output speaks of one machine: {match.group()!r}")
    if any("image/png" in output.get("data", {}) for output in cell.outputs):
        myst = cell.metadata.get("mystnb", {})
        missing = {"caption", "name"} - myst.get("figure", {}).keys()
        missing |= {"alt"} - myst.get("image", {}).keys()
        if missing:
            found.append(f"its figure lacks {', '.join(sorted(missing))}")
    return found


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the cells that run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def sections(notebook: NotebookNode) -> dict[str, list[NotebookNode]]:
    """Group the code cells by the heading of second level that they stand below."""
    found, current = {}, []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            current.append(cell)
        for title in re.findall(r"^## (.+)$", cell.source, re.M) * (cell.cell_type == "markdown"):
            current = found.setdefault(title, [])
    return found


def claims(cell: NotebookNode) -> list[tuple[str, ast.expr]]:
    """Find the calls of check, refute and attempt with the evidence that each is given."""
    tree = ast.parse(TransformerManager().transform_cell(cell.source))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    return [
        (call.func.id, call.args[-1])
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id in CALLS
    ]


def depends_on_a_name(evidence: ast.expr) -> bool:
    """Say whether an expression uses anything but literals and Python's own functions."""
    names = {node.id for node in ast.walk(evidence) if isinstance(node, ast.Name)}
    return bool(names - set(dir(builtins)))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["build", "check"])
    parser.add_argument("--all", action="store_true", help="build unchanged notebooks too")
    parser.add_argument("--folder", type=Path, default=ROOT / "notebooks")
    arguments = parser.parse_args()
    texts = sorted(arguments.folder.glob("*.md"))
    if arguments.command == "build":
        for path in texts:
            if arguments.all or is_stale(path):
                build(path)
    found = [f"{path.name}: {p}" for path in texts for p in problems(path)]
    found += [
        f"{built.name}: it has no text"
        for built in arguments.folder.glob("*.ipynb")
        if not built.with_suffix(".md").exists()
    ]
    print("\n".join(found) or f"{len(texts)} notebooks agree with their texts")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
