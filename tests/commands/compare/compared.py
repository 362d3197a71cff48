"""Runs as they would have been read from run folders, with spans and scores that are easy to reckon with."""

from decoupled_pp.commands.compare.contenders import Contender
from decoupled_pp.commands.compare.runs import Run

MILLISECOND = 1e-3


def contender(name="1f1b", strategy=None, ranks=2, accumulate=2, steps=10):
    return Contender(name, strategy or name, ranks, accumulate, steps, ())


def stage(**changes):
    phases = {"wait_in": 1.0, "forward": 1.0, "wait_out": 0.0, "critic": 0.5, "backward": 2.0, "step": 0.1}
    row = {"critic_parameters": 0, "saved_activation_bytes_peak": 1000, "memory_bytes_peak": 5000}
    return {**row, "phase_seconds": phases, **changes}


def run(name="1f1b", *, repeat=0, losses=(3.0, 2.0, 1.0), mean=0.02, spans=None, stages=None):
    """A run of 10 updates of 4 samples with an evaluation every second."""
    validations = [
        {"loss": loss, "samples": 40 * (n + 1) // len(losses), "training_seconds": n + 1.0}
        for n, loss in enumerate(losses)
    ]
    summary = {
        "steps": 10,
        "step_seconds": {"mean": mean, "p50": mean, "p95": 2 * mean} if mean else None,
        "training_seconds": float(len(losses)),
        "samples_per_second": 4 / mean if mean else None,
        "final": {"val_loss": losses[-1], "val_accuracy": None},
        "per_stage": stages or [stage(), stage()],
        "links": [{"from": 0, "to": 1, "training_bytes_forward": 400, "payload_bytes_backward": 80, "packets": 10}],
    }
    return Run(contender(name), repeat, summary, validations, spans or flushes())


def flushes():
    """Two ranks, three updates 10 ms apart: rank 0 computes 4 of 10 ms, rank 1 6 of 10 ms."""
    spans = {0: [], 1: []}
    for number in range(3):
        at = number * 10 * MILLISECOND
        spans[0] += [("forward", at, 3 * MILLISECOND, number), ("wait_in", at + 3e-3, 6e-3, number)]
        spans[0] += [("step", at + 9e-3, 1 * MILLISECOND, number)]
        spans[1] += [
            ("wait_in", at, 4e-3, number),
            ("backward", at + 4e-3, 5e-3, number),
            ("step", at + 9e-3, 1e-3, number),
        ]
    return spans
