"""What holds for the repository as a whole: versions, addresses, workflows, what it contains."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from itertools import chain
from pathlib import Path
from pkgutil import walk_packages

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ADDRESS = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["repository"]["url"]
TO_CONDA = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


def tracked():
    """Return what git tracks or would track, as texts by path."""
    names = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    paths = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    return {
        str(path.relative_to(ROOT)): path.read_text("utf-8", errors="replace") for path in paths
    }


def lower_bounds(requirements):
    """Map each requirement's name to its lower bound, the only kind the package may have."""
    return {r.name: str(r.specifier) for r in map(Requirement, requirements)}


def test_pins_satisfy_every_lower_bound():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "name==version only"
    pins = {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines)}
    for requirement in map(Requirement, chain(PROJECT["dependencies"], *EXTRAS.values())):
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} is pinned to {pin}"


def test_pins_suit_the_first_release_of_every_python():
    """Debian's 3.11 is 3.11.2: a pin that asks for 3.11.5 leaves it without an environment."""
    oldest = [f"{python}.0" for python in ("3.11", "3.12", "3.13")]
    wanted = {d.name: SpecifierSet(d.metadata["Requires-Python"] or "") for d in distributions()}
    assert not {name for name, bound in wanted.items() if not all(map(bound.contains, oldest))}


def test_the_package_asks_for_lower_bounds_only():
    bounds = lower_bounds(PROJECT["dependencies"])
    assert bounds.keys() == {
        *("torch", "numpy", "einops", "matplotlib", "jaxtyping", "safetensors", "tqdm")
    }
    assert all(re.fullmatch(r">=[\d.]+", bound) for bound in bounds.values()), bounds


def test_conda_environment_agrees_with_pyproject():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["dependencies"]
    got = lower_bounds(line for line in conda if isinstance(line, str))
    wanted = lower_bounds(PROJECT["dependencies"]) | lower_bounds(EXTRAS["lab"])
    wanted |= {"ipykernel": lower_bounds(EXTRAS["book"])["ipykernel"]}
    wanted = {TO_CONDA.get(name, name): bound for name, bound in wanted.items()}
    assert got == wanted | {"python": "<3.14,>=3.11", "pip": ""}


def test_the_address_is_typed_in_one_place():
    """Notebooks are built: their setup cell takes the address from _config.yml."""
    found = [name for name, text in tracked().items() if ADDRESS in text]
    built = {str(path.relative_to(ROOT)) for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(found) - built == {"_config.yml"}


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("a path of one machine", r"(?<![\w.])/(home|root|work|Users)/\w"),
        ("a package registry", r"pypi\.o" + r"rg|pythonhosted\.o|registry\.npmj"),
    ],
)
def test_nothing_of_one_machine_is_tracked(what, pattern):
    allowed = {"tests/test_repository.py", "tools/notebooks.py"}
    for name, text in tracked().items():
        match = re.search(pattern, text)
        assert not match or name in allowed, f"{name} holds {what}: {match.group()}"


def test_workflows_follow_their_schema():
    workflows = list((ROOT / ".github/workflows").glob("*.yml"))
    command = [sys.executable, "-m", "check_jsonschema"]
    schema = ["--builtin-schema", "vendor.github-workflows"]
    result = subprocess.run([*command, *schema, *workflows], capture_output=True, text=True)
    assert len(workflows) == 4
    assert result.returncode == 0, result.stdout


def test_a_broken_workflow_is_refused(tmp_path):
    text = (ROOT / ".github/workflows/ci.yml").read_text("utf-8")
    (tmp_path / "ci.yml").write_text(text.replace("runs-on", "run-on"), "utf-8")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    assert subprocess.run(
        [*command, "vendor.github-workflows", tmp_path / "ci.yml"], capture_output=True
    ).returncode


@pytest.mark.parametrize("own", [True, False])
def test_publishing_is_refused_from_another_address(own):
    """Run the guard of the Pages workflow as its shell would."""
    pages = yaml.safe_load((ROOT / ".github/workflows/pages.yml").read_text("utf-8"))
    guard = next(
        step for step in pages["jobs"]["publish"]["steps"] if "Refuse" in step.get("name", "")
    )
    server, repository = ADDRESS.rsplit("/", 2)[0], "/".join(ADDRESS.rsplit("/", 2)[1:])
    environment = {
        "PATH": "/usr/bin:/bin",
        "GITHUB_SERVER_URL": server,
        "GITHUB_REPOSITORY": repository if own else "somebody/else",
    }
    result = subprocess.run(["bash", "-ec", guard["run"]], cwd=ROOT, env=environment)
    assert (result.returncode == 0) == own


def test_workflows_test_what_the_package_supports():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))["jobs"]
    pythons = jobs["test"]["strategy"]["matrix"]["python"]
    assert pythons == sorted(pythons, key=Version) == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    assert "--resolution lowest-direct" in str(jobs["oldest"]["steps"])


def test_every_paper_that_is_linked_is_in_the_bibliography():
    papers = {
        name: set(re.findall(r"arxiv\.org/abs/([\d.]+\d)", text))
        for name, text in tracked().items()
        if name.endswith(".md")
    }
    listed = papers.pop("book/bibliography.md")
    assert listed
    assert set().union(*papers.values()) <= listed
    assert papers["notebooks/01_self_attention.md"]


def test_every_module_is_on_the_api_page():
    """But for kernels, which need Triton to be imported: those who call them have a place."""
    modules = {module.name for module in walk_packages([ROOT / "tfm_ref"], "tfm_ref.")}
    modules = {name for name in modules if not name.endswith("_kernels")}
    page = (ROOT / "book/api.md").read_text("utf-8")
    assert set(re.findall(r"automodule:: (\S+)", page)) == modules


def test_make_lists_every_command():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.M).group(1).split()
    listed = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True).stdout
    assert re.findall(r"^make (\S+)", listed, re.M) == phony
