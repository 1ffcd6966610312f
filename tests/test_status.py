"""What the page on the book's state is made from: a report of the tests, summed up."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / "tools/status.py"
SPEC = importlib.util.spec_from_file_location("status", PATH)
status = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(status)

TESTS = """
import pytest

def test_a(): pass
def test_b(): pytest.skip("no")
def test_c(): assert False
@pytest.fixture
def broken(): raise ValueError
def test_d(broken): pass
def test_e(record_property): record_property("processor seconds", 12.34)
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A small repository with one test in each of two suites, and the report of a run."""
    for path in ("tests/site/test_x.py", "notebooks/01_x.py", "tfm_ref/x.py", "book/x.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(TESTS if path.startswith("note") else "", "utf-8")
    for path in ("pyproject.toml", "_config.yml", "_toc.yml", "book/.hidden.md", "book/x.json"):
        (tmp_path / path).touch()
    paths = ["tests/site/test_x.py", "notebooks/01_x.py"]
    (tmp_path / paths[0]).write_text(TESTS.replace("processor", "other"), "utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=report.xml"]
    subprocess.run([*command, *paths], cwd=tmp_path, capture_output=True)
    monkeypatch.setattr(status, "ROOT", tmp_path)
    monkeypatch.setattr(status, "FOLDER", tmp_path / "book/status")
    return tmp_path


def test_a_report_is_summed_up(root):
    record = status.record_of(root / "report.xml")
    counts = {"failed": 2, "passed": 2, "skipped": 1}
    suites = {name: {} for name in status.SUITES}
    assert record["suites"] == suites | {
        "site in a browser": counts,
        "cells of the notebooks": counts,
    }
    assert record["notebooks"] == {"01_x": 12.3}
    assert record["torch"] == torch.__version__
    assert record["date"].count("-") == 2
    assert record["minutes"] < 1


@pytest.mark.parametrize("path", ["tfm_ref/x.py", "pyproject.toml", "tests/site/test_x.py"])
def test_a_report_of_other_sources_is_refused(root, path):
    os.utime(root / path, (2e9, 2e9))
    with pytest.raises(ValueError, match=rf"changed since the tests ran: {path}; run make test"):
        status.record_of(root / "report.xml")


def test_each_kind_of_source_has_its_digest(root):
    before = status.digests()
    (root / "book/x.md").write_text("new", "utf-8")
    (root / "book/x.json").write_text("new", "utf-8")
    (root / "book/.hidden.md").write_text("new", "utf-8")
    after = status.digests()
    assert [name for name in before if before[name] != after[name]] == ["the other pages"]
    (root / "book/x.md").write_text("", "utf-8")
    assert status.digests() == before


def test_a_record_is_kept_by_version(root, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["status.py", str(root / "report.xml")])
    status.main()
    name = f"python-{sys.version_info[0]}.{sys.version_info[1]}-torch-{torch.__version__[:6]}.json"
    assert capsys.readouterr().out == f"book/status/{name}\n"
    record = json.loads((root / "book/status" / name).read_text("utf-8"))
    assert record["sources"] == status.digests()
