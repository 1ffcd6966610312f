"""Each notebook runs as on Colab: outside the repository, where tfm_ref is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
ADDRESS = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["repository"]["url"]
ON_COLAB = ["torch", "numpy", "matplotlib", "ipykernel"]


def run(*command, **options):
    """Run a command; return what it printed."""
    options = {"check": True, "text": True, "capture_output": True} | options
    return subprocess.run([*map(str, command)], **options).stdout


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """Commit the working tree to a repository of its own; return its address for pip."""
    folder = tmp_path_factory.mktemp("snapshot")
    files = run("git", "ls-files", "-coz", "--exclude-standard", cwd=ROOT).split("\0")
    git = ["git", "-C", folder, "-c", "user.name=test", "-c", "user.email=test"]
    run(*git, "init", "-q")
    existing = "\n".join(name for name in files if (ROOT / name).is_file())
    run("tar", "-cf", folder / "tree.tar", "-T", "-", cwd=ROOT, input=existing)
    run("tar", "-xf", folder / "tree.tar", "-C", folder)
    (folder / "tree.tar").unlink()
    run(*git, "add", "-A")
    run(*git, "commit", "-qm", "snapshot")
    return f"git+file://{folder}"


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """Make an environment that has what Colab has; return its Python."""
    folder = tmp_path_factory.mktemp("colab")
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin/python"
    try:
        run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *ON_COLAB)
    except subprocess.CalledProcessError as error:
        if "CI" in os.environ or "connection broken by" not in error.stderr:
            raise
        pytest.skip("NO PACKAGE INDEX: nothing can be installed as on Colab")
    return python


def versions(python):
    """List what is installed."""
    installed = run(python, "-m", "pip", "list", "--format=json")
    return {package["name"]: package["version"] for package in json.loads(installed)}


def printed(notebook):
    """Return what each cell prints, as text."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_runs_in_a_fresh_environment(path, snapshot, colab, tmp_path, monkeypatch):
    kernel = tmp_path / "kernels/colab/kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = [str(colab), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": "Colab", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run(colab, "-m", "pip", "uninstall", "-qy", "tfm-ref")
    before = versions(colab)

    stored = nbformat.read(path, 4)
    notebook = nbformat.from_dict(stored)
    setup = next(cell for cell in notebook.cells if ADDRESS in cell.source)
    setup.source = setup.source.replace(f"git+{ADDRESS}", snapshot)
    NotebookClient(
        notebook,
        kernel_name="colab",
        timeout=300,
        coalesce_streams=True,
        resources={"metadata": {"path": tmp_path}},
    ).execute()

    after = versions(colab)
    assert "tfm-ref" in after
    assert {name: after[name] for name in before} == before, "an installed package was replaced"
    assert printed(notebook)[1:] == printed(stored)[1:]
