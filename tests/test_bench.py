"""Records of measurements: what they say, and that they notice when the code has changed."""

import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tfm_ref import bench

MODULES = ["tfm_ref.masks", "tfm_ref.attention"]


def test_a_digest_follows_the_sources_and_nothing_else(monkeypatch):
    found = bench.digest(MODULES)
    assert re.fullmatch("[0-9a-f]{64}", found)
    assert bench.digest(MODULES[::-1] + MODULES) == found
    assert bench.digest(MODULES[:1]) != found
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: read(path, encoding) + "#")
    assert bench.digest(MODULES) != found
    with pytest.raises(ValueError, match="the number of modules must"):
        bench.digest([])


def test_surroundings_name_what_a_number_depends_on(device):
    found = bench.surroundings(device)
    assert found["device"]
    assert found["torch"] == torch.__version__
    assert sys.version.startswith(found["python"])
    age = datetime.now(UTC) - datetime.fromisoformat(found["date"])
    assert 0 <= age.total_seconds() < 60


def test_on_a_gpu_its_name_and_its_driver_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(bench.shutil, "which", lambda name: name)
    monkeypatch.setattr(bench, "find_spec", lambda name: name)
    triton = ModuleType("triton")
    triton.__version__ = "3.7"
    monkeypatch.setitem(sys.modules, "triton", triton)

    def run(command, **terms):
        assert command[0] == "nvidia-smi"
        return bench.subprocess.CompletedProcess(command, 0, stdout="580.1\n580.1\n")

    monkeypatch.setattr(bench.subprocess, "run", run)
    found = bench.surroundings("cuda")
    named = {name: found[name] for name in ("device", "cuda", "driver", "triton")}
    assert named == {"device": "a GPU", "cuda": "13.0", "driver": "580.1", "triton": "3.7"}


def fake_clock(monkeypatch, *seconds):
    """Let the process time of the next runs be these."""
    ticks = iter(t for s in seconds for t in (0.0, s))
    monkeypatch.setattr(bench, "process_time", lambda: next(ticks))


def test_runs_are_timed_after_a_warm_up_on_each_input_in_turn(monkeypatch):
    """Three runs warm up, one says how many fit; here three times 0.1 s would fit into 0.3."""
    fake_clock(monkeypatch, 9, 9, 9, 0.1, 1, 2, 3)
    called = []
    inputs = [(torch.tensor(0),), (torch.tensor(1),)]
    terms = {"device": "cpu", "seconds": 0.35, "least": 1}
    assert bench.time_runs(lambda t: called.append(int(t)), inputs, **terms) == [1, 2, 3]
    assert called == [0, 1] * 3 + [0]


@pytest.mark.parametrize(("once", "n"), [(100.0, 4), (0.0, 6)], ids=["slow", "fast"])
def test_the_number_of_runs_has_bounds(monkeypatch, once, n):
    fake_clock(monkeypatch, 0, 0, 0, once, *range(n))
    assert bench.time_runs(int, device="cpu", least=4, most=6) == list(range(n))


def test_a_time_without_inputs_or_runs_is_refused():
    with pytest.raises(ValueError, match="the number of inputs must"):
        bench.time_runs(int, [], device="cpu")
    with pytest.raises(ValueError, match="least must"):
        bench.time_runs(int, device="cpu", least=0)
    with pytest.raises(ValueError, match="least must"):
        bench.time_runs(int, device="cpu", least=7, most=6)


def test_a_gpu_is_timed_by_its_own_events_with_an_empty_cache(monkeypatch):
    """A stand-in for CUDA logs what is asked of it."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("mark")

        def elapsed_time(self, later):
            return 5.0  # milliseconds

    class Buffer:
        def zero_(self):
            log.append("overwrite")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    gpu = SimpleNamespace(L2_cache_size=10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    empty = torch.empty

    def buffer(*shape, device=None, **terms):
        assert shape == (40,)
        return Buffer()

    monkeypatch.setattr(torch, "empty", buffer)
    seconds = bench.time_runs(lambda: log.append("run"), device="cuda", least=2, most=2)
    monkeypatch.setattr(torch, "empty", empty)
    assert seconds == [0.005, 0.005]
    one = ["overwrite"] * 8 + ["mark", "run", "mark"]
    assert log == [*one * 3, "wait", *one, "wait", *one * 2, "wait"]


def test_peak_memory_counts_what_lives_at_once(device):
    x = torch.ones(1024, device=device)
    assert bench.peak_memory(lambda: x + 1, device=device) == 4096
    assert bench.peak_memory(lambda: (x + 1) * 2 + 1, device=device) == 2 * 4096
    assert bench.peak_memory(lambda: [x + 1, x + 2, x + 3], device=device) == 3 * 4096
    assert bench.peak_memory(lambda: x[3:].view(-1), device=device) == 0
    assert bench.peak_memory(lambda: x.add_(1).mul_(2), device=device) == 0
    kept = x.clone().requires_grad_()
    # The square keeps what it squares, for the gradient.
    assert bench.peak_memory(lambda: (kept * 2).square() + 1, device=device) == 3 * 4096
    with torch.no_grad():
        assert bench.peak_memory(lambda: (kept * 2).square() + 1, device=device) == 2 * 4096


@pytest.mark.parametrize("error", [0.2, float("nan")])
def test_what_is_wrong_is_not_measured(error):
    def never():
        raise AssertionError("it ran")

    with pytest.raises(ValueError, match=r"error \((0.2|nan)\) exceeds its limit \(0.1\)"):
        bench.measure(never, device="cpu", error=error, limit=0.1)


def test_what_is_right_is_measured(device):
    x = torch.ones(1024, device=device)
    found = bench.measure(torch.exp, [[x]], device=device, error=0.1, limit=0.1, least=2, most=3)
    assert len(found["seconds"]) in (2, 3)
    assert min(found["seconds"]) >= 0
    assert (found["peak_bytes"], found["error"], found["limit"]) == (4096, 0.1, 0.1)


def test_peaks_are_work_over_the_median_time(monkeypatch):
    monkeypatch.setattr(bench, "time_runs", lambda *args, **terms: [1.0, 4.0, 100.0])
    assert bench.matmul_peak("cpu", torch.float32, size=10) == 2000 / 4
    assert bench.copy_peak("cpu", n_bytes=16) == 32 / 4
    assert bench.read_peak("cpu", n_bytes=16) == 16 / 4
    with pytest.raises(ValueError, match="size must"):
        bench.matmul_peak("cpu", size=0)
    with pytest.raises(ValueError, match="n_bytes must"):
        bench.copy_peak("cpu", n_bytes=0)
    with pytest.raises(ValueError, match="n_bytes must"):
        bench.read_peak("cpu", n_bytes=3)


def test_peaks_are_those_of_the_work_named(device):
    """Twice the bytes take about twice the time, so that the peak stays."""
    small, large = (bench.copy_peak(device, n_bytes=n) for n in (2**25, 2**27))
    assert 1 / 4 < small / large < 4
    assert bench.read_peak(device, n_bytes=2**25) > 1e6
    assert bench.matmul_peak(device, torch.float32, size=64) > 1e6


def test_a_record_comes_back_and_knows_its_code(device, tmp_path):
    values = {"seconds": [1.5, 2.0], "settings": {"n": 3}, "kernels": ["f<[1,\n 2]>(x)"]}
    new = bench.new_record("x", values, device=device, modules=MODULES)
    path = bench.save_record(new, tmp_path / "new")
    record = bench.load_record("x", tmp_path / "new")
    assert record["values"] == values
    assert record["name"] == "x"
    assert record["where"].keys() == bench.surroundings(device).keys()
    assert record["code"]["modules"] == sorted(MODULES)
    assert record["is_current"]

    old = json.loads(path.read_text("utf-8"))
    old["code"]["sha256"] = "0" * 64
    path.write_text(json.dumps(old), "utf-8")
    assert bench.load_record("x", tmp_path / "new")["is_current"] is False

    old["code"]["modules"] = ["tfm_ref.what_once_was"]
    path.write_text(json.dumps(old), "utf-8")
    assert bench.load_record("x", tmp_path / "new")["is_current"] is False
    assert bench.load_record("y", tmp_path / "new") is None
    assert bench.load_record("y") is None


def test_records_lie_beside_the_package_unless_another_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "files", lambda package: tmp_path / package)
    record = bench.new_record("x", {}, device="cpu", modules=MODULES)
    bench.save_record(record, tmp_path / "tfm_ref/results")
    assert bench.load_record("x")["is_current"]


def test_lists_stay_in_one_line_and_what_is_no_number_is_refused(tmp_path):
    record = bench.new_record(
        "x", {"rows": [{"n": 1}, {"n": [1, 2]}]}, device="cpu", modules=MODULES
    )
    lines = bench.save_record(record, tmp_path).read_text("utf-8").splitlines()
    assert any(line.endswith('"n": [ 1, 2 ]') for line in lines)
    record["values"] = {"loss": float("nan")}
    with pytest.raises(ValueError, match="not JSON compliant"):
        bench.save_record(record, tmp_path)


def test_a_readers_run_is_laid_over_the_recorded_one(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "files", lambda package: tmp_path)
    own = bench.new_record("x", {"n": 2}, device="cpu", modules=MODULES)
    assert bench.overlay("x", own) == {"your machine": own}
    recorded = own | {"values": {"n": 1}}
    recorded["where"] = {"device": "a GPU", "date": "2026-01-02T03:04:05+00:00"}
    bench.save_record(recorded, tmp_path / "results")
    found = bench.overlay("x", own)
    assert list(found) == ["a GPU, 2026-01-02", "your machine"]
    assert [run["values"]["n"] for run in found.values()] == [1, 2]
    assert list(bench.overlay("x")) == ["a GPU, 2026-01-02"]
