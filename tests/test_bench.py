"""Times, memory and peaks: what is counted, and that what is wrong is not measured."""

from types import SimpleNamespace

import pytest
import torch

from tfm_ref import bench


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


def test_bytes_kept_are_those_that_the_backward_pass_needs():
    """A product keeps both factors, shared memory counts once, and a sum keeps nothing."""
    x, y = torch.ones(2, 10, dtype=torch.float64, requires_grad=True)
    assert bench.bytes_kept(lambda: x * y) == x.untyped_storage().nbytes() == 160
    assert bench.bytes_kept(lambda: x.exp() + x.exp()) == 2 * 80
    assert bench.bytes_kept(lambda: x + y) == 0
    assert bench.bytes_kept(lambda: x.detach() * 2) == 0


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
