"""The planner's prediction of an emulated pipeline, from its parts measured apart on the same ranks.

What goes in: every stage's passes alone, and a message between neighbours. What comes out: the schedule's effect.
Nothing is fitted to the pipeline's own time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from decoupled_pp.planner.orders import stages_per_rank
from decoupled_pp.planner.predict import Setting, StageCosts, predict_stages
from decoupled_pp.planner.simulate import Link


def predicted_period(
    kind: str,
    passes: Sequence[Mapping[int, tuple[float, float, float]]],
    messages: Sequence[tuple[float, float]],
    *,
    micro_batches: int,
    capacity: int,
) -> float:
    """Seconds per micro-batch.

    Args:
        kind: Strategy.
        passes: For every rank: stage -> seconds of forward, input's and weights' gradients.
        messages: For every rank: latency and host seconds of a message.
        micro_batches: Per optimizer step.
        capacity: Packets a decoupled link may hold.
    """
    ranks = len(passes)
    times = {int(stage): seconds for one in passes for stage, seconds in one.items()}
    stages = ranks * stages_per_rank(kind)
    # Sizes do not matter: what the bytes take is in the measured latency.
    costs = [StageCosts(*times[stage], 0.0, 0, 0) for stage in range(stages)]
    latency, host = (sum(column) / ranks for column in zip(*messages, strict=True))
    setting = Setting(ranks, micro_batches, Link(latency, host=host), capacity)
    return predict_stages(kind, costs, setting, 1).step_seconds / micro_batches


def figures(period: float, predicted: float, messages: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Predicted beside measured, and what a message was measured to cost."""
    latency, host = (sum(column) / len(messages) for column in zip(*messages, strict=True))
    return {
        "predicted_ms": predicted * 1000,
        "measured_to_predicted": period / predicted,
        "message_latency_us": latency * 1e6,
        "message_host_us": host * 1e6,
    }
