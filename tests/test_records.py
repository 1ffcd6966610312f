"""Records of measurements: what they say, and that they notice when the code has changed."""

import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tfm_ref import records

MODULES = ["tfm_ref.masks", "tfm_ref.attention"]


def test_a_digest_follows_the_sources_and_nothing_else(monkeypatch):
    found = records.digest(MODULES)
    assert re.fullmatch("[0-9a-f]{64}", found)
    assert records.digest(MODULES[::-1] + MODULES) == found
    assert records.digest(MODULES[:1]) != found
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: read(path, encoding) + "#")
    assert records.digest(MODULES) != found
    with pytest.raises(ValueError, match="the number of modules must"):
        records.digest([])


def test_surroundings_name_what_a_number_depends_on(device):
    found = records.surroundings(device)
    assert found["device"]
    assert found["torch"] == torch.__version__
    assert sys.version.startswith(found["python"])
    age = datetime.now(UTC) - datetime.fromisoformat(found["date"])
    assert 0 <= age.total_seconds() < 60


def test_on_a_gpu_its_name_and_its_driver_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(records.shutil, "which", lambda name: name)
    monkeypatch.setattr(records, "find_spec", lambda name: name)
    triton = ModuleType("triton")
    triton.__version__ = "3.7"
    monkeypatch.setitem(sys.modules, "triton", triton)

    def run(command, **terms):
        assert command[0] == "nvidia-smi"
        return records.subprocess.CompletedProcess(command, 0, stdout="580.1\n580.1\n")

    monkeypatch.setattr(records.subprocess, "run", run)
    found = records.surroundings("cuda")
    named = {name: found[name] for name in ("device", "cuda", "driver", "triton")}
    assert named == {"device": "a GPU", "cuda": "13.0", "driver": "580.1", "triton": "3.7"}


def test_a_record_comes_back_and_knows_its_code(device, tmp_path):
    values = {"seconds": [1.5, 2.0], "settings": {"n": 3}, "kernels": ["f<[1,\n 2]>(x)"]}
    new = records.new_record("x", values, device=device, modules=MODULES)
    path = records.save_record(new, tmp_path / "new")
    record = records.load_record("x", tmp_path / "new")
    assert record["values"] == values
    assert record["name"] == "x"
    assert record["where"].keys() == records.surroundings(device).keys()
    assert record["code"]["modules"] == sorted(MODULES)
    assert record["is_current"]

    old = json.loads(path.read_text("utf-8"))
    old["code"]["sha256"] = "0" * 64
    path.write_text(json.dumps(old), "utf-8")
    assert records.load_record("x", tmp_path / "new")["is_current"] is False

    old["code"]["modules"] = ["tfm_ref.what_once_was"]
    path.write_text(json.dumps(old), "utf-8")
    assert records.load_record("x", tmp_path / "new")["is_current"] is False
    assert records.load_record("y", tmp_path / "new") is None
    assert records.load_record("y") is None


def test_records_lie_beside_the_package_unless_another_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "files", lambda package: tmp_path / package)
    record = records.new_record("x", {}, device="cpu", modules=MODULES)
    records.save_record(record, tmp_path / "tfm_ref/results")
    assert records.load_record("x")["is_current"]


def test_lists_stay_in_one_line_and_what_is_no_number_is_refused(tmp_path):
    record = records.new_record(
        "x", {"rows": [{"n": 1}, {"n": [1, 2]}]}, device="cpu", modules=MODULES
    )
    lines = records.save_record(record, tmp_path).read_text("utf-8").splitlines()
    assert any(line.endswith('"n": [ 1, 2 ]') for line in lines)
    record["values"] = {"loss": float("nan")}
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.save_record(record, tmp_path)


def test_a_readers_run_is_laid_over_the_recorded_one(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "files", lambda package: tmp_path)
    own = records.new_record("x", {"n": 2}, device="cpu", modules=MODULES)
    assert records.overlay("x", own) == {"your machine": own}
    recorded = own | {"values": {"n": 1}}
    recorded["where"] = {"device": "a GPU", "date": "2026-01-02T03:04:05+00:00"}
    records.save_record(recorded, tmp_path / "results")
    found = records.overlay("x", own)
    assert list(found) == ["a GPU, 2026-01-02", "your machine"]
    assert [run["values"]["n"] for run in found.values()] == [1, 2]
    assert list(records.overlay("x")) == ["a GPU, 2026-01-02"]
