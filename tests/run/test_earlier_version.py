"""Run folders and checkpoints that an earlier version wrote are evaluated, resumed and exported by this one.

`earlier_version/` was written by version 0.1.0 (commit d1c3156) and is never written anew. Each folder is a whole run
of 20 optimizer steps; `evaluated.json` and `model-at-30.safetensors` are what that version made of it afterwards, by
`dpp evaluate` and by `dpp train --resume --set training.steps=30`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kit import dpp

WRITTEN = Path(__file__).parent / "earlier_version"
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
"""Another processor may add in another order."""

every_run = pytest.mark.parametrize("name", ["label", "cascade"])


@pytest.fixture
def run_folder(tmp_path, monkeypatch, name):
    """A copy of the run folder, where its own settings place it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(WRITTEN / name, tmp_path / name)
    return Path(name)


def assert_equal_weights(file, expected):
    ours, theirs = load_file(file), load_file(expected)
    assert sorted(ours) == sorted(theirs)
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], **CLOSE)


@every_run
def test_resumed_run_ends_with_the_same_weights(run_folder, name):
    assert dpp("train", f"{name}/config.yaml", "--resume", "--set", "training.steps=30") == 0
    assert_equal_weights(run_folder / "model.safetensors", WRITTEN / name / "model-at-30.safetensors")


@every_run
def test_evaluation_gives_the_same_scores(run_folder, name):
    assert dpp("evaluate", name, "--json", "scores.json") == 0
    ours, theirs = (json.loads(Path(f).read_text()) for f in ("scores.json", WRITTEN / name / "evaluated.json"))
    assert ours["costs"] == theirs["costs"]
    for one, other in zip(ours["exits"], theirs["exits"], strict=True):
        assert one["stage"] == other["stage"]
        assert one["knn_accuracy"] is other["knn_accuracy"] is None
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-4)
        assert one["val_accuracy"] == pytest.approx(other["val_accuracy"], abs=0.01)


@every_run
def test_export_gives_the_same_weights(run_folder, name):
    assert dpp("export", name, "-o", "plain.safetensors") == 0
    assert_equal_weights(Path("plain.safetensors"), WRITTEN / name / "model.safetensors")


@every_run
def test_summary_keeps_its_keys(run_folder, name):
    before = json.loads((run_folder / "summary.json").read_text())
    assert dpp("train", f"{name}/config.yaml", "--overwrite") == 0
    now = json.loads((run_folder / "summary.json").read_text())
    assert keys(now) == keys(before)
    lines = [(f / "metrics.jsonl").read_text().splitlines() for f in (run_folder, WRITTEN / name)]
    assert [keys(json.loads(line)) for line in lines[0]] == [keys(json.loads(line)) for line in lines[1]]


def keys(value):
    """The keys of nested dictionaries; of lists, those of every entry."""
    if isinstance(value, dict):
        return {key: keys(item) for key, item in value.items()}
    return [keys(item) for item in value] if isinstance(value, list) else None
