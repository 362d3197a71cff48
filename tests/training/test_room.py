"""Cuts that fit the memory of the devices, and devices of different speed."""

import math
import random
import shutil
from itertools import pairwise

import pytest
import torch
from torch import nn

import decoupled_pp as dpp
from decoupled_pp.models.cutting import minmax_cut
from kit import refused, run_dpp

CONFIG = "configs/small/digits.yaml"
SAMPLE = torch.randn(4, 16)
KIB = 1024


def layers():
    """Six layers: the first two wide, so that a cut by time and one by memory differ."""
    wide = [nn.Sequential(nn.Linear(16, 512), nn.Linear(512, 16)) for _ in range(2)]
    return [*wide, *(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 3)]


def all_cuts(count, stages):
    def grow(boundaries):
        if len(boundaries) == stages:
            yield (*boundaries, count)
            return
        for end in range(boundaries[-1] + 1, count - (stages - len(boundaries)) + 1):
            yield from grow((*boundaries, end))

    yield from grow((0,))


def test_uneven_devices_get_the_best_cut_there_is():
    """Law 10, with speeds and with stages that do not fit."""
    draw = random.Random(0)
    for _ in range(200):
        count, stages = draw.randint(3, 8), draw.randint(1, 3)
        costs, speeds = [draw.random() for _ in range(count)], [draw.uniform(0.3, 2) for _ in range(stages)]
        room = [draw.randint(1, count) for _ in range(stages)]

        def fits(stage, first, end, room=room):
            return end - first <= room[stage]

        def worst(cut, costs=costs, speeds=speeds, fits=fits):
            spans = list(enumerate(pairwise(cut)))
            return max(sum(costs[a:b]) / speeds[k] if fits(k, a, b) else math.inf for k, (a, b) in spans)

        least = min(map(worst, all_cuts(count, stages)))
        if math.isinf(least):
            with refused("no-cut-fits-memory"):
                minmax_cut(costs, stages, None, speeds=speeds, fits=fits)
        else:
            assert worst(minmax_cut(costs, stages, None, speeds=speeds, fits=fits)) == pytest.approx(least)


def test_a_slow_device_gets_less():
    even = dpp.partition([nn.Linear(8, 8) for _ in range(12)], 3, "parameters", torch.randn(2, 8), critic=None)
    slow = dpp.partition(
        [nn.Linear(8, 8) for _ in range(12)], 3, "parameters", torch.randn(2, 8), critic=None, speeds=[1, 0.5, 1]
    )
    assert even.sizes == (4, 4, 4)
    assert slow.sizes[1] < 4


@pytest.mark.parametrize("by", ["parameters", "time"])
def test_no_stage_needs_more_than_its_device_has(by):
    """Two wide layers would be one stage; with room for one of them they are not."""
    plan = dpp.partition(layers(), 3, by, SAMPLE, memory="400KiB", optimizer="AdamW", device="cpu")
    assert plan.boundaries[1] == 1
    free = dpp.partition(layers(), 3, by, SAMPLE, memory="1GiB", device="cpu")
    assert free.boundaries == dpp.partition(layers(), 3, [*free.sizes], SAMPLE).boundaries


def test_what_does_not_fit_is_refused():
    with refused("no-cut-fits-memory", dpp.UsageError, "3 stages"):
        dpp.partition(layers(), 3, "parameters", SAMPLE, memory="100KiB")
    with refused("stage-exceeds-memory", dpp.UsageError, "stage 0 needs 0."):
        dpp.partition(layers(), 2, [3, 3], SAMPLE, memory="400KiB")


@pytest.mark.parametrize(
    ("given", "code", "part"),
    [
        ({"memory": "many"}, "unusable-value", "`memory`: 'many' is no size"),
        ({"memory": ["1GiB"]}, "one-memory-per-stage", "`memory` has 1 sizes for 2 stages"),
        ({"memory": 0}, "unusable-value", "`memory` 0 must be above 0"),
        ({"speeds": [1]}, "bad-speeds", "`speeds` has 1 numbers for 2 stages"),
        ({"speeds": [1, 0]}, "unusable-value", "`speeds`"),
        ({"speeds": [1, 0.5], "by": "uniform"}, "bad-speeds", "`speeds` has no effect with `cut` uniform"),
        ({"speeds": [1, 0.5], "by": [5, 1]}, "bad-speeds", "`speeds` has no effect with `cut` [5, 1]"),
        ({"memory": "1GiB", "sample": None, "critic": None}, "plan-without-sample", "`memory` needs a sample"),
    ],
)
def test_bad_devices_are_named(given, code, part):
    arguments = {"sample": SAMPLE, "by": "parameters"} | given
    with refused(code, dpp.UsageError, part):
        dpp.partition(layers(), 2, **arguments)


def test_a_settings_file_says_it():
    """The slow device gets fewer layers."""
    from decoupled_pp.settings.load import load_settings
    from decoupled_pp.training.prepare import prepare

    overrides = ("stages=2", "cut=parameters", "critic={kind: head}")
    even = prepare(load_settings(CONFIG, overrides))[2].sizes
    slow = prepare(load_settings(CONFIG, (*overrides, "balance.speeds=[0.2, 1]")))[2].sizes
    assert slow[0] < even[0]
    with refused("no-cut-fits-memory"):
        prepare(load_settings(CONFIG, (*overrides, "balance.memory=1KiB")))


def test_a_run_that_was_cut_by_speeds_is_scored_resumed_and_trained_from_its_own_settings(tmp_path):
    given = ["--set=stages=2", "--set=cut=parameters", "--set=critic={kind: head}", f"--set=runs={tmp_path}"]
    short = ["--set=training.steps=2", "--set=schedule.warmup=0", "--set=validation.every=null"]
    assert run_dpp("train", CONFIG, *given, *short, "--set=balance.speeds=[0.2, 1]") == 0
    folder = tmp_path / "digits"
    assert run_dpp("evaluate", folder) == 0
    shutil.copy(folder / "config.yaml", tmp_path / "again.yaml")
    for way, last in (("--resume", 3), ("--overwrite", 2)):
        assert run_dpp("train", tmp_path / "again.yaml", way, f"--set=training.steps={last}") == 0
