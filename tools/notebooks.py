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
MARKS = "✓✗☐☑"  # what these calls print, each at the head of a line
SHOWN = {"text/plain", "text/markdown", "image/png"}  # what is compared
MACHINE_SPECIFIC = re.compile(
    r"/(home|root|tmp|usr|Users|content)/|[A-Z]:\\|\b0x[0-9a-f]{6,}|\+cpu\b|\+cu\d|\bcuda:\d"
)
SKIPPED = re.compile(r"nbval|pytest_validate|raises-exception|skip-execution", re.IGNORECASE)


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
    cells = code_cells(notebook)
    found = []
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(counts) + 1)):
        found.append(f"cells were not run once each from top to bottom: {counts}")
    if not any(cell.outputs for cell in cells):
        found.append("all outputs were stripped")
    if built.stat().st_size > LARGEST:
        found.append(f"{built.stat().st_size:,} bytes; at most {LARGEST:,} are allowed")
    for section, members in sections(notebook).items():
        if section not in SECTIONS_WITHOUT_CODE and not any(map(claims, members)):
            found.append(f'section "{section}" checks nothing')
    titles = re.findall(r"^## (.+)$", prose(notebook), re.M)
    if not titles or len(titles) > len(set(titles)):
        found.append("it needs ## headings, each another")
    if re.search(r"^\s*(```|~~~)", prose(notebook), re.M):
        found.append("code in the prose is never run")
    if tag := re.search(r"</?[a-z][^>]*>", re.sub(r"`[^`]*`", "", prose(notebook)), re.I):
        found.append(f"a page shows nothing of {tag.group()} unless it is `code`")
    marks = "".join(re.findall("^[☐☑]", "\n".join(map(printed, cells)), re.M))
    if marks != "☐☑" * (len(marks) // 2):
        found.append(f"each exercise must fail before its solution and pass after it: {marks}")
    constants = literal_names(cells)
    for cell in cells:
        where = f"cell {cell.execution_count}: "
        found += [where + problem for problem in cell_problems(cell, constants)]
    return found


def cell_problems(cell: NotebookNode, constants: set[str]) -> list[str]:
    """List what is wrong with one code cell, given the names that hold nothing but literals."""
    found = []
    calls = claims(cell)
    for name, evidence in calls:
        if not names_in(evidence) - constants:
            found.append(f"the evidence of {name} is a literal: {ast.unparse(evidence)}")
    if cell.outputs and len(re.findall(f"^[{MARKS}]", printed(cell), re.M)) != len(calls):
        found.append(f"it has {len(calls)} calls of check, refute or attempt, and prints others")
    if set(MARKS) & set(cell.source):
        found.append(f"only check, refute and attempt print one of {MARKS}")
    if SKIPPED.search(cell.source + str(cell.metadata.get("tags", ""))):
        found.append("it asks not to be compared")
    if re.search(r"__version__|version_info", cell.source):
        found.append("it speaks of a version")
    for output in cell.outputs:
        data = output.get("data", {})
        if output.get("name") == "stderr" or output.output_type == "error":
            found.append(f"it stores {output.get('name', 'an error')}")
        if data.keys() - SHOWN:
            found.append(f"it shows {', '.join(data.keys() - SHOWN)}, which is not compared")
        text = [output.get("text", ""), *(v for k, v in data.items() if k.startswith("text"))]
        if match := MACHINE_SPECIFIC.search("\n".join(text)):
            found.append(f"its output speaks of one machine: {match.group()!r}")
    if any("image/png" in output.get("data", {}) for output in cell.outputs):
        myst = cell.metadata.get("mystnb", {})
        missing = {"caption", "name"} - myst.get("figure", {}).keys()
        missing |= {"alt"} - myst.get("image", {}).keys()
        if len(cell.outputs) > 1:
            found.append("it shows more than its figure")
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


def prose(notebook: NotebookNode) -> str:
    """Join the cells that do not run."""
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type != "code")


def printed(cell: NotebookNode) -> str:
    """Join what a cell prints."""
    return "".join(output.get("text", "") for output in cell.outputs)


def parse(cell: NotebookNode) -> ast.Module:
    """Parse a cell, magics included."""
    return ast.parse(TransformerManager().transform_cell(cell.source))


def claims(cell: NotebookNode) -> list[tuple[str, ast.expr]]:
    """Find the calls of check, refute and attempt with the evidence that each is given."""
    calls = [node for node in ast.walk(parse(cell)) if isinstance(node, ast.Call)]
    named = [(getattr(call.func, "id", getattr(call.func, "attr", "")), call) for call in calls]
    return [
        (name, [*call.args, *(keyword.value for keyword in call.keywords)][-1])
        for name, call in named
        if name in CALLS and (call.args or call.keywords)
    ]


def names_in(expression: ast.expr) -> set[str]:
    """Give the names that an expression reads, Python's own functions left out."""
    nodes = [node for node in ast.walk(expression) if isinstance(node, ast.Name)]
    bound = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
    return {node.id for node in nodes} - bound - set(dir(builtins))


def literal_names(cells: list[NotebookNode]) -> set[str]:
    """Give the names that are bound, and to nothing but literals."""
    literal, computed = set(), set()
    for node in (node for cell in cells for node in ast.walk(parse(cell))):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            (computed if names_in(node.value) else literal).add(node.targets[0].id)
    return literal - computed


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
        for built in arguments.folder.rglob("*.ipynb")
        if ".ipynb_checkpoints" not in built.parts and not built.with_suffix(".md").exists()
    ]
    print("\n".join(found) or f"{len(texts)} notebooks agree with their texts")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
