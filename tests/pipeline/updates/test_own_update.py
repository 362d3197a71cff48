"""An update of one's own is one class and one row of the table; its `synchronise` is called once for every step."""

import pytest
import torch
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.pipeline.updates.table import UPDATES
from decoupled_pp.pipeline.updates.update import Update
from kit import assert_equal_states, ignore, merged, states, vector_batches
from ranks import launch, values

B, ACCUMULATE = 4, 2


class Counting(Update):
    """Halves the gradients, as an average over two replicas of which one has none would, and counts."""

    calls = 0

    def synchronise(self):
        self.calls += 1
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(0.5)


@pytest.fixture(autouse=True)
def _own_update(monkeypatch):
    monkeypatch.setitem(UPDATES, "alone", Counting)


def batches():
    return vector_batches(8, B, 3, 2)


def trainer(**options):
    torch.manual_seed(1)
    plan = partition([nn.Linear(3, 5), nn.Linear(5, 2)], 2, "uniform", batches()[0][0], device="cpu")
    defaults = {"accumulate": ACCUMULATE, "observer": ignore, "optimizer": {"kind": "SGD", "lr": 0.2}}
    return Trainer(plan, device="cpu", **(defaults | options))


def train_in_ranks(steps, folder):
    UPDATES["alone"] = Counting
    trained = trainer(checkpoints=folder)
    trained.fit(batches(), steps, resume=True)
    return states(trained), [stage.update.calls for stage in trained.stages]


def test_halved_gradients_are_half_the_learning_rate():
    halved = trainer()
    halved.fit(batches(), 4)
    UPDATES["alone"] = Update
    plain = trainer(optimizer={"kind": "SGD", "lr": 0.1})
    plain.fit(batches(), 4)
    for ours, theirs in zip(halved.stages, plain.stages, strict=True):
        for a, b in zip(ours.trunk.parameters(), theirs.trunk.parameters(), strict=True):
            assert torch.equal(a, b)
    assert [stage.update.calls for stage in halved.stages] == [4, 4]


def test_over_ranks_checkpointed_and_resumed(tmp_path):
    whole = trainer()
    whole.fit(batches(), 4)
    launch(train_in_ranks, 1, tmp_path / "checkpoints", size=2, folder=tmp_path / "before")
    resumed = values(launch(train_in_ranks, 4, tmp_path / "checkpoints", size=2, folder=tmp_path / "after"))
    assert_equal_states(merged(found for found, _ in resumed), states(whole))
    assert [calls for _, calls in resumed] == [[3], [3]]
