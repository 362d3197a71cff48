"""The planner's prediction of an emulated pipeline, from its parts measured apart on the same ranks.

What goes in: every stage's passes alone, a message between neighbours, and what the sleeps were multiplied by. What
comes out: the schedule's effect. Nothing is fitted to the pipeline's own time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from decoupled_pp.commands.plan.costs import StageCosts, seconds_of
from decoupled_pp.commands.plan.orders import SPLIT, Operation, rank_of, stages_per_rank
from decoupled_pp.commands.plan.programs import PipelineShape, decoupled, flushed
from decoupled_pp.commands.plan.simulate import Link, simulate
from decoupled_pp.training.baselines.alone import MessageSeconds


class MessageCost(NamedTuple):
    """Seconds of a message between two ranks: until its first byte arrives, of its bytes, of a rank's own time."""

    latency: float
    transfer: float
    host: float

    @staticmethod
    def of(tiny: Sequence[MessageSeconds], whole: Sequence[MessageSeconds]) -> MessageCost:
        """From what the ranks have measured with a message of hardly any bytes, and with a whole one."""
        latency = _mean_latency(tiny)
        host = statistics.mean(one.host for one in whole)
        return MessageCost(latency, max(0.0, _mean_latency(whole) - latency), host)


@dataclass(frozen=True)
class Emulation:
    """What was measured.

    Attributes:
        ranks: Number of ranks.
        micro_batches: Per optimizer step of a flushed pipeline.
        steps: Its measured optimizer steps, after one that does not count.
        packets: Measured packets of a decoupled pipeline, after `fill` that do not count.
        fill: See `packets`.
        capacity: Packets a decoupled link may hold.
        message_bytes: What goes from stage to stage, forward or backward.
        forward: Seconds that a rank sleeps in the forward passes of a micro-batch.
        backward: The same of its backward passes.
        factors: (rank, micro-batch) -> what forward and backward sleeps were multiplied by; measured ones count from 0.
    """

    ranks: int
    micro_batches: int
    steps: int
    packets: int
    fill: int
    capacity: int
    message_bytes: int
    forward: float
    backward: float
    factors: Callable[[int, int], tuple[float, float]]


def _mean_latency(costs: Sequence[MessageSeconds]) -> float:
    return statistics.mean(one.latency for one in costs if one.latency is not None)


def predicted_period(
    kind: str,
    passes: Sequence[Mapping[int, tuple[float, float, float]]],
    message: MessageCost,
    emulation: Emulation,
) -> float:
    """Seconds per micro-batch, over the very micro-batches that are measured.

    Args:
        kind: Strategy.
        passes: For every rank: stage -> seconds of forward, input's and weights' gradients with sleeps times 1.
        message: What a message between neighbours costs.
        emulation: What was measured.
    """
    times = {int(stage): seconds for one in passes for stage, seconds in one.items()}
    costs = [StageCosts(*times[stage], 0.0, 0, 0) for stage in range(len(times))]
    sizes = (emulation.message_bytes,) * (len(costs) - 1)
    bandwidth = emulation.message_bytes / message.transfer if message.transfer else math.inf
    link = Link(message.latency, bandwidth, message.host)
    shape, per_step = PipelineShape(kind, emulation.ranks, sizes, sizes), emulation.micro_batches
    if kind == "decoupled":
        per_step, before, measured = 1, emulation.fill, emulation.packets
        programs = decoupled(shape, emulation.capacity, before + measured)
    else:
        before, measured = 1, emulation.steps
        programs = flushed(shape, per_step, before + measured)
    even = seconds_of(kind, costs, emulation.ranks)
    timeline = simulate(programs, _with_sleeps(kind, even, emulation, before * per_step), link)
    timed = timeline.spans[-1:] if kind == "decoupled" else timeline.spans  # the last stage, or whoever takes longest
    ends = [[span.end for span in row if span.operation.kind == "S"] for row in timed]
    return max(row[-1] - row[before - 1] for row in ends) / measured / per_step


def _with_sleeps(
    kind: str, even: Callable[[Operation], float], emulation: Emulation, uncounted: int
) -> Callable[[Operation], float]:
    """The times of `even`, in which sleeps count once, with sleeps as long as they were."""
    share = 1 / stages_per_rank(kind)

    def seconds(operation: Operation) -> float:
        name, stage, number = operation
        if name not in "FBIW":
            return even(operation)
        forward, backward = emulation.factors(rank_of(kind, stage, emulation.ranks), number - uncounted)
        if name == "F":
            return even(operation) + (forward - 1) * emulation.forward * share
        whole = {"B": 1.0, "I": 0.5, "W": 0.5}[name]
        if kind in SPLIT and stage == 0:  # not split: see `seconds_of`
            whole = 0.0 if name == "I" else 1.0
        return even(operation) + (backward - 1) * emulation.backward * share * whole

    return seconds


def figures(
    period: float, predicted: float, passes: Sequence[Mapping[int, tuple[float, float, float]]], message: MessageCost
) -> dict[str, Any]:
    """Predicted beside measured, and what the prediction is made of: median passes of the stages, and a message."""
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
