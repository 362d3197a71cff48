"""Schedules that need more than the step: those that follow a held-out loss, and the user's own."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from decoupled_pp import Critic, Trainer, partition
from decoupled_pp.core.errors import UsageError
from decoupled_pp.pipeline.schedules import Plateau
from decoupled_pp.run.checkpoints.opened import latest_checkpoint
from decoupled_pp.settings.run import ScheduleSettings
from kit import differences, ignore, refused, states, tanh_network, vector_batches

LOSSES = [1.0, 0.8, 0.8, 0.9, 0.7, 0.7, 0.7, 0.7, 0.71, 0.69999, 0.7, 0.5]
BATCHES = vector_batches(5, 4, 6, 3)
SGD = {"kind": "SGD", "lr": 0.5}


@pytest.mark.parametrize("settings", [{}, {"patience": 0}, {"patience": 1, "factor": 0.5, "final": 0.3}])
def test_a_plateau_is_torchs(settings):
    choice = ScheduleSettings(kind="plateau", **settings)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=choice.factor, patience=choice.patience, min_lr=choice.final, eps=0
    )
    ours = Plateau(choice)
    for step, loss in enumerate(LOSSES, start=1):
        ours.hear(loss, step)
        theirs.step(loss)
        assert ours.scale == pytest.approx(optimizer.param_groups[0]["lr"])


def trainer(stages=2, **options):
    plan = partition(tanh_network(3, 6, 3), stages, "uniform", BATCHES[0][0])
    return Trainer(plan, **({"critic": "head", "optimizer": SGD, "device": "cpu", "observer": ignore} | options))


PLATEAU = {"kind": "plateau", "patience": 0, "factor": 0.5, "warmup": 2}
HELD = {"validate": BATCHES[:2], "validate_every": 2}


def rates(trained):
    return [stage.learning_rate for stage in trained.stages]


def test_every_stage_follows_its_own_exit():
    records = []
    trained = trainer(schedule=PLATEAU, observer=records.extend, optimizer={"kind": "SGD", "lr": 4.0})
    trained.fit(BATCHES, 12, **HELD)
    for stage in trained.stages:
        heard = Plateau(ScheduleSettings(**PLATEAU))
        losses = [r for r in records if r["kind"] == "validation" and r["stage"] == stage.index]
        for record in losses:
            heard.hear(record["loss"], record["step"])
        assert stage.learning_rate == 4.0 * heard.scale
    assert min(rates(trained)) < 4.0


def test_a_plateau_goes_on_after_a_stop(tmp_path):
    options = {"schedule": PLATEAU, "optimizer": {"kind": "SGD", "lr": 4.0}}
    whole, stopped, resumed = (trainer(**options, checkpoints=folder) for folder in (None, tmp_path, tmp_path))
    whole.fit(BATCHES, 12, **HELD)
    stopped.fit(BATCHES, 7, **HELD)
    resumed.fit(BATCHES, 12, resume=latest_checkpoint(tmp_path), **HELD)
    assert differences(states(resumed), states(whole)) == []
    assert rates(resumed) == rates(whole)


def test_an_evaluation_beside_training_lowers_no_rate():
    trained = trainer(schedule=PLATEAU)
    trained.fit(BATCHES, 4, **HELD)
    before = rates(trained)
    for _ in range(3):
        trained.evaluate(BATCHES[2:])
    assert rates(trained) == before


@pytest.mark.parametrize("given", [{}, {"validate": BATCHES}])
def test_a_plateau_that_would_hear_nothing_is_refused(given):
    with refused("plateau-without-validation"):
        trainer(schedule="plateau").fit(BATCHES, 2, **given)


class Silent(Critic):
    """Has an objective and no logits."""

    exits = False

    def forward(self, hidden):
        raise AssertionError

    def objective(self, view, loss):
        return view.hidden.square().mean()


def test_a_critic_without_a_loss_of_its_own_has_no_plateau():
    with refused("plateau-without-validation"):
        trainer(schedule="plateau", critic=lambda _: Silent()).fit(BATCHES, 2, **HELD)


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, 10)


def chained(optimizer):
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.ExponentialLR(optimizer, 0.9)], [3])


@pytest.mark.parametrize("schedule", [cosine, chained])
def test_a_schedule_of_torch_is_torchs(schedule):
    """One stage in two fits is plain PyTorch."""
    ours = trainer(1, schedule=schedule)
    theirs = tanh_network(3, 6, 3)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.5, fused=True)
    moving = schedule(optimizer)
    for number in range(8):
        inputs, target = BATCHES[number % len(BATCHES)]
        cross_entropy(theirs(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        moving.step()
    ours.fit(BATCHES, 3)
    ours.fit(BATCHES, 5)
    assert differences(dict(ours.plan.module.state_dict()), dict(theirs.state_dict())) == []


@pytest.mark.parametrize("schedule", [cosine, chained])
def test_a_schedule_of_torch_goes_on_after_a_stop(schedule, tmp_path):
    whole, stopped, resumed = (trainer(schedule=schedule, checkpoints=folder) for folder in (None, tmp_path, tmp_path))
    whole.fit(BATCHES, 9)
    stopped.fit(BATCHES, 4)
    resumed.fit(BATCHES, 9, resume=True)
    assert differences(states(resumed), states(whole)) == []


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: lr_scheduler.StepLR(optimizer, step="every other"),
        lambda optimizer: 3,
        lr_scheduler.ReduceLROnPlateau,
        lambda optimizer: cosine(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1)),
    ],
)
def test_a_function_that_makes_no_schedule_is_refused(schedule):
    with refused("schedule-factory-unfit"):
        trainer(schedule=schedule).fit(BATCHES, 2)


def test_a_class_that_needs_more_than_an_optimizer_is_refused_at_once():
    with refused("not-callable", UsageError, "ExponentialLR", "gamma"):
        trainer(schedule=lr_scheduler.ExponentialLR)


@pytest.mark.parametrize("schedule", ["cosin", {"kind": "cosine", "wramup": 3}, {"kind": "steps"}])
def test_a_schedule_in_a_script_is_checked_as_in_a_file(schedule):
    with pytest.raises(UsageError, match="schedule"):
        trainer(schedule=schedule)
