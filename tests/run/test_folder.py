"""Weights, data information and summaries of a run folder: read back, or refused with the fault named."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import decoupled_pp as dpp
from decoupled_pp.core.errors import UsageError
from decoupled_pp.run import folder
from decoupled_pp.run.checkpoints.weights import export_safetensors
from decoupled_pp.run.in_progress import JOB_FILE, RunLock
from kit import refused


def test_a_run_without_checkpoint_is_not_resumed(tmp_path):
    (tmp_path / JOB_FILE).write_text("a job")
    with refused("nothing-to-resume"):
        folder.check(tmp_path, resume=True, overwrite=False)


def test_weights_come_back(tmp_path):
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    save_file(one.state_dict(), tmp_path / folder.WEIGHTS_FILE)
    folder.load_weights(tmp_path, other)
    assert torch.equal(one.weight, other.weight)


class TwoNames(nn.Module):
    """A layer that runs twice, under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.out = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.again = self.first

    def forward(self, x):
        return self.out(self.again(self.middle(self.first(x))))


def test_weights_of_a_split_model_are_under_its_own_names(tmp_path):
    """In the file, for the model itself; and they come back into layers."""
    x = torch.randn(4, 3)
    model, other = TwoNames(), TwoNames()
    layers, fresh = (dpp.split_traced(one, x, ["middle"]).layers for one in (model, other))
    export_safetensors(layers, tmp_path / folder.WEIGHTS_FILE)
    TwoNames().load_state_dict(load_file(tmp_path / folder.WEIGHTS_FILE))
    folder.load_weights(tmp_path, fresh)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize(
    ("tensors", "part"),
    [
        ({"weight": torch.zeros(2, 3)}, "lacks bias"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "scale": torch.zeros(1)}, "has scale"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(3)}, "(2, 4), not (2, 3) (and 1 more)"),
    ],
)
def test_weights_of_another_network(tmp_path, tensors, part):
    save_file(tensors, tmp_path / "other.safetensors")
    with refused("weights-of-another-network", UsageError, part) as caught:
        folder.load_weights(tmp_path / "other.safetensors", nn.Linear(3, 2))
    assert caught.value.key == "start_from"


def test_weights_that_are_none(tmp_path):
    (tmp_path / "notes.txt").write_text("no weights")
    with refused("weights-not-readable"):
        folder.load_weights(tmp_path / "notes.txt", nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("file", "read", "code"),
    [
        (folder.INFO_FILE, folder.read_info, "data-info-damaged"),
        (folder.SUMMARY_FILE, folder.read_summary, "summary-damaged"),
    ],
)
@pytest.mark.parametrize("text", ["{}", "half a f"])
def test_damaged_files_are_named(tmp_path, file, read, code, text):
    (tmp_path / file).write_text(text)
    with refused(code, UsageError, file):
        read(tmp_path)


@pytest.mark.parametrize("options", [{"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}])
@pytest.mark.parametrize("name", ["model.safetensors", "metrics.jsonl", ".lock", "checkpoints", "tensorboard"])
def test_what_stands_in_the_place_of_something_of_a_run_is_refused_and_kept(name, options, tmp_path):
    (tmp_path / JOB_FILE).write_text("a job")
    (tmp_path / "config.yaml").write_text("name: x")
    if name in ("checkpoints", "tensorboard"):
        (tmp_path / name).write_text("mine")
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with refused("run-folder-out-of-place", UsageError, name):
        folder.take(RunLock(tmp_path), **options)
    assert sorted(tmp_path.rglob("*")) == before
