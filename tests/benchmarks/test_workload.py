"""Uneven durations: what is asked for on average, and the same draws for every strategy and for a rank alone."""

import statistics
from collections import Counter

import pytest
import torch

from benchmarks import emulated
from benchmarks.contenders import build_contender
from benchmarks.emulated import EmulatedLayer
from benchmarks.schedule import STRATEGIES
from benchmarks.workload import Durations, Unevenness, Workload
from decoupled_pp.links import join_world
from ranks import PATIENCE, launch

FORWARD, BACKWARD, PACKETS, M = 0.010, 0.020, 16, 4
SLOW = Unevenness(slow_stage=1, slow_factor=1.5, slow_share=0.33)
EXPONENTIAL = Unevenness(jitter="exponential")


def draws(unevenness, rank, count=4000):
    durations = Durations(unevenness, rank)
    return [durations.factors(number) for number in range(count)]


def test_one_stage_is_slower_at_random_moments():
    assert set(draws(SLOW, 0)) == {(1.0, 1.0)}
    slow = draws(SLOW, 1)
    assert set(slow) == {(1.0, 1.0), (1.5, 1.5)}
    assert statistics.mean(forward for forward, _ in slow) == pytest.approx(SLOW.slowest_mean, rel=0.02)


def test_exponential_jitter_keeps_the_mean_and_has_its_spread():
    for column in zip(*draws(EXPONENTIAL, 0), strict=True):
        assert statistics.mean(column) == pytest.approx(1.0, rel=0.05)
        assert statistics.stdev(column) == pytest.approx(1.0, rel=0.08)
    assert EXPONENTIAL.slowest_mean == 1.0


def test_ranks_repeats_and_micro_batches_differ_and_come_back():
    durations = Durations(EXPONENTIAL, 0)
    first = durations.factors(0)
    assert first not in (durations.factors(1), Durations(EXPONENTIAL, 1).factors(0))
    durations.repeat = 1
    assert first != durations.factors(0)
    durations.repeat = 0
    assert first == durations.factors(0)


def test_a_layer_sleeps_what_is_drawn(monkeypatch):
    slept = []
    monkeypatch.setattr(emulated.time, "sleep", slept.append)
    durations = Durations(EXPONENTIAL, 0)
    layer = EmulatedLayer(3, FORWARD, BACKWARD, durations)
    durations.restart(1)
    for number in (-1, 0, 1):
        slept.clear()
        layer(torch.ones(2, 3)).sum().backward()
        forward, backward = durations.factors(number)
        assert sum(slept) == pytest.approx(FORWARD * forward + BACKWARD * backward)


def _draws_of(kinds):
    world, taken = join_world(PATIENCE), Counter()
    durations = Durations(EXPONENTIAL, world.rank)
    factors = durations.factors

    def counted(number):
        taken[number] += 1
        return tuple(0.01 * factor for factor in factors(number))  # a hundred times faster

    durations.factors = counted
    found = {}
    for kind in kinds:
        work = Workload(world.size, FORWARD, BACKWARD, 4, PACKETS, M, PACKETS // M, 4, EXPONENTIAL)
        one = build_contender(kind, world, work, durations)
        for measured in (one.alone, one.period):
            taken.clear()
            measured()
            found[f"{kind} {measured.__name__}"] = sorted(n for n in taken.elements() if n >= 0)
    return found


def test_every_strategy_is_measured_on_the_same_micro_batches(tmp_path):
    """Each draw once per stage of a rank."""
    for result in launch(_draws_of, STRATEGIES, size=2, folder=tmp_path):
        assert len(result.value) == 2 * len(STRATEGIES)
        for name, numbers in result.value.items():
            per_rank = 1 if name.split()[0] in ("decoupled", "gpipe", "1f1b", "deepspeed") else 2
            assert numbers == sorted(list(range(PACKETS)) * per_rank), name


def test_a_table_says_what_was_uneven():
    assert str(Unevenness()) == ""
    assert str(SLOW) == "stage 1 takes 1.5 times as long for 0.33 of the micro-batches, at random"
    assert str(EXPONENTIAL) == "every duration is drawn, exponential about its mean"
