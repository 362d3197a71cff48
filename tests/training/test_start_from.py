"""A run that starts from another's weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoupled_pp.run.folder import SUMMARY_FILE, WEIGHTS_FILE
from kit import dpp

CONFIG = """
name: first
stages: 2
cut: uniform
model: {kind: mlp, width: 16, depth: 2}
data: {kind: digits}
optimizer: {kind: SGD, lr: 0.1}
training: {steps: 3}
logging: {tensorboard: false}
"""


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A configuration and the folder of runs, where `first` is trained."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    assert train(config, folder) == 0
    return config, folder


def train(config, folder, *settings):
    return dpp("train", config, f"--set=runs={folder}", *(f"--set={one}" for one in settings))


@pytest.mark.parametrize("strategy", ["decoupled", "backprop"])
@pytest.mark.parametrize("form", ["folder", "file"])
def test_training_begins_with_those_weights(first, strategy, form):
    config, folder = first
    source = folder / "first" if form == "folder" else folder / "first" / WEIGHTS_FILE
    name = f"{strategy}-{form}"
    still = ("optimizer.lr=1e-30", "training.steps=1", f"strategy={strategy}")
    assert train(config, folder, f"name={name}", f"start_from={source}", *still) == 0
    ours, theirs = (load_file(folder / run / WEIGHTS_FILE) for run in (name, "first"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    scores = [json.loads((folder / run / SUMMARY_FILE).read_text())["final"] for run in (name, "first")]
    assert scores[0]["val_loss"] == scores[1]["val_loss"]


def test_a_finished_run_no_longer_needs_them(first, tmp_path, capsys):
    config, folder = first
    source = tmp_path / "weights.safetensors"
    save_file(load_file(folder / "first" / WEIGHTS_FILE), source)
    assert train(config, folder, "name=orphan", f"start_from={source}") == 0
    source.unlink()
    assert dpp("evaluate", folder / "orphan") == 0
    again = ["train", config, f"--set=runs={folder}", "--set=name=orphan", f"--set=start_from={source}"]
    assert dpp(*again, "--resume", "--set=training.steps=4") == 0
    assert train(config, folder, "name=anew", f"start_from={source}") == 2
    assert "cannot read" in capsys.readouterr().err


def test_another_networks_weights_are_refused(first, capsys):
    config, folder = first
    source = folder / "first"
    assert train(config, folder, "name=other", f"start_from={source}", "model.width=17") == 2
    assert "of shape (16, 64), not (17, 64) (and" in capsys.readouterr().err
    assert not (folder / "other").exists()
