"""The guards of the notebooks, each shown to catch what it is there for."""

import base64
import importlib.util
import io
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("tool", ROOT / "tools/notebooks.py")
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)

TEXT = """---
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# A small chapter

```{code-cell} ipython3
import matplotlib.pyplot as plt
import numpy as np

from tfm_ref.claims import attempt, check
```

## A section

```{code-cell} ipython3
total = np.arange(5).sum()
print("total:", total)
check("the sum is 10", total == 10)
```

```{code-cell} ipython3
---
mystnb:
  figure: {caption: A line., name: fig-line}
  image: {alt: A rising line.}
---
_ = plt.plot([0, 1], [0, 1])
```

## Exercises

```{code-cell} ipython3
def test(double):
    assert double(3) == 6, "double(3) must be 6"


attempt(lambda x: x, test)
```

```{code-cell} ipython3
attempt(lambda x: 2 * x, test)
```

## Summary

Nothing runs here.
"""


def compare(folder):
    """Run the notebooks of a folder through nbval as `make test` does."""
    options = [
        "--nbval",
        "--nbval-current-env",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", folder, *options, folder],
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stdout


@pytest.fixture(scope="session")
def chapter(tmp_path_factory):
    """Build the small chapter once."""
    folder = tmp_path_factory.mktemp("chapter")
    (folder / "chapter.md").write_text(TEXT, "utf-8")
    shutil.copy(ROOT / "notebooks/conftest.py", folder)
    tool.build(folder / "chapter.md")
    return folder


@pytest.fixture
def copy(chapter, tmp_path):
    """Return a copy of the small chapter that a test may spoil."""
    return Path(shutil.copytree(chapter, tmp_path / "copy"))


def spoil(folder, change):
    """Change the built notebook."""
    path = folder / "chapter.ipynb"
    notebook = nbformat.read(path, 4)
    change(notebook.cells)
    nbformat.write(notebook, path)


def output(cells, kind):
    """Find the cell and the output that hold a stream or a figure."""
    return next(
        (cell, out)
        for cell in cells
        if cell.cell_type == "code"
        for out in cell.outputs
        if kind == out.get("name") or kind in out.get("data", {})
    )


def stale_number(cells):
    out = output(cells, "stdout")[1]
    out.text = out.text.replace("10", "11")


def stale_figure(cells):
    data, buffer = output(cells, "image/png")[1].data, io.BytesIO()
    image = plt.imread(io.BytesIO(base64.b64decode(data["image/png"])))
    image[:3, :3] = 0.5  # less than a digit
    plt.imsave(buffer, image)
    data["image/png"] = base64.b64encode(buffer.getvalue()).decode()


def other_size(cells):
    data, buffer = output(cells, "image/png")[1].data, io.BytesIO()
    plt.imsave(buffer, np.ones((9, 9)))
    data["image/png"] = base64.b64encode(buffer.getvalue()).decode()


def measured(cells):
    stale_figure(cells)
    output(cells, "image/png")[0].metadata.tags = ["measured"]


def deleted_output(cells):
    output(cells, "stdout")[0].outputs.clear()


def deleted_figure(cells):
    del output(cells, "image/png")[1].data["image/png"]


def stripped(cells):
    for cell in cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


def one_cell_not_run(cells):
    cell = output(cells, "stdout")[0]
    cell.outputs, cell.execution_count = [], None


def run_out_of_order(cells):
    output(cells, "stdout")[0].execution_count = 9


def stored_stderr(cells):
    output(cells, "stdout")[1].name = "stderr"


def machine_path(cells):
    output(cells, "stdout")[1].text += "<object at 0x7f0a1b2c3d4e>\n"


def claim_without_a_call(cells):
    output(cells, "stdout")[1].text += "✓ the earth is flat\n"


def page_of_html(cells):
    output(cells, "image/png")[1].data["text/html"] = "<b>bold</b>"


def value_beside_a_figure(cells):
    outputs = output(cells, "image/png")[0].outputs
    outputs.append(nbformat.v4.new_output("execute_result", {"text/plain": "Text(0, 0)"}))


def exercise_solved_by_its_stub(cells):
    out = next(o for c in cells for o in c.get("outputs", []) if o.get("text", "").startswith("☐"))
    out.text = "☑ solved\n"


def rewrite(folder, text):
    """Change the text and build it without running: the outputs stay what they were."""
    path = folder / "chapter.md"
    path.write_text(text, "utf-8")
    notebook, outputs = tool.read_text(path), nbformat.read(path.with_suffix(".ipynb"), 4)
    for new, old in zip(tool.code_cells(notebook), tool.code_cells(outputs), strict=True):
        new.outputs, new.execution_count = old.outputs, old.execution_count
    nbformat.write(notebook, path.with_suffix(".ipynb"))


def problems(folder):
    """Say what `make lint` finds in the small chapter."""
    return "\n".join(tool.problems(folder / "chapter.md"))


def test_the_small_chapter_passes_and_is_rebuilt_to_the_byte(chapter, copy):
    assert problems(chapter) == ""
    status, said = compare(chapter)
    assert status == 0, said
    tool.build(copy / "chapter.md")
    built = [(folder / "chapter.ipynb").read_bytes() for folder in (chapter, copy)]
    assert built[0] == built[1]


def test_a_figure_of_measured_times_may_differ(copy):
    spoil(copy, measured)
    status, said = compare(copy)
    assert status == 0, said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (stale_number, "total: 11"),
        (stale_figure, "9 pixels differ"),
        (deleted_output, "Unexpected output fields"),
        (deleted_figure, "0 figures stored, 1 made"),
        (one_cell_not_run, "4 of 5 cells were compared"),
        (stripped, "0 of 5 cells were compared"),
        (other_size, "pixels stored"),
    ],
)
def test_comparison_catches(copy, change, said):
    spoil(copy, change)
    status, output = compare(copy)
    assert status == 1
    assert said in output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (stripped, "all outputs were stripped"),
        (one_cell_not_run, "not run once each from top to bottom: [1, None, 3, 4, 5]"),
        (run_out_of_order, "not run once each from top to bottom: [1, 9, 3, 4, 5]"),
        (stored_stderr, "it stores stderr"),
        (machine_path, "its output speaks of one machine"),
        (claim_without_a_call, "it has 1 calls of check, refute or attempt, and prints others"),
        (page_of_html, "it shows text/html, which is not compared"),
        (value_beside_a_figure, "it shows more than its figure"),
        (exercise_solved_by_its_stub, "fail before its solution and pass after it: ☑☑"),
    ],
)
def test_check_catches_in_the_notebook(copy, change, said):
    spoil(copy, change)
    assert said in problems(copy)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("total == 10", "True", "the evidence of check is a literal: True"),
        ("total == 10", "1 < 2", "the evidence of check is a literal: 1 < 2"),
        ("total == 10", "bool(1)", "the evidence of check is a literal: bool(1)"),
        ("total == 10", "evidence=True", "the evidence of check is a literal: True"),
        ("total == 10", "all(i < 9 for i in range(3))", "the evidence of check is a literal: all"),
        ("np.arange(5).sum()", "10", "the evidence of check is a literal: total"),
        ('print("total:"', 'print("✓ total:"', "only check, refute and attempt print one of"),
        ('print("total:", total)', "print(plt.__version__)", "it speaks of a version"),
        ("## Exercises", "## A section", "it needs ## headings, each another"),
        ("Nothing runs", "At <eos> nothing runs", "a page shows nothing of <eos> unless"),
        ("Nothing runs here.", "~~~python\n1 / 0\n~~~", "code in the prose is never run"),
        ('check("the sum is 10", total == 10)', "", 'section "A section" checks nothing'),
        ("total = ", "# NBVAL_SKIP\ntotal = ", "it asks not to be compared"),
        ("  image: {alt: A rising line.}\n", "", "its figure lacks alt"),
        (", name: fig-line", "", "its figure lacks name"),
    ],
)
def test_check_catches_in_the_text(copy, old, new, said):
    assert old in TEXT
    rewrite(copy, TEXT.replace(old, new))
    assert said in problems(copy)


def test_a_text_edited_without_a_rebuild_is_caught(copy):
    (copy / "chapter.md").write_text(TEXT.replace("Nothing", "Not a thing"), "utf-8")
    assert "the text has changed" in problems(copy)


def test_a_word_edited_changes_two_lines(copy):
    before = (copy / "chapter.ipynb").read_text("utf-8").splitlines()
    rewrite(copy, TEXT.replace("Nothing", "Not a thing"))
    after = (copy / "chapter.ipynb").read_text("utf-8").splitlines()
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 2  # the line, its cell's id


def test_the_command_names_what_it_finds_and_fails(copy, monkeypatch, capsys):
    (copy / "chapter.md").rename(copy / "other.md")
    monkeypatch.setattr(sys, "argv", ["notebooks.py", "check", "--folder", str(copy)])
    assert tool.main() == 1
    said = capsys.readouterr().out
    assert "chapter.ipynb: it has no text" in said
    assert "other.md: the text has changed" in said


def test_every_notebook_of_the_book_agrees_with_its_text():
    texts, built = ((ROOT / "notebooks").glob(pattern) for pattern in ("*.md", "*.ipynb"))
    found = {path.stem: tool.problems(path) for path in texts}
    assert found.keys() == {path.stem for path in built}
    assert found
    assert not any(found.values()), found
