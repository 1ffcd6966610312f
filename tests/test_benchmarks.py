"""The measurements of the book, on sizes that take no time: do they say what was measured?"""

import sys
from importlib.util import find_spec

import pytest
import torch

from tfm_ref import benchmarks
from tfm_ref.candidates import Setting
from tfm_ref.records import load_record

SMALL = Setting(2, 4, 2, 40, 40, 16, True, "float32")
ONCE = {"least": 1, "most": 1}
MEASURED = {"seconds", "peak_bytes", "error", "limit"}


def told(row):
    """Give the setting of a row."""
    return Setting(**{name: row[name] for name in Setting._fields})


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_is_measured_both_ways(device, is_causal):
    settings = [SMALL._replace(is_causal=is_causal), SMALL._replace(n_kv_heads=4)]
    names = ["naive", "math", "tiled"]
    found = benchmarks.attention(device, settings, names, **ONCE)
    rows = found["rows"]
    order = [(s, name, way) for s in settings for name in names for way in ("forward", "backward")]
    assert [(told(row), row["candidate"], row["direction"]) for row in rows] == order
    assert all(row.keys() >= MEASURED and len(row["seconds"]) == 1 for row in rows)
    assert all(row["error"] <= row["limit"] == 2 for row in rows)
    assert all(0 < row["error"] <= 1 for row in rows if row["candidate"] == "naive")
    assert found["left_out"] == 0
    assert found["peaks"].keys() == {"matmul", "copy", "read"}


@pytest.mark.parametrize("wrong", ["top-left", "unscaled", "last head"])
def test_a_wrong_kernel_gets_no_time(device, monkeypatch, wrong):
    def attend(q, k, v, *, is_causal):
        y = benchmarks.ATTENTIONS["naive"](q, k, v, is_causal=is_causal)
        if wrong == "unscaled":
            return benchmarks.ATTENTIONS["naive"](2 * q, k, v, is_causal=is_causal)
        if wrong == "last head":
            return torch.cat([y[:, :-1], y[:, -1:] * 1.001], 1)
        return torch.cat([y[..., :-1, :], y[..., -2:-1, :]], 2)

    monkeypatch.setitem(benchmarks.ATTENTIONS, "wrong", attend)
    rows = benchmarks.attention(device, [SMALL], ["wrong"], **ONCE)["rows"]
    assert len(rows) == 2
    for row in rows:
        assert row["failed"].startswith("ValueError: the error (")
        assert not row.keys() & MEASURED


def test_wrong_gradients_are_seen_though_the_output_is_right(device, monkeypatch):
    def attend(q, k, v, *, is_causal):
        return benchmarks.ATTENTIONS["naive"](q, k, v.detach() + 0.5 * (v - v.detach()))

    monkeypatch.setitem(benchmarks.ATTENTIONS, "wrong", attend)
    setting = SMALL._replace(is_causal=False)
    forward, backward = benchmarks.attention(device, [setting], ["wrong"], **ONCE)["rows"]
    assert forward["error"] < 1.5
    assert "exceeds its limit" in backward["failed"]


def test_what_cannot_run_says_why_and_the_others_go_on(device, monkeypatch):
    def refuse(q, k, v, *, is_causal):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setitem(benchmarks.ATTENTIONS, "no", refuse)
    rows = benchmarks.attention(device, [SMALL], ["no", "naive"], **ONCE)["rows"]
    assert [row.get("failed") for row in rows] == ["RuntimeError: no kernel"] * 2 + [None] * 2


def test_sizes_without_room_fail_alone(device, monkeypatch):
    def full(setting, device, draw=Setting.draw):
        if setting.len_q == 41:
            raise torch.OutOfMemoryError("41 are too many")
        return draw(setting, device)

    monkeypatch.setattr(Setting, "draw", full)
    settings = [SMALL._replace(len_q=41), SMALL]
    rows = benchmarks.decode(device, settings, ["math"], **ONCE)["rows"]
    assert [row.get("failed") for row in rows] == ["OutOfMemoryError: 41 are too many", None]


def test_when_the_time_is_over_the_rest_is_counted(device):
    assert benchmarks.attention(device, [SMALL] * 3, ["naive"], time_limit=-1)["left_out"] == 3
    assert benchmarks.decode(device, [SMALL] * 3, ["math"], time_limit=-1)["left_out"] == 3


def test_memory_of_backward_is_that_of_training(device):
    """Backward alone needs no more than its gradients; with what forward keeps it is n × n."""
    setting = SMALL._replace(len_q=256, len_k=256)
    rows = benchmarks.attention(device, [setting], ["naive", "tiled"], **ONCE)["rows"]
    peak = {(row["candidate"], row["direction"]): row["peak_bytes"] for row in rows}
    scores = 4 * setting.batch * setting.n_heads * 256 * 256
    assert peak["naive", "backward"] > 3 * scores
    assert peak["tiled", "backward"] < 2 * scores


@pytest.mark.parametrize("n", [1, 3])
def test_decoding_is_measured(device, n):
    setting = Setting(2, 4, 2, n, 70, 16, False, "float32")
    names = ["math", "triton"] if find_spec("triton") else ["math"]
    rows = benchmarks.decode(device, [setting], names, **ONCE)["rows"]
    assert [(row["candidate"], told(row)) for row in rows] == [(name, setting) for name in names]
    assert all(row.keys() >= MEASURED for row in rows)


def test_experts_are_measured_against_loop_and_dense_layer(device):
    rows = benchmarks.experts(device, [(4, 2, 16, 32, 24)], **ONCE)["rows"]
    assert [row["candidate"] for row in rows] == ["naive", "sorted", "dense"]
    for row in rows:
        assert row.keys() >= MEASURED
        assert (row["n_experts"], row["top_k"], row["n_tokens"]) == (4, 2, 24)
    assert rows[0]["error"] == 0


def test_wrong_experts_get_no_time(device, monkeypatch):
    sort = benchmarks.MoELayer.forward
    monkeypatch.setattr(
        benchmarks.MoELayer,
        "forward",
        lambda self, x: sort(self, x) * (1.01 if self.backend == "sorted" else 1),
    )
    rows = benchmarks.experts(device, [(4, 2, 16, 32, 24)], **ONCE)["rows"]
    assert ["failed" in row for row in rows] == [False, True, False]


def test_pytorch_says_what_it_would_choose(device):
    rows = benchmarks.choices(device)["rows"]
    assert len(rows) == 3 * 4 * 4
    names = {row["backend"] for row in rows}
    assert names <= {"MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"}
    if device == "cpu":
        assert names == {"FLASH_ATTENTION"}


def test_the_plain_benchmark_runs_what_it_says(device):
    rows = benchmarks.plain_benchmark(device, (1, 2, 48, 16), **ONCE)["rows"]
    assert [(row["dtype"], row["candidate"]) for row in rows] == [
        (dtype, name) for dtype in ("float32", "bfloat16") for name in ("PyTorch's choice", "math")
    ]
    assert all(row.keys() >= MEASURED for row in rows)
    assert told(rows[0]) == Setting(1, 2, 2, 48, 48, 16, True, "float32")


def test_the_settings_of_the_book_hold_those_of_its_targets():
    flash = set(benchmarks.flash_settings())
    for n in (4096, 8192, 16384):
        for head_dim in (64, 128):
            assert Setting(max(1, 8192 // n), 64, 8, n, n, head_dim, True, "bfloat16") in flash
    decode = list(benchmarks.decode_settings())
    assert {s.n_kv_heads for s in decode if not s.latent} == {1, 8, 64}
    assert {(s.n_kv_heads, s.head_dim) for s in decode if s.latent} == {(1, 576)}
    assert {s.len_q for s in decode} == {1, 2, 4, 8}
    large = [s for s in decode if s.kv_bytes >= 2**28]
    assert {(s.len_q, s.n_kv_heads) for s in large} >= {
        (q, g) for q in (1, 2, 4, 8) for g in (8, 64)
    }


def test_records_are_written_with_the_code_that_they_measure(device, tmp_path, monkeypatch):
    small = {
        "attention": lambda device: benchmarks.attention(device, [SMALL], ["tiled"], **ONCE),
        "choices": benchmarks.choices,
    }
    for name, run in small.items():
        benchmark = benchmarks.BENCHMARKS[name]._replace(run=run)
        monkeypatch.setitem(benchmarks.BENCHMARKS, name, benchmark)
    command = ["benchmarks", str(tmp_path), *small, "--device", device]
    monkeypatch.setattr(sys, "argv", command)
    benchmarks.main()
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(small)
    record = load_record("attention", tmp_path)
    assert record["is_current"]
    named = "flash flash_kernels bench benchmarks candidates comparison".split()
    assert {f"tfm_ref.{name}" for name in named} <= set(record["code"]["modules"])
    assert record["values"]["rows"][0]["candidate"] == "tiled"
