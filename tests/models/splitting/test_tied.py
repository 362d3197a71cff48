"""Tied weights: each user has its own; the earlier one is kept in step forward-only, from the checkpoint before."""

import shutil

import pytest
import torch
from torch import nn

import decoupled_pp as dpp
from decoupled_pp.core.errors import UsageError
from decoupled_pp.run.checkpoints.opened import latest_checkpoint, open_checkpoint
from decoupled_pp.run.checkpoints.parts import list_checkpoints
from kit import refused
from ranks import launch, values


def network():
    torch.manual_seed(0)
    embedding, head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
    head.weight = embedding.weight
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)]
    return [embedding, *blocks, head]


def batches(count=8):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 16, (count, 4, 7), generator=generator)
    return [(row[:, :-1], row[:, 1:]) for row in rows]


def trainer(folder, stages=2, **options):
    options = {"refresh_tied": True, "keep_checkpoints": 9, **options}
    plan = dpp.partition(dpp.untie(network()), stages, "uniform", batches(1)[0][0])
    return dpp.Trainer(plan, critic="head", optimizer={"kind": "SGD", "lr": 0.3}, checkpoints=folder, **options)


def weights(one):
    return {f"{stage.index}.{key}": t.clone() for stage in one.stages for key, t in stage.trunk.state_dict().items()}


def train(folder, steps=7, stages=2, save_every=2, **options):
    one = trainer(folder, stages, **options)
    one.fit(batches(), steps, save_every=save_every)
    return weights(one)


def saved(folder, step, key):
    found = torch.empty(16, 8)
    open_checkpoint(folder / f"step-{step:08d}").fill({f"model.{key}": found})
    return found


def test_every_user_of_a_shared_parameter_gets_its_own():
    layers = dpp.untie(network())
    assert dict(layers.tied) == {"3.weight": "0.weight"}
    assert torch.equal(layers[0].weight, layers[3].weight) and layers[0].weight is not layers[3].weight
    assert dict(dpp.untie(layers).tied) == {}


def test_the_earlier_copy_takes_the_later_one_of_the_checkpoint_before(tmp_path):
    train(tmp_path)
    for step in (4, 6):
        assert torch.equal(saved(tmp_path, step, "0.weight"), saved(tmp_path, step - 2, "3.weight"))
    assert not torch.equal(saved(tmp_path, 2, "0.weight"), saved(tmp_path, 2, "3.weight"))
    assert not torch.equal(saved(tmp_path, 7, "0.weight"), saved(tmp_path, 6, "3.weight"))  # the end is no regular one


def test_only_the_earlier_copy_is_touched_and_only_then(tmp_path):
    refreshed, apart = train(tmp_path / "a", steps=4), train(tmp_path / "b", steps=4, refresh_tied=False)
    changed = {key for key in apart if not torch.equal(refreshed[key], apart[key])}
    assert changed == {"0.0.weight"}  # at the very end: what comes after it has not seen it yet


@pytest.mark.parametrize("stages", [1, 4])
def test_any_number_of_stages(tmp_path, stages):
    train(tmp_path, stages=stages)
    assert torch.equal(saved(tmp_path, 6, "0.weight"), saved(tmp_path, 4, "3.weight"))


def _of_ranks(folder):
    return train(folder)


def test_ranks_equal_one_process(tmp_path):
    alone = train(tmp_path / "alone")
    together = {}
    for one in values(launch(_of_ranks, tmp_path / "ranks", size=2, folder=tmp_path / "results")):
        together |= one
    assert alone.keys() == together.keys()
    assert [key for key in alone if not torch.equal(alone[key], together[key])] == []


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_resumed_equals_never_stopped(tmp_path, stop):
    never = train(tmp_path / "never", steps=8)
    train(tmp_path / "stopped", steps=stop)
    again = trainer(tmp_path / "stopped")
    again.fit(batches(), 8, save_every=2, resume=True)
    resumed = weights(again)
    assert [key for key in never if not torch.equal(never[key], resumed[key])] == []


@pytest.mark.parametrize("keep", [1, 2])
def test_the_checkpoint_that_is_taken_from_outlives_others(tmp_path, keep):
    """Three stops between two regular checkpoints would push it out of the newest."""
    never = train(tmp_path / "never", steps=16, save_every=6)
    for stop in (7, 8, 9, 16):
        again = trainer(tmp_path / "stopped", keep_checkpoints=keep)
        again.fit(batches(), stop, save_every=6, resume=True)
    resumed = weights(again)
    assert [key for key in never if not torch.equal(never[key], resumed[key])] == []
    steps = [int(path.name.removeprefix("step-")) for path in list_checkpoints(tmp_path / "stopped")]
    assert steps == [12, 16]


def test_a_checkpoint_that_is_gone_is_missed_before_training(tmp_path):
    train(tmp_path, steps=5)
    shutil.rmtree(tmp_path / "step-00000004")
    with refused("checkpoint-to-refresh-from-gone", UsageError, "step-00000004 next, which is gone"):
        trainer(tmp_path).fit(batches(), 9, save_every=2, resume=True)
    assert latest_checkpoint(tmp_path).step == 5 and len(list_checkpoints(tmp_path)) == 2


def test_what_cannot_be_is_refused(tmp_path):
    with refused("refresh-needs-checkpoints", UsageError, "`save_every`"):
        trainer(tmp_path).fit(batches(), 2)
    with refused("no-checkpoint-folder", UsageError, "give checkpoints=FOLDER"):
        trainer(None)
    plan = dpp.partition([nn.Linear(8, 8), nn.Linear(8, 4)], 2, "uniform", torch.randn(2, 8))
    with refused("nothing-to-refresh"):
        dpp.Trainer(plan, refresh_tied=True, checkpoints=tmp_path)
    with refused("tensor-shared-by-stages", UsageError, "dpp.untie"):
        dpp.partition(network(), 2, "uniform", batches(1)[0][0])
