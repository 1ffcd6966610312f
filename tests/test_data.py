"""The corpus is large enough, clean, and travels with the package."""

import tomllib
from pathlib import Path

from tfm_ref import corpus

ROOT = Path(__file__).parents[1]


def test_corpus_is_large_and_nearly_ascii():
    text = corpus()
    assert len(text.encode()) > 100_000
    assert 0 < len(text.encode()) - len(text) < 0.002 * len(text)  # some ë and £
    assert len(set(text.split())) > 3_000


def test_corpus_is_clean():
    lines = corpus().split("\n")
    assert lines[-1] == ""
    assert all(line == line.strip() for line in lines)
    assert "\n\n\n" not in corpus()
    paragraphs = [line for line in lines if len(line) > 60]
    assert len(set(paragraphs)) == len(paragraphs)


def test_corpus_is_installed_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "corpus.txt" in project["tool"]["setuptools"]["package-data"]["tfm_ref"]
