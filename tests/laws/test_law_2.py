"""Law 2: N stages in one process == N processes over gloo; every parameter, buffer, critic and optimizer state."""

import pytest
import torch
from cases import CASES, LABEL_CRITICS, train
from torch import nn

from decoupled_pp import Trainer, partition
from kit import differences, ignore, merged, states
from ranks import launch, values


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("case", ["gpt with dropout", "resnet"])
def test_ranks_equal_one_process(case, stages, tmp_path):
    options = {"accumulate": 2, "clip_norm": 0.5, "capacity": 2}
    together = train(case, stages, 6, **options)

    apart = merged(values(launch(_train, case, stages, options, size=stages, folder=tmp_path)))

    assert differences(together, apart) == []
    assert set(apart) == set(range(stages))


@pytest.mark.parametrize(
    "options",
    [
        {"critic_target": {"kind": "cascade", "lag": 4}},
        {"global_correction": {"every": 1}},
        {"critic": "sgr"},
        {"critic_target": "delayed"},
    ],
    ids=["cascade", "global_correction", "sgr", "delayed"],
)
def test_ranks_equal_one_process_whatever_counts(options, tmp_path):
    """Another number of targets in every packet, none in some."""
    case = "gpt with padding" if "critic" not in options else "mlp with gaps"
    options = {"accumulate": 3, "clip_norm": 0.5, "capacity": 2, **options}
    together = train(case, 2, 6, **options)
    apart = merged(values(launch(_train, case, 2, options, size=2, folder=tmp_path)))
    assert differences(together, apart) == []


@pytest.mark.parametrize("kind", ["infopro", "sgr", "vocabulary"])
def test_ranks_equal_one_process_whatever_rides_along_or_is_drawn(kind, tmp_path):
    """The image, a delta, random tokens and classes."""
    case, critic = LABEL_CRITICS[kind]
    options = {"critic": {"kind": kind, **critic}}
    together = train(case, 3, 6, **options)
    apart = merged(values(launch(_train, case, 3, options, size=3, folder=tmp_path)))
    assert differences(together, apart) == []


def test_ranks_equal_one_process_whatever_the_strides(tmp_path):
    """A batch norm sums a channels-last tensor in another order than a contiguous one."""
    together = _train_channels_last()
    apart = merged(values(launch(_train_channels_last, size=2, folder=tmp_path)))
    assert differences(together, apart) == []


def _train_channels_last():
    torch.manual_seed(4)
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(512, 5))
    batches = [
        (inputs.contiguous(memory_format=torch.channels_last), target) for inputs, target in CASES["resnet"].batches(4)
    ]
    plan = partition([first.to(memory_format=torch.channels_last), second], 2, [1, 1], batches[0][0])
    trainer = Trainer(plan, device="cpu", observer=ignore)
    trainer.fit(batches, 6)
    return states(trainer)


def _train(case, stages, options):
    return train(case, stages, 6, **options)
