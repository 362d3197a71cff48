"""`dpp bench schedule`: all pipelines get the same sleeps, and one that cannot run does not stop the others."""

import json
import subprocess
import sys

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from benchmarks import emulated, schedule
from benchmarks.schedule_measure import measure
from decoupled_pp.commands.main import build_parser
from decoupled_pp.core.errors import UsageError
from kit import refused, run_dpp
from ranks import launch

FORWARD, BACKWARD = 0.010, 0.020


@pytest.fixture
def slept(monkeypatch):
    """The sleeps, not slept."""
    times = []
    monkeypatch.setattr(emulated.time, "sleep", times.append)
    return times


@pytest.mark.parametrize("wanted", [False, True])
def test_a_layer_sleeps_its_forward_and_all_of_its_backward(slept, wanted):
    """Whether or not its input needs a gradient."""
    layer = emulated.EmulatedLayer(3, FORWARD, BACKWARD)
    output = layer(torch.ones(2, 3, requires_grad=wanted))
    assert slept == [FORWARD]
    output.sum().backward()
    assert sum(slept) == pytest.approx(FORWARD + BACKWARD)
    assert torch.equal(layer.scale.grad, torch.full((3,), 2.0))


def test_a_split_backward_sleeps_half_for_the_input_and_half_for_the_weight(slept):
    layer = emulated.EmulatedLayer(3, FORWARD, BACKWARD)
    inputs = torch.ones(2, 3, requires_grad=True)
    output = layer(inputs)
    slept.clear()
    _, groups = stage_backward_input([output], [torch.ones(2, 3)], [inputs], layer.parameters())
    assert slept == [BACKWARD / 2]
    stage_backward_weight(layer.parameters(), groups)
    assert slept == [BACKWARD / 2, BACKWARD / 2]


def _chosen(*words):
    chosen = build_parser(["bench", "schedule"]).parse_args(
        ["bench", "schedule", "--ranks=2", "--packets=10", "--repeats=2", "--batch=4", "--steps=2", *words]
    )
    return chosen, schedule.workload_of(chosen)


TINY = ["--forward-ms=1", "--backward-ms=2"]


@pytest.mark.slow
def test_every_strategy_is_measured(tmp_path):
    chosen, work = _chosen(*TINY, "--micro-batches=4", f"--strategies={','.join(schedule.STRATEGIES)}")
    ranks = [result.value for result in launch(measure, work, chosen.strategies, 2, size=2, folder=tmp_path)]
    (results, refused), (others, _) = ranks
    for kind, repeats in others.items():  # rank 0 has the same, and the predictions
        assert all(one.items() <= full.items() for one, full in zip(repeats, results[kind], strict=True))
    assert list(results) == list(schedule.STRATEGIES) and refused == {}
    for repeats in results.values():
        assert len(repeats) == 2
        assert all(one["period_ms"] >= 3.0 and one["alone_ms"] >= 3.0 for one in repeats)  # nobody skips its sleeps
    text = schedule.describe(schedule.summarize(results, refused, work, chosen))
    assert "decoupled, an optimizer step every 1 micro-batch\n" in text
    assert "zbv, an optimizer step every 4 micro-batches\n" in text
    assert text.count("predicted by the planner, ms/micro-batch") == len(schedule.STRATEGIES)
    assert all(one["predicted_ms"] >= 3.0 for repeats in results.values() for one in repeats)


def test_a_schedule_that_cannot_run_says_so_and_the_others_run(tmp_path):
    chosen, work = _chosen(*TINY, "--micro-batches=1", "--strategies=1f1b,gpipe")
    results, refused = launch(measure, work, chosen.strategies, 1, size=2, folder=tmp_path)[0].value
    assert list(results) == ["gpipe"]
    text = schedule.describe(schedule.summarize(results, refused, work, chosen))
    assert "1f1b: not measured: `strategy` 1f1b cannot run with 1 micro-batches per step: " in text


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        ("--ranks=1", "option-out-of-range", "--ranks 1"),
        ("--strategies=decoupled,1f2b", "unknown-strategy", "'1f2b'"),
        ("--micro-batches=0", "option-out-of-range", "--micro-batches 0"),
        ("--slow-share=0.5", "option-without-effect", "--slow-share 0.5"),
        ("--slow-factor=1", "option-out-of-range", "--slow-factor 1"),
        ("--slow-factor=2 --slow-share=1.5", "option-out-of-range", "--slow-share 1.5"),
        ("--steps=0", "option-out-of-range", "--steps 0"),
    ],
)
def test_bad_input(options, code, part):
    with refused(code, UsageError, part):
        run_dpp("bench", "schedule", "--ranks=2", *options.split())


def test_the_whole_command(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "decoupled_pp", "bench", "schedule", "--ranks=2", "--packets=10", "--repeats=1"]
    options = [*TINY, "--slow-factor=1.5", f"--output={figures}"]
    said = subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=90).stdout
    assert said.startswith("stage 1 takes 1.5 times as long for 0.33 of the micro-batches, at random\n2 ranks, 10 ")
    assert json.loads(figures.read_text())["unevenness"]["slow_stage"] == 1
