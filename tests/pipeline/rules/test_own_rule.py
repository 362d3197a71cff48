"""A rule of one's own is one class and one row of the table: over ranks, checkpointed, resumed, floats flowing back."""

import pytest
import torch

from decoupled_pp import Trainer, partition
from decoupled_pp.core.channels import Returns
from decoupled_pp.core.errors import UsageError
from decoupled_pp.pipeline.rules.local import Local
from decoupled_pp.pipeline.rules.table import RULES
from kit import assert_equal_states, ignore, merged, refused, states, tanh_network, vector_batches
from ranks import launch, values

B, WIDTH, CLASSES, STEPS = 4, 6, 3, 8


class Damped(Local):
    """Scales the loss by a running mean of the loss that the next stage had for the packet before."""

    returns = Returns(per_sample=True)

    def __init__(self, parts, settings):
        super().__init__(parts, settings)
        self.mean = torch.ones(())
        self.due = None

    def step(self, packet, ends, lap):
        self.settle(ends)
        done = super().step(packet, ends, lap)
        if not self.parts.is_first:
            ends.inlet.give_back(packet.number, [done.loss.expand(packet.samples)])
        if not self.parts.is_last:
            self.due = packet.number  # in one process, the next stage has its turn after this step
        return done

    def settle(self, ends):
        if self.due is not None:
            (losses,) = ends.outlet.returned(self.due)
            self.mean = 0.5 * self.mean + 0.5 * losses.mean()
            self.due = None

    def judge(self, view):
        return super().judge(view) / (1 + self.mean)

    def state(self):
        return {"mean": self.mean}

    def load(self, state):
        self.mean = state.get("mean", self.mean)


@pytest.fixture(autouse=True)
def _own_rule(monkeypatch):
    monkeypatch.setitem(RULES, "damped", Damped)


def batches(count):
    return vector_batches(count, B, WIDTH, CLASSES)


def trainer(target="damped", **options):
    plan = partition(tanh_network(2, WIDTH, CLASSES), 3, "uniform", batches(1)[0][0], device="cpu")
    return Trainer(plan, device="cpu", critic_target=target, observer=ignore, **options)


def train_in_ranks(steps, folder):
    RULES["damped"] = Damped
    trained = trainer(checkpoints=folder)
    report = trained.fit(batches(STEPS), steps, resume=True)
    return states(trained), report.links[0]["payload_bytes_backward"]


def test_an_option_that_its_section_does_not_declare_is_refused():
    with refused("unknown-setting", UsageError, "`critic_target.rate`"):
        trainer({"kind": "damped", "rate": 0.5})


def test_it_changes_what_is_learnt():
    ours, labels = trainer(), trainer("label")
    for one in (ours, labels):
        one.fit(batches(STEPS), STEPS)
    with pytest.raises(AssertionError):
        assert_equal_states(states(ours), states(labels))


def test_ranks_that_stop_and_resume_equal_one_process_that_never_stopped(tmp_path):
    never_stopped = trainer()
    report = never_stopped.fit(batches(STEPS), STEPS)
    launch(train_in_ranks, 5, tmp_path / "checkpoints", size=3, folder=tmp_path / "before")
    resumed = values(launch(train_in_ranks, STEPS, tmp_path / "checkpoints", size=3, folder=tmp_path / "after"))
    assert_equal_states(merged(found for found, _ in resumed), states(never_stopped))
    assert report.links[0]["payload_bytes_backward"] == STEPS * B * 4
    assert resumed[0][1] == (STEPS - 5) * B * 4
