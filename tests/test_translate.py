"""Training on Multi30k, from its files to its record, with ten sentences and a tiny model."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import SAMPLE

from tfm_ref import read_pairs
from tfm_ref.records import load_record, new_record, save_record

PATH = Path(__file__).parents[1] / "tools/translate.py"


@pytest.fixture(scope="module")
def translate():
    spec = importlib.util.spec_from_file_location("translate", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, text in SAMPLE.items():
        folder.joinpath(name).write_text(text, "utf-8")
    return read_pairs(folder / "en", folder / "de")


@pytest.fixture(scope="module")
def settings(translate):
    sizes = {"d_model": 64, "n_heads": 2, "d_ff": 128, "n_layers": 1, "dropout": 0.0}
    length = {"max_tokens": 120, "n_steps": 360, "warmup": 60, "every": 60, "n_averaged": 2}
    return replace(translate.Settings(), **sizes, **length, n_merges=60, peak_size=64)


def test_sentences_learned_by_heart_are_translated(
    translate, pairs, settings, tmp_path, monkeypatch
):
    pairs, average, averaged = pairs[:4], translate.average_checkpoints, []
    monkeypatch.setattr(
        translate, "average_checkpoints", lambda paths: averaged.extend(paths) or average(paths)
    )
    splits = {"train": pairs, "val": pairs[:3], "test": pairs[::-1]}
    values = translate.run(splits, settings, "cpu", tmp_path)
    assert values["test_bleu"] > 99
    assert tmp_path.joinpath("translations.txt").read_text("utf-8").splitlines() == [
        pair.target for pair in pairs[::-1]
    ]
    assert len(values["train_loss"]) == len(values["val_loss"]) == 6
    assert list(values["val_loss"]) == [60, 120, 180, 240, 300, 360]
    assert len({*values["val_loss"].values(), values["val_loss_averaged"]}) == 7
    assert [path.name for path in averaged] == ["step-00000300", "step-00000360"]
    run = json.loads((averaged[-1] / "record.json").read_text("utf-8"))["settings"]
    assert (run["betas of group 0"], run["eps of group 0"]) == ([0.9, 0.98], 1e-9)
    assert 0.05 < values["val_loss_averaged"] < 0.2  # smoothing leaves about -log 0.9
    assert 0 < values["share_of_peak"] < 1
    assert values["tokens_per_second"] > 0

    record = new_record("multi30k", values, device="cpu", modules=translate.MODULES)
    save_record(record, tmp_path)
    record = load_record("multi30k", tmp_path)
    assert record["values"] == json.loads(json.dumps(values))
    assert record["is_current"]


def test_a_stopped_run_goes_on_to_the_same_end(translate, pairs, settings, tmp_path):
    splits = {"train": pairs, "val": pairs[:3], "test": pairs[:2]}
    settings = replace(settings, n_steps=20, every=10)
    once = translate.run(splits, settings, "cpu", tmp_path / "once")
    tmp_path.joinpath("twice").mkdir()
    checkpoints = tmp_path / "once/checkpoints"
    kept = tmp_path / "twice/checkpoints/step-00000010"
    kept.parent.mkdir()
    checkpoints.joinpath("step-00000010").rename(kept)
    again = translate.run(splits, settings, "cpu", tmp_path / "twice")
    assert again["train_loss"] == once["train_loss"]


def test_what_is_measured_is_named(translate):
    """The model, its training and its decoding; what a file of data holds, its checksum says."""
    parts = {"attention", "beams", "generation", "models", "multi_head", "tokenizer", "training"}
    assert {f"tfm_ref.{part}" for part in parts} <= {*translate.MODULES}
    assert all(importlib.util.find_spec(name) for name in translate.MODULES)


def test_the_real_settings_are_those_of_the_paper(translate):
    settings = translate.Settings()
    sizes = settings.d_model, settings.n_heads, settings.d_ff, settings.n_layers
    assert sizes == (512, 8, 2048, 6)
    assert (settings.n_averaged, settings.n_beams, settings.length_penalty) == (5, 4, 0.6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_without_the_files_it_says_where_they_are(translate, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["translate.py", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="multi30k/dataset"):
        translate.main()
