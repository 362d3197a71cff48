"""Predicted memory of every rank: states, saved activations, link buffers. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from decoupled_pp.commands.plan.costs import StageCosts
from decoupled_pp.commands.plan.profile import Profile
from decoupled_pp.commands.plan.programs import PipelineShape
from decoupled_pp.commands.plan.simulate import Span
from decoupled_pp.core.errors import UsageError


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank, in bytes.

    Attributes:
        states: Parameters, gradients and optimizer state.
        activations: Saved activations at their peak.
        buffers: Link buffers.
    """

    states: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        """Sum of all three."""
        return self.states + self.activations + self.buffers


def rank_memory(
    shape: PipelineShape,
    costs: Sequence[StageCosts],
    spans: Sequence[Span],
    rank: int,
    *,
    capacity: int,
    micro_batches: int,
) -> RankMemory:
    """Returns the memory of one rank of a pipeline.

    Args:
        shape: The pipeline.
        costs: Costs of all its stages.
        spans: Simulated operations of the rank, in order.
        rank: The rank.
        capacity: Packets a decoupled link may hold.
        micro_batches: Micro-batches per optimizer step of a pipeline with a flush.
    """
    return RankMemory(
        states=sum(costs[stage].memory for stage in shape.stages_of(rank)),
        activations=_peak(spans, costs),
        buffers=_buffers(shape, rank, capacity, micro_batches),
    )


def _peak(spans: Sequence[Span], costs: Sequence[StageCosts]) -> int:
    """Returns the most bytes that autograd keeps: a stage's from F to the end of B or W, a critic's during C."""
    held = 0
    peak = 0
    for span in spans:
        kind, stage, _ = span.operation
        if kind == "F":
            held += costs[stage].saved
        peak = max(peak, held + costs[stage].critic_saved if kind == "C" else held)
        if kind in "BW":
            held -= costs[stage].saved
    return peak


def _buffers(shape: PipelineShape, rank: int, capacity: int, micro_batches: int) -> int:
    """Returns the bytes of a rank's link buffers.

    Decoupled: `capacity` packets at each end. torch: a receive buffer per micro-batch of a step and direction
    (`PipelineStage`, torch 2.13). DeepSpeed: inputs for `num_pipe_buffers`, one gradient.
    """
    total = 0
    for stage in shape.stages_of(rank):
        receives = stage > 0 and shape.rank_of(stage - 1) != rank
        sends = stage + 1 < shape.stages and shape.rank_of(stage + 1) != rank
        incoming = shape.sizes[stage - 1] if receives else 0
        outgoing = shape.sizes[stage] if sends else 0
        returning = shape.gradient_sizes[stage] if sends else 0
        if shape.kind == "decoupled":
            total += capacity * (incoming + outgoing)
        elif shape.kind == "deepspeed":
            total += max(2, min(shape.stages - stage + 1, micro_batches)) * incoming + returning
        else:
            total += micro_batches * (incoming + returning)
    return total


def fits_in(profile: Profile, capacity: int, limits: Sequence[int]) -> Callable[[int, int, int], bool]:
    """Returns a function that says whether the layers `first` to `end` fit as decoupled stage `stage`.

    Counted are states and saved activations of layers and critic, and the packets in the links.

    Args:
        profile: Costs of the network.
        capacity: Packets a link may hold.
        limits: Bytes of the stages' devices.
    """
    sums = list(accumulate((layer.memory + layer.saved_bytes for layer in profile.layers), initial=0))
    critics = [0 if critic is None else critic.memory + critic.saved_beside for critic in (*profile.critics, None)]
    packets = [capacity * (layer.output_bytes + profile.target_bytes) for layer in profile.layers]
    packets[-1] = 0

    def fits(stage: int, first: int, end: int) -> bool:
        buffers = packets[end - 1] + (packets[first - 1] if first else 0)
        return sums[end] - sums[first] + critics[end - 1] + buffers <= limits[stage]

    return fits


def refuse_overflow(strategy: str, memory: Sequence[RankMemory], limits: Sequence[int]) -> None:
    """Raises UsageError if a rank needs more than its device has; without limits everything fits."""
    for rank, (one, limit) in enumerate(zip(memory, limits, strict=False)):
        if one.total > limit:
            raise UsageError(
                f"{strategy} needs {one.total / 2**20:.1f} MiB on rank {rank}, whose device has {limit / 2**20:.1f}; "
                "raise `balance.memory`, or use more ranks",
                code="does-not-fit-memory",
                key="balance.memory",
            )
