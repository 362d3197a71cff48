"""Everybody trains on the same samples, and is evaluated after the same ones."""

import json

import pytest

from decoupled_pp.commands.compare.contenders import STRATEGIES, contenders, with_own_settings
from decoupled_pp.core.errors import UsageError
from decoupled_pp.settings.load import check_settings
from decoupled_pp.settings.run import STAGES_ALONE
from decoupled_pp.training.baselines import BASELINES
from kit import refused


def settings(steps=103, accumulate=1, every=None, **sections):
    raw = {"name": "run", "stages": 3, "model": {"kind": "mlp"}, "data": {"kind": "digits"}}
    raw |= {"training": {"steps": steps, "accumulate": accumulate}, "validation": {"every": every}, **sections}
    return check_settings(raw)


def values(contender):
    return dict(override.split("=", 1) for override in contender.overrides)


def test_every_baseline_can_be_compared():
    assert set(STRATEGIES) == {"decoupled", *BASELINES}


@pytest.mark.parametrize(("accumulate", "micro_batches"), [(1, 4), (2, 4), (1, 1), (3, 9)])
def test_samples_and_evaluations_are_the_same_for_all(accumulate, micro_batches):
    entries = contenders(settings(accumulate=accumulate, every=7), list(STRATEGIES), 2, micro_batches)
    packets = {one.steps * one.accumulate for one in entries}
    assert len(packets) == 1 and 0 <= 103 * accumulate - packets.pop() < micro_batches
    evaluations = {int(values(one)["validation.every"]) * one.accumulate for one in entries}
    assert len(evaluations) == 1


def test_both_paces_of_updates():
    entries = {one.name: one for one in contenders(settings(), ["decoupled", "1f1b", "backprop"], 2, 4)}
    paces = {name: (one.strategy, one.ranks, one.accumulate) for name, one in entries.items()}
    assert paces == {
        "decoupled": ("decoupled", 2, 1),
        "decoupled_per_flush": ("decoupled", 2, 4),
        "1f1b": ("1f1b", 2, 4),
        "backprop": ("backprop", 1, 4),
        "backprop_per_micro_batch": ("backprop", 1, 1),
    }


def test_the_schedule_spans_the_same_samples():
    schedule = {"kind": "steps", "warmup": 8, "milestones": [40, 80]}
    entry = contenders(settings(schedule=schedule), ["1f1b"], 2, 4)[0]
    assert values(entry)["schedule.warmup"] == "2"
    assert values(entry)["schedule.milestones"] == "[10, 20]"


def test_a_cut_for_other_ranks_is_measured_anew():
    assert "cut=time" in contenders(settings(cut=[1, 2, 2]), ["1f1b"], 2, 4)[0].overrides
    assert "cut=time" not in contenders(settings(cut=[1, 2, 2]), ["1f1b"], 3, 4)[0].overrides


@pytest.mark.parametrize(
    ("kinds", "ranks", "micro_batches", "code", "part"),
    [
        (["1f1b", "1f1b"], 2, 4, "strategy-twice", "1f1b, 1f1b"),
        (["1f1b"], 1, 4, "too-few-ranks", "--ranks 1"),
        (["1f1b"], 2, 3, "uneven-flush", "--micro-batches 3"),
        (
            ["1f1b"],
            2,
            40,
            "too-few-flushes",
            "set `training.steps` to at least 200",
        ),
    ],
)
def test_bad_input(kinds, ranks, micro_batches, code, part):
    with refused(code, UsageError, part):
        contenders(settings(accumulate=2), kinds, ranks, micro_batches)


def test_what_only_decoupled_stages_have_is_left_out_for_the_others():
    alone = settings(optimizer={"lr_per_stage": [1, 2, 3]}, validation={"knn": 5})
    for entry in contenders(alone, list(STRATEGIES), 3, 4):
        left_out = {key: json.loads(values(entry)[key]) for key in STAGES_ALONE if key in values(entry)}
        assert left_out == ({} if entry.strategy == "decoupled" else STAGES_ALONE)


def test_settings_of_one_entry_alone():
    entries = contenders(settings(), ["decoupled", "1f1b"], 2, 4)
    given = [("1f1b", "optimizer.lr=0.1"), ("decoupled", "critic.kind=mlp_sr"), ("1f1b", "training.clip_norm=1")]
    found = {one.name: one.own for one in with_own_settings(entries, given)}
    assert found == {
        "decoupled": ("critic.kind=mlp_sr",),
        "decoupled_per_flush": (),
        "1f1b": ("optimizer.lr=0.1", "training.clip_norm=1"),
    }


@pytest.mark.parametrize(
    ("name", "override", "code", "part"),
    [
        ("zbv", "optimizer.lr=0.1", "unknown-entry", "--set-for zbv"),
        ("1f1b", "data.batch_size=8", "shared-setting", "`data.batch_size`"),
        ("1f1b", "seed=3", "shared-setting", "`seed`"),
        ("1f1b", "training.steps=3", "shared-setting", "`training.steps`"),
        ("1f1b", "training={steps: 3}", "shared-setting", "`training`"),
        ("decoupled", "schedule.warmup=3", "shared-setting", "`schedule.warmup`"),
    ],
)
def test_what_no_entry_may_have_to_itself(name, override, code, part):
    with refused(code, UsageError, part):
        with_own_settings(contenders(settings(), ["decoupled", "1f1b"], 2, 4), [(name, override)])
