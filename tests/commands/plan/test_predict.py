"""Predictions against closed forms: the textbook bubble, slowest stage, activations in flight, bytes on the links."""

import itertools
import math

import pytest

from decoupled_pp.commands.plan.costs import Piece, Profile, StageCosts, read_profile, seconds_of
from decoupled_pp.commands.plan.orders import PIPELINES, SPLIT, Operation, stages_per_rank
from decoupled_pp.commands.plan.predict import STRATEGIES, Setting, exposed_all_reduce, predict, predict_stages
from decoupled_pp.commands.plan.simulate import Link
from decoupled_pp.core.errors import UsageError
from decoupled_pp.models.cutting.cut import minmax_cut
from kit import refused

F, B = 1.0, 2.0
SIZES = [(1, 1), (1, 3), (2, 2), (2, 8), (4, 4), (4, 8), (8, 8), (8, 16)]


def _stages(strategy, ranks, *, saved=1, output=8, critic=0.0, step=0.0, forward=F, backward=B):
    parts = stages_per_rank(strategy)
    one = StageCosts(
        forward / parts, backward / 2 / parts, backward / 2 / parts, step, 10, saved, output, output, critic, 0
    )
    return [one] * (ranks * parts)


def _predict(strategy, ranks, micro_batches, link=None, **stages):
    setting = Setting(ranks, micro_batches, link or Link())
    return predict_stages(strategy, _stages(strategy, ranks, **stages), setting, 1)


@pytest.mark.parametrize("strategy", ["gpipe", "1f1b", "deepspeed"])
@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_the_textbook_bubble(strategy, ranks, micro_batches):
    """(p - 1) / (m + p - 1) of the time, with free links and equal stages."""
    prediction = _predict(strategy, ranks, micro_batches)
    assert prediction.step_seconds == pytest.approx((micro_batches + ranks - 1) * (F + B))
    assert prediction.bubble == pytest.approx((ranks - 1) / (micro_batches + ranks - 1))
    assert prediction.share_of_ideal == pytest.approx(1 - prediction.bubble)


@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_the_bubble_of_two_stages_per_rank_is_half_as_long(ranks, micro_batches):
    """(p - 1)(F + B) / 2 per step (Narayanan et al. 2021)."""
    step = _predict("interleaved_1f1b", ranks, micro_batches).step_seconds
    assert step == pytest.approx(micro_batches * (F + B) + (ranks - 1) * (F + B) / 2)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 8), (4, 8), (4, 16), (8, 32)])
def test_zero_bubble_schedules_leave_less(ranks, micro_batches):
    """Equal F, I and W: what is left is below 1F1B's, and V's below interleaved ZB1P's for m >= 2 p."""
    equal = {"forward": 1.0, "backward": 2.0}
    one, split, folded = (_predict(k, ranks, micro_batches, **equal).bubble for k in ("1f1b", "zero_bubble", "zbv"))
    assert folded < split < one


@pytest.mark.parametrize("slow", range(4))
def test_decoupled_goes_at_the_pace_of_its_slowest_stage(slow):
    stages = _stages("decoupled", 4, critic=0.5, step=0.25)
    stages[slow] = StageCosts(F, B, B, 0.25, 10, 1, 8, 0, 0.5)
    prediction = predict_stages("decoupled", stages, Setting(4, 8), 1)
    assert prediction.step_seconds == pytest.approx(8 * (F + 2 * B + 0.5 + 0.25))
    assert prediction.share_of_ideal == pytest.approx(1.0)


def test_decoupled_does_not_feel_the_latency_until_the_credits_run_out():
    free = _predict("decoupled", 4, 4).step_seconds
    assert _predict("decoupled", 4, 4, Link(latency=5.0)).step_seconds == pytest.approx(free)
    starved = _predict("decoupled", 4, 4, Link(latency=20.0)).step_seconds
    assert starved == pytest.approx(4 * 2 * 20.0 / 4)  # 4 packets per round trip


@pytest.mark.parametrize("strategy", PIPELINES)
def test_every_pipeline_feels_the_latency(strategy):
    assert _predict(strategy, 4, 8, Link(latency=1.0)).step_seconds > _predict(strategy, 4, 8).step_seconds + 6


def test_bandwidth_bounds_the_rate():
    """A packet of 8 bytes at 1 B/s takes 8 s, longer than a stage's 3 s."""
    assert _predict("decoupled", 3, 5, Link(bandwidth=1.0)).step_seconds == pytest.approx(5 * 8.0)


@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_activations_in_flight(ranks, micro_batches):
    """GPipe m, 1F1B min(p - r, m), decoupled 1 (SYSTEMS: Megatron, DeepSpeed `num_pipe_buffers`)."""

    def held(strategy):
        return [one.activations for one in _predict(strategy, ranks, micro_batches).memory]

    assert held("gpipe") == [micro_batches] * ranks
    assert held("1f1b") == [min(ranks - rank, micro_batches) for rank in range(ranks)]
    assert held("decoupled") == [1] * ranks


@pytest.mark.parametrize("strategy", ["interleaved_1f1b", *SPLIT])
def test_activations_of_two_stages_per_rank_do_not_grow_with_the_micro_batches(strategy):
    few, many = (_predict(strategy, 4, count).memory for count in (16, 32))
    assert [one.activations for one in few] == [one.activations for one in many]


@pytest.mark.parametrize("strategy", SPLIT)
def test_the_first_stage_does_all_of_its_backward_with_its_weights(strategy):
    """Torch computes no gradient of the network's input."""
    seconds = seconds_of(strategy, _stages(strategy, 2), 2)
    assert [seconds(Operation(kind, 0, 0)) for kind in "IW"] == [0.0, B / 2]
    assert [seconds(Operation(kind, 1, 0)) for kind in "IW"] == [B / 4, B / 4]


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_on_the_links(ranks):
    for strategy in ("1f1b", "gpipe", "deepspeed", "zbv", "interleaved_1f1b", "zero_bubble"):
        traffic = _predict(strategy, ranks, 8).traffic
        rounds = stages_per_rank(strategy)
        up = [t for t in traffic if t.target == t.source + 1]
        assert sum(t.activations for t in traffic) == pytest.approx(sum(t.gradients for t in traffic)), (
            "what goes forward comes back"
        )
        crossings = ranks * rounds - 1 - (strategy == "zbv")
        assert sum(t.activations for t in traffic) == pytest.approx(8 * crossings)
        assert len(up) == ranks - 1
    one_way = _predict("decoupled", ranks, 8).traffic
    assert all(t.gradients == 0 for t in one_way)
    assert [t.activations for t in one_way if t.target > t.source] == [8.0] * (ranks - 1)
    assert [t.credits for t in one_way if t.target < t.source] == [8.0] * (ranks - 1)


def _profile(layers=8, critics=True):
    one = Piece("layer", 1.0, 1.0, 1.0, 0.1, 100, 200, 50, 40, 16, 16)
    critic = Piece("critic", 0.1, 0.1, 0.1, 0.01, 10, 20, 5, 5)
    return Profile("made up", 4, 32, (one,) * layers, (critic if critics else None,) * (layers - 1), 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_prediction_is_the_same_every_time(strategy):
    setting = Setting(4, 8, Link(0.01, 1e4))
    assert predict(strategy, _profile(), setting, minmax_cut) == predict(strategy, _profile(), setting, minmax_cut)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_memory_of_the_states_is_all_there_once(strategy):
    """Summed over ranks: the network once (and the critics, decoupled); on every rank for data parallel."""
    memory = predict(strategy, _profile(), Setting(4, 8), minmax_cut).memory
    network = 8 * (2 * 100 + 200)
    extra = {"decoupled": 3 * (2 * 10 + 20), "data_parallel": 3 * network}.get(strategy, 0)
    assert sum(one.states for one in memory) == network + extra


def test_the_whole_network():
    alone = predict("backprop", _profile(), Setting(4, 8), minmax_cut)
    assert alone.step_seconds == pytest.approx(8 * 8 * 3.0 + 8 * 0.1)
    assert alone.memory[0].activations == 50 + 7 * 40
    free = predict("data_parallel", _profile(), Setting(4, 8), minmax_cut)
    assert free.step_seconds == pytest.approx(2 * 8 * 3.0 + 8 * 0.1)
    slow = predict("data_parallel", _profile(), Setting(4, 8, Link(bandwidth=10.0)), minmax_cut)
    ring = 2 * 3 * 800 / 4 / 10.0
    assert exposed_all_reduce(800, 4, Link(bandwidth=10.0), 16.0) == pytest.approx(ring - 16)
    assert slow.step_seconds - free.step_seconds == pytest.approx(ring - 16)


def test_the_cut_is_the_best_one():
    """Brute force over all cuts: none gives a decoupled pipeline a higher rate."""
    times = [3.0, 1.0, 2.0, 1.0, 4.0, 1.0]
    layers = tuple(Piece(f"{n}", time / 3, time / 3, time / 3) for n, time in enumerate(times))
    critics = tuple(Piece("critic", 0.1 * n, 0.0, 0.0) for n in range(5))
    profile = Profile("made up", 1, 0, layers, critics, 3)

    def rate(cut):
        return predict("decoupled", profile, Setting(3, 4), cut).samples_per_second

    others = [(0, *inner, 6) for inner in itertools.combinations(range(1, 6), 2)]
    assert rate(minmax_cut) == pytest.approx(max(rate(lambda *_, bounds=bounds, **__: bounds) for bounds in others))


@pytest.mark.parametrize(
    ("strategy", "setting", "code"),
    [
        ("2f2b", (2, 2), "unknown-strategy"),
        ("1f1b", (4, 2), "schedule-does-not-fit"),
        ("data_parallel", (4, 6), "schedule-does-not-fit"),
        ("zero_bubble", (4, 9), "schedule-does-not-fit"),
        ("zbv", (8, 16), "too-few-layers"),
    ],
)
def test_what_cannot_run_says_why(strategy, setting, code):
    with refused(code):
        predict(strategy, _profile(), Setting(*setting), minmax_cut)


def test_no_critic_no_cut():
    with refused("no-cut-for-critic"):
        predict("decoupled", _profile(critics=False), Setting(2, 2), minmax_cut)


def test_a_profile_comes_back_from_disk():
    profile = _profile()
    assert read_profile(profile.write()) == profile


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        _profile().write().replace('"samples": 4', '"samples": 0'),
        _profile().write().replace("1.0", "-1"),
    ],
)
def test_no_profile(text):
    with refused("profile-unreadable"):
        read_profile(text)


def test_counts_below_one_are_refused():
    with refused("option-out-of-range", UsageError, "--capacity 0"):
        Setting(2, 2, capacity=0)
    assert math.isfinite(Setting(2, 2).link.latency)
