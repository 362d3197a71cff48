"""The planner's prediction of an emulated pipeline, from its parts measured apart on the same ranks.

It combines every stage's passes alone, a message between neighbours, and the factors of the sleeps; what it adds is the
schedule's effect. Nothing is fitted to the pipeline's own time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from benchmarks.workload import Workload
from decoupled_pp.commands.plan.costs import StageCosts, seconds_of
from decoupled_pp.commands.plan.orders import SPLIT, Operation, rank_of, stages_per_rank
from decoupled_pp.commands.plan.programs import PipelineShape, decoupled, flushed
from decoupled_pp.commands.plan.simulate import Link, simulate

Passes: TypeAlias = Sequence[Mapping[int, tuple[float, float, float]]]
"""For every rank: stage -> seconds of forward, input's and weights' gradients, with sleeps of nominal length."""

Factors: TypeAlias = Callable[[int, int], tuple[float, float]]
"""(rank, micro-batch) -> factors of its forward and backward sleeps; measured micro-batches count from 0."""


class MessageCost(NamedTuple):
    """Seconds of a message between two ranks: until its first byte arrives, of its bytes, of a rank's own time."""

    latency: float
    transfer: float
    host: float

    @staticmethod
    def of(tiny: Sequence[tuple[float | None, float]], whole: Sequence[tuple[float | None, float]]) -> MessageCost:
        """Combines the (latency, host) that the ranks measured with a message of few bytes, and with a whole one."""
        latency = _mean_latency(tiny)
        host = statistics.mean(host for _, host in whole)
        return MessageCost(latency, max(0.0, _mean_latency(whole) - latency), host)


def _mean_latency(costs: Sequence[tuple[float | None, float]]) -> float:
    return statistics.mean(latency for latency, _ in costs if latency is not None)


def predicted_period(kind: str, passes: Passes, message: MessageCost, work: Workload, factors: Factors) -> float:
    """Predicts the seconds per micro-batch, over the very micro-batches that are measured.

    Args:
        kind: Name of the strategy.
        passes: Passes of every rank's stages.
        message: Cost of a micro-batch's activations.
        work: The work.
        factors: Factors of the sleeps.
    """
    # Ranks exchange their passes as JSON, which makes the stages strings.
    by_stage = {int(stage): seconds for one in passes for stage, seconds in one.items()}
    costs = [StageCosts(*by_stage[stage], step=0.0, memory=0, saved=0) for stage in sorted(by_stage)]
    sizes = (work.message_bytes,) * (len(costs) - 1)
    bandwidth = work.message_bytes / message.transfer if message.transfer else math.inf
    link = Link(message.latency, bandwidth, message.host)
    shape = PipelineShape(kind, work.ranks, sizes, sizes)
    if kind == "decoupled":
        per_step = 1
        uncounted = work.fill
        counted = work.packets
        programs = decoupled(shape, work.capacity, uncounted + counted)
    else:
        per_step = work.micro_batches
        uncounted = 1
        counted = work.steps
        programs = flushed(shape, per_step, uncounted + counted)
    nominal = seconds_of(kind, costs, work.ranks)
    timeline = simulate(programs, _with_factors(kind, nominal, work, factors, uncounted * per_step), link)
    # Decoupled is timed at the last stage; of a pipeline with a flush the rank counts that takes longest.
    timed = timeline.spans[-1:] if kind == "decoupled" else timeline.spans
    ends = [[span.end for span in spans if span.operation.kind == "S"] for spans in timed]
    return max(end[-1] - end[uncounted - 1] for end in ends) / counted / per_step


def _with_factors(
    kind: str, nominal: Callable[[Operation], float], work: Workload, factors: Factors, uncounted: int
) -> Callable[[Operation], float]:
    """Returns the times of `nominal` with the sleeps in them multiplied by their factors."""
    share = 1 / stages_per_rank(kind)

    def seconds(operation: Operation) -> float:
        name, stage, number = operation
        if name not in "FBIW":
            return nominal(operation)
        forward, backward = factors(rank_of(kind, stage, work.ranks), number - uncounted)
        if name == "F":
            return nominal(operation) + (forward - 1) * work.forward_seconds * share
        whole = {"B": 1.0, "I": 0.5, "W": 0.5}[name]
        if kind in SPLIT and stage == 0:  # the first stage's backward pass is not split: see `seconds_of`
            whole = 0.0 if name == "I" else 1.0
        return nominal(operation) + (backward - 1) * work.backward_seconds * share * whole

    return seconds


def figures(period: float, predicted: float, passes: Passes, message: MessageCost) -> dict[str, Any]:
    """Returns predicted beside measured, and what the prediction is made of: median passes, and a message."""
    forward, to_input, weights = zip(*(seconds for one in passes for seconds in one.values()), strict=True)
    return {
        "predicted_ms": predicted * 1000,
        "measured_to_predicted": period / predicted,
        "forward_pass_ms": statistics.median(forward) * 1000,
        "input_pass_ms": statistics.median(to_input) * 1000,
        "weights_pass_ms": statistics.median(weights) * 1000,
        "message_latency_us": message.latency * 1e6,
        "message_transfer_us": message.transfer * 1e6,
        "message_host_us": message.host * 1e6,
    }
