"""Runs as they would have been read from run folders, with spans and scores that are easy to reckon with."""

from decoupled_pp.commands.compare.contenders import Contender
from decoupled_pp.commands.compare.runs import Run
from decoupled_pp.core.reports import LinkSummary, Span, StepSeconds, ValidationRecord
from recorded import report

LINK = LinkSummary(
    sender=0, receiver=1, packets=10, payload_bytes_forward=600, payload_bytes_backward=80,
    control_bytes_forward=0, control_bytes_backward=0, training_bytes_forward=400,
)  # fmt: skip


def contender(name="1f1b", strategy=None, ranks=2, accumulate=2, steps=10):
    return Contender(name, strategy or name, ranks, accumulate, steps, ())


def run(name="1f1b", *, repeat=0, losses=(3.0, 2.0, 1.0), mean=0.02, spans=None, stages=None):
    """A run of 10 updates of 4 samples with an evaluation every second."""
    validations = [
        ValidationRecord(
            stage=1, step=0, loss=loss, accuracy=None, samples=40 * (n + 1) // len(losses), seconds=n + 1.0,
            training_seconds=n + 1.0,
        )
        for n, loss in enumerate(losses)
    ]  # fmt: skip
    changes = {"per_stage": tuple(stages)} if stages else {}
    ended = report(
        losses[-1],
        step_seconds=StepSeconds(mean, mean, 2 * mean) if mean else None,
        training_seconds=float(len(losses)),
        links=(LINK,),
        **changes,
    )
    return Run(contender(name), repeat, ended, validations, spans or flushes())


def flushes():
    """Two ranks, three updates 10 ms apart: rank 0 computes 4 of 10 ms, rank 1 6 of 10 ms."""
    spans = {0: [], 1: []}
    for number in range(3):
        at = number * 10e-3
        spans[0] += [
            Span("forward", at, 3e-3, number),
            Span("wait_in", at + 3e-3, 6e-3, number),
            Span("step", at + 9e-3, 1e-3, number),
        ]
        spans[1] += [
            Span("wait_in", at, 4e-3, number),
            Span("backward", at + 4e-3, 5e-3, number),
            Span("step", at + 9e-3, 1e-3, number),
        ]
    return spans
