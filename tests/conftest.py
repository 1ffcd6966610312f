"""What all tests share. Loaded before anything imports tfm_ref."""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec

import jaxtyping
import pytest

# Every shape annotation of tfm_ref is enforced from here on, in its doctests too.
# An integer is good where a float is asked for. A GPU machine may lack beartype; `make test`
# installs it.
if find_spec("beartype"):
    jaxtyping.install_import_hook(
        "tfm_ref", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    )
pytest.register_assert_rewrite("conformance.checks")


class KernelFinder:
    """Load kernels without checks of annotations: Triton compiles them from their source."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        kernels = name.startswith("tfm_ref.") and name.endswith("_kernels")
        return PathFinder.find_spec(name, path, target) if kernels else None


sys.meta_path.insert(0, KernelFinder)

# Triton runs its kernels on the CPU if it is told so before it is imported.
if os.environ.get("TFM_REF_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

# Examples are the same in every run, and a busy machine fails none of them.
if find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("steady", deadline=None, derandomize=True)
    settings.load_profile("steady")

import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    """Say loudly, at the very end, what a machine without browser or network has not tested."""
    missing = {
        "NO CHROMIUM": "THE SITE WAS NOT TESTED",
        "NO PACKAGE INDEX": "THE NOTEBOOKS WERE NOT RUN AS ON COLAB",
    }
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    for what, so in missing.items():
        if any(what in reason for reason in skipped):
            terminalreporter.write_line(f"{what}: {so}", red=True, bold=True)


@pytest.fixture(autouse=True)
def _seed():
    """Start every test from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> str:
    """Name the device under test: cpu, unless TFM_REF_DEVICE says otherwise."""
    return os.environ.get("TFM_REF_DEVICE", "cpu")


@pytest.fixture
def no_shape_checks(monkeypatch):
    """Let wrong shapes reach the package's own errors: annotations would refuse them first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
