"""`dpp bench schedule`: all pipelines get the same sleeps, and one that cannot run does not stop the others."""

import argparse

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from decoupled_pp.commands.bench import emulated, schedule
from decoupled_pp.commands.main import main
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


def _chosen(**changes):
    values = {"ranks": 2, "strategies": list(schedule.STRATEGIES), "micro_batches": 4, "packets": 10, "repeats": 2}
    values |= {"forward_ms": 1.0, "backward_ms": 2.0, "batch": 4, "capacity": 4, "steps": 2, "refused": {}}
    values |= {"slow_factor": None, "slow_share": None, "slow_stage": None, "jitter": "none"}
    return argparse.Namespace(**{**values, **changes})


@pytest.mark.slow
def test_every_strategy_is_measured(tmp_path):
    chosen = _chosen()
    results = [result.value for result in launch(_measure, chosen, size=2, folder=tmp_path)]
    for kind, repeats in results[1]["results"].items():  # rank 0 has the same, and the predictions
        assert all(one.items() <= full.items() for one, full in zip(repeats, results[0]["results"][kind], strict=True))
    assert list(results[0]["results"]) == list(schedule.STRATEGIES)
    for repeats in results[0]["results"].values():
        assert len(repeats) == 2
        assert all(one["period_ms"] >= 3.0 and one["alone_ms"] >= 3.0 for one in repeats)  # nobody skips its sleeps
    text = schedule.describe(schedule.summarize(results[0]["results"], chosen))
    assert "decoupled, an optimizer step every 1 micro-batch\n" in text
    assert "zbv, an optimizer step every 4 micro-batches\n" in text
    assert text.count("predicted by the planner, ms/micro-batch") == len(schedule.STRATEGIES)
    assert all(one["predicted_ms"] >= 3.0 for repeats in results[0]["results"].values() for one in repeats)


def test_a_schedule_that_cannot_run_says_so_and_the_others_run(tmp_path):
    chosen = _chosen(strategies=["1f1b", "gpipe"], micro_batches=1)
    result = launch(_measure, chosen, size=2, folder=tmp_path)[0].value
    assert list(result["results"]) == ["gpipe"]
    chosen.refused = result["refused"]
    text = schedule.describe(schedule.summarize(result["results"], chosen))
    assert "1f1b: not measured: 1f1b cannot run with 1 micro-batches per step: " in text


def _measure(chosen):
    return {"results": schedule.measure(chosen), "refused": chosen.refused}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--ranks=1"], "needs --ranks of at least 2"),
        (["--ranks=2", "--strategies=decoupled,1f2b"], "--strategies: '1f2b' is not known; of decoupled, gpipe, 1f1b"),
        (["--ranks=2", "--micro-batches=0"], "--micro-batches 0 must be at least 1"),
        (["--ranks=2", "--slow-stage=1"], "--slow-stage 1 has no effect without --slow-factor; add it, or leave"),
        (["--ranks=2", "--slow-factor=1"], "--slow-factor 1 must be above 1"),
        (["--ranks=2", "--slow-factor=2", "--slow-share=1.5"], "--slow-share 1.5 must be above 0 and at most 1"),
        (["--ranks=2", "--slow-factor=2", "--slow-stage=2"], "--slow-stage 2 must be one of 0 to 1"),
        (["--ranks=2", "--steps=0"], "--steps 0 must be at least 1"),
    ],
)
def test_bad_input(arguments, line, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "schedule", *arguments])
    assert ended.value.code == 2
    assert line in capsys.readouterr().err
