"""The public Trainer: what it refuses, in one line each."""

import shutil
from functools import partial

import pytest
import torch
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import UsageError
from decoupled_pp.settings.run import ScheduleSettings
from kit import differences, ignore, refused, states, vector_batches
from ranks import launch, values

BATCHES = vector_batches(count=1, size=4, width=3, classes=2)


def trainer(**options):
    plan = partition([nn.Linear(3, 5), nn.Linear(5, 2)], 2, "uniform", BATCHES[0][0], device="cpu")
    return Trainer(plan, **{"device": "cpu", "observer": ignore} | options)


@pytest.mark.parametrize("name", ["capacity", "accumulate", "log_every", "keep_checkpoints"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_counts_of_a_trainer_are_whole_numbers_above_0(name, value):
    with refused("unusable-value", UsageError, f"`{name}`: ", f"not {value!r}"):
        trainer(**{name: value})


@pytest.mark.parametrize("name", ["clip_norm", "timeout_seconds"])
@pytest.mark.parametrize("value", [0, -1.5, float("nan")])
def test_bounds_of_a_trainer_are_above_0(name, value):
    with refused("unusable-value", UsageError, f"`{name}`: ", f"not {value!r}"):
        trainer(**{name: value})


@pytest.mark.parametrize("name", ["steps", "validate_every", "validation_batches", "save_every"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True])
def test_counts_of_fit_are_whole_numbers_above_0(name, value, tmp_path):
    one = trainer(checkpoints=tmp_path / "checkpoints")
    with refused("unusable-value", UsageError, f"`{name}`: ", f"not {value!r}"):
        one.fit(BATCHES, **{"steps": 2, "validate": BATCHES, name: value})
    assert one.stages == ()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["tpu", "cuda:1", ""])
def test_a_device_is_one_that_is_known(device):
    with refused("not-one-of-the-choices", UsageError, "`device`", repr(device)):
        trainer(device=device)


def modes(network, critic=None):
    """Which modules train, after two steps and an evaluation."""
    plan = partition(network, 2, "uniform", BATCHES[0][0], device="cpu")
    trainer = Trainer(plan, critic=critic or nn.Linear(5, 2), device="cpu", observer=ignore)
    trainer.fit(BATCHES, 2, validate=BATCHES, validate_every=1)
    return [part.training for layer in (*network, trainer.stages[0].critic) for part in layer.modules()]


def test_what_the_user_froze_stays_frozen():
    frozen = nn.BatchNorm1d(5).eval()
    assert modes([nn.Linear(3, 5), frozen, nn.Linear(5, 5), nn.Linear(5, 2)]) == [True, False, True, True, True]
    assert torch.equal(frozen.running_mean, torch.zeros(5))
    critic = nn.Sequential(nn.BatchNorm1d(5).eval(), nn.Linear(5, 2))
    assert modes([nn.Linear(3, 5), nn.Linear(5, 2)], critic) == [True, True, True, False, True]


def test_a_network_in_evaluation_mode_as_a_whole_is_trained():
    network, critic = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), nn.Linear(5, 2)
    assert all(modes(network.eval(), critic.eval()))


def numbered(read):
    """Endless batches; notes how many were read."""
    while True:
        read.append(len(read))
        yield BATCHES[0]


def test_a_second_fit_reads_an_iterator_on_and_a_resumed_one_from_its_beginning(tmp_path):
    read, one = [], trainer(accumulate=2, checkpoints=tmp_path)
    batches = numbered(read)
    one.fit(batches, 3)
    one.fit(batches, 2)
    assert len(read) == 10
    resumed, read_again = trainer(accumulate=2, checkpoints=tmp_path), []
    resumed.fit(numbered(read_again), 6, resume=True)
    assert len(read_again) == 12


def test_every_stage_has_its_own_rate():
    """Lr x factor, also under a schedule."""
    optimizer = {"kind": "SGD", "lr": 0.1, "lr_per_stage": [0.5, 3]}
    one = trainer(optimizer=optimizer, schedule=ScheduleSettings(kind="linear", final=0.5))
    one.fit(BATCHES, 4)
    assert [stage.learning_rate for stage in one.stages] == pytest.approx([0.025, 0.15])


def test_a_rate_of_0_freezes_a_stage():
    """It computes forward only; the others learn."""
    one = trainer(optimizer={"kind": "SGD", "lr": 0.1, "lr_per_stage": [0, 1]})
    one.build()
    before = [[p.clone() for p in (*stage.trunk.parameters(), *_of(stage.critic))] for stage in one.stages]
    report = one.fit(BATCHES, 4)
    after = [[*stage.trunk.parameters(), *_of(stage.critic)] for stage in one.stages]
    assert all(map(torch.equal, before[0], after[0])) and not any(map(torch.equal, before[1], after[1]))
    assert report.per_stage[0]["saved_activation_bytes_peak"] == 0
    assert all(p.grad is None for p in after[0])


def test_a_frozen_stage_keeps_its_statistics():
    layers = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)]
    plan = partition(layers, 2, "uniform", torch.randn(8, 4))
    one = Trainer(plan, optimizer={"kind": "SGD", "lr": 0.1, "lr_per_stage": [0, 1]}, device="cpu")
    batch = (torch.randn(8, 4) + 3, torch.randint(0, 2, (8,)))
    one.fit([batch], 3, validate=[batch], validate_every=1)
    assert torch.equal(layers[0][1].running_mean, torch.zeros(4))


def _of(critic):
    return critic.parameters() if critic is not None else ()


def test_rates_for_other_stages_are_refused():
    with refused("one-rate-per-stage"):
        trainer(optimizer={"kind": "SGD", "lr_per_stage": [1, 1, 1]})


def three_layers(stages, seed, folder):
    torch.manual_seed(seed)
    layers = [nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)]
    plan = partition(layers, stages, "uniform", BATCHES[0][0], device="cpu")
    return Trainer(plan, critic="head", checkpoints=folder, device="cpu", observer=ignore)


def evaluated(stages, folder):
    """Scores of the checkpoint by a trainer with other weights, and the weights that it exports then."""
    fresh = three_layers(stages, 1, folder)
    scores = fresh.evaluate(BATCHES, resume=True)
    return [one.val_loss for one in scores], fresh.export().state_dict()


@pytest.fixture
def finished(tmp_path):
    one = three_layers(2, 0, tmp_path)
    one.fit(BATCHES, 5)
    return [exit.val_loss for exit in one.evaluate(BATCHES)], one.export().state_dict()


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_checkpoint_is_evaluated_and_exported_without_training_on(stages, finished, tmp_path):
    scores, weights = evaluated(stages, tmp_path)
    assert scores[-1] == finished[0][-1] and (stages != 2 or scores == finished[0])
    assert differences(weights, finished[1]) == []


def test_ranks_evaluate_and_export_a_checkpoint_too(finished, tmp_path):
    for scores, weights in values(launch(evaluated, 2, tmp_path, size=2, folder=tmp_path / "ranks")):
        assert scores == finished[0]
        assert differences(weights, finished[1]) == []


def test_training_goes_on_from_an_evaluated_checkpoint(finished, tmp_path):
    went_on, resumed = three_layers(2, 1, tmp_path), three_layers(2, 2, tmp_path / "copy")
    shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("copy"))
    went_on.evaluate(BATCHES, resume=True)
    went_on.fit(BATCHES, 3)
    resumed.fit(BATCHES, 8, resume=True)
    assert differences(states(went_on), states(resumed)) == []


def test_a_folder_without_a_checkpoint_has_nothing_to_evaluate(tmp_path):
    with refused("no-checkpoint"):
        three_layers(2, 0, tmp_path).evaluate(BATCHES, resume=True)
    with refused("no-checkpoint-folder"):
        trainer().evaluate(BATCHES, resume=True)
    for resumed in (trainer().evaluate, partial(trainer().fit, steps=1)):
        with refused("no-checkpoint-folder", UsageError, "resume='somewhere'"):
            resumed(BATCHES, resume="somewhere")
