"""A stage's meter: pauses are no training time, and periods are of the steady state."""

import math

import pytest
import torch

from decoupled_pp.core.errors import TrainingError
from decoupled_pp.core.reports import Span, SpansRecord
from decoupled_pp.pipeline.meter import StageMeter
from kit import refused


class SetClock:
    """A clock that the test sets."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now

    def seconds(self, marks):
        return list(marks)


class Progress:
    updates, samples, learning_rate = 1, 2, 0.1


@pytest.fixture
def clock():
    return SetClock()


def meter(clock, posted, **options):
    return StageMeter(0, clock, posted.append, every=1000, trace=range(0), **options)


def step(meter, clock, packet, seconds):
    """One training packet that takes so long."""
    meter.begin(packet)
    meter.lap("wait_in")
    clock.now += seconds
    meter.lap("step")
    meter.trained(packet, torch.tensor(1.0), 4)


def pause(meter, clock, seconds, phase="evaluate"):
    clock.now += seconds
    meter.lap(phase)


def test_pauses_do_not_count_in_training_time_and_periods(clock):
    one = meter(clock, [])
    for packet in range(20):
        step(one, clock, packet, 0.5)
        pause(one, clock, 7.0, "save" if packet % 2 else "evaluate")
    one.flush(Progress(), 0)
    assert one.training_seconds() == pytest.approx(10.0)
    assert one.seconds() == pytest.approx(10.0 + 19 * 7.0)  # the last pause comes after the last step
    assert dict(one.step_seconds()) == pytest.approx({"mean": 0.5, "p50": 0.5, "p95": 0.5})
    assert one.samples_per_second() == pytest.approx(8.0)


def test_the_first_tenth_of_the_updates_is_warm_up(clock):
    one = meter(clock, [])
    for packet in range(20):
        step(one, clock, packet, 100.0 if packet < 2 else 1.0)
    one.flush(Progress(), 0)
    assert one.step_seconds().mean == pytest.approx(1.0)


def test_periods_are_of_updates_not_of_packets(clock):
    one = meter(clock, [], updates_every=3)
    for packet in range(30):
        step(one, clock, packet, 1.0)
    one.flush(Progress(), 0)
    assert one.step_seconds().p50 == pytest.approx(3.0)


def test_too_few_updates_have_no_period(clock):
    one = meter(clock, [])
    step(one, clock, 0, 1.0)
    one.flush(Progress(), 0)
    assert one.step_seconds() is None


def test_packets_without_a_loss_are_still_counted(clock):
    posted = []
    one = StageMeter(0, clock, posted.append, every=2, trace=range(0))
    assert not one.trained(0, None, 4)
    assert one.trained(1, None, 4)
    one.flush(Progress(), 3)
    (record,) = posted
    assert record.loss is None and record.packet == 1 and record.queue == 3


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_at_its_packet(clock, loss):
    posted = []
    one = meter(clock, posted)
    one.trained(4, torch.tensor(1.0), 4)
    one.trained(5, torch.tensor(loss), 4)
    with refused("loss-not-finite", TrainingError, f"the loss is {loss} at packet 5"):
        one.flush(Progress(), 0)
    assert not posted


def test_spans_of_traced_packets_are_posted(clock):
    posted = []
    one = StageMeter(0, clock, posted.append, every=1000, trace=range(1, 2))
    for packet in range(3):
        step(one, clock, packet, 0.5)
    one.flush(Progress(), 0)
    assert posted[0] == SpansRecord(stage=0, spans=(Span("wait_in", 0.5, 0.0, 1), Span("step", 0.5, 0.5, 1)))
