"""Predicts what a strategy would take: time, bubble, memory of ranks, traffic of links. No torch.

The step of a flushed pipeline is its period in steady state: the third of three simulated steps, so that what one
step overlaps with the next counts. A decoupled run has no flush: its period per micro-batch counts, once it is full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeAlias

from decoupled_pp.commands.plan.costs import Profile, StageCosts, seconds_of, stage_costs
from decoupled_pp.commands.plan.orders import PIPELINES, rank_of, stages_per_rank
from decoupled_pp.commands.plan.programs import PipelineShape, decoupled, flushed
from decoupled_pp.commands.plan.simulate import Link, Span, Timeline, simulate
from decoupled_pp.core.errors import UsageError

STRATEGIES = ("decoupled", *PIPELINES, "data_parallel", "backprop")

Cut: TypeAlias = Callable[..., tuple[int, ...]]
"""Cuts a list of layers, as `models.cutting.minmax_cut` does: (seconds per layer, number of stages, for every stage but
the last the seconds of a critic after every layer, speeds=, fits=) -> boundaries."""


@dataclass(frozen=True)
class Setting:
    """Ranks, links and batch that a prediction is for."""

    ranks: int
    micro_batches: int  # per optimizer step of every strategy that is not decoupled
    link: Link = field(default_factory=Link)
    capacity: int = 4  # packets that a decoupled link may hold
    accumulate: int = 1  # micro-batches per optimizer step of a decoupled stage
    speeds: tuple[float, ...] = ()  # of the ranks' devices, relative to the measured one; empty: all alike
    memory: tuple[int, ...] = ()  # bytes of the ranks' devices; empty: no bound

    def __post_init__(self) -> None:
        """Raises UsageError for counts below 1, and for devices that are not one for each rank."""
        for name, option in (("ranks", "--ranks"), ("micro_batches", "--micro-batches"), ("capacity", "--capacity")):
            if getattr(self, name) < 1:
                raise UsageError(f"{option} {getattr(self, name)} must be at least 1", code="option-out-of-range")
        for name in ("speeds", "memory"):
            given = getattr(self, name)
            if given and (len(given) != self.ranks or min(given) <= 0):
                raise UsageError(
                    f"`balance.{name}` {list(given)} must be {self.ranks} numbers above 0, one for each rank",
                    code="not-one-for-each-rank",
                    key=f"balance.{name}",
                )


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank, in bytes."""

    states: int  # parameters, gradients, optimizer state
    activations: int  # saved ones, at their peak
    buffers: int  # of the links

    @property
    def total(self) -> int:
        """Sum of all three."""
        return self.states + self.activations + self.buffers


@dataclass(frozen=True)
class Traffic:
    """Bytes per sample from one rank to another: activations (and targets), gradients, credits."""

    source: int
    target: int
    activations: float
    gradients: float
    credits: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Prediction for one strategy."""

    strategy: str
    boundaries: tuple[int, ...]  # first layer of every stage, then the number of layers
    step_seconds: float  # per `micro_batches` micro-batches in steady state
    samples_per_second: float  # of the whole run
    share_of_ideal: float  # the busiest rank's own compute, back to back, over the step
    bubble: float  # share of all ranks' time in which they do not compute
    memory: tuple[RankMemory, ...]
    traffic: tuple[Traffic, ...]  # of every pair of ranks that exchange messages


def predict(strategy: str, profile: Profile, setting: Setting, cut: Cut) -> Prediction:
    """Predicts a strategy, or raises UsageError if it does not go with these ranks, layers, batches and devices."""
    if strategy in ("backprop", "data_parallel"):
        found = _predict_whole(strategy, profile, setting)
    else:
        critics = strategy == "decoupled"
        stages = setting.ranks * stages_per_rank(strategy)
        speeds = None
        if setting.speeds:
            speeds = [setting.speeds[rank_of(strategy, stage, setting.ranks)] for stage in range(stages)]
        after = [math.inf if critic is None else critic.seconds for critic in profile.critics]
        boundaries = cut(
            [layer.seconds for layer in profile.layers],
            stages,
            [[*after, 0.0]] * (stages - 1) if critics else None,
            speeds=speeds,
            fits=_fits_in(profile, setting) if critics and setting.memory else None,
        )
        costs = stage_costs(profile, boundaries, critics=critics, speeds=speeds or ())
        found = predict_stages(strategy, costs, setting, profile.samples, boundaries)
    for rank, (memory, limit) in enumerate(zip(found.memory, setting.memory, strict=False)):
        if memory.total > limit:
            raise UsageError(
                f"{strategy} needs {memory.total / 2**20:.1f} MiB on rank {rank}, whose device has "
                f"{limit / 2**20:.1f}; raise `balance.memory`, or use more ranks",
                code="does-not-fit-memory",
                key="balance.memory",
            )
    return found


def predict_stages(
    strategy: str, costs: Sequence[StageCosts], setting: Setting, samples: int, boundaries: tuple[int, ...] = ()
) -> Prediction:
    """Predicts `decoupled` or a pipeline with a flush from the costs of its stages, for micro-batches of `samples`."""
    sizes = tuple(one.output for one in costs[:-1])
    gradients = tuple(one.gradient for one in costs[:-1])
    shape = PipelineShape(strategy, setting.ranks, sizes, gradients)
    run = _run_decoupled if strategy == "decoupled" else _run_flushed
    timeline, step, packets = run(shape, costs, setting)
    count = setting.micro_batches
    updates = count / setting.accumulate if strategy == "decoupled" else 1.0
    per_stage = [count * (one.forward + one.backward + one.critic) + updates * one.step for one in costs]
    busy = []
    memory = []
    for rank in range(setting.ranks):
        held = shape.stages_of(rank)
        busy.append(sum(per_stage[stage] for stage in held))
        states = sum(costs[stage].memory for stage in held)
        memory.append(RankMemory(states, _peak(timeline.spans[rank], costs), _buffers(shape, rank, setting)))
    return _prediction(strategy, boundaries, step, count * samples, busy, memory, _traffic(timeline, packets * samples))


def _prediction(  # noqa: PLR0917 - the figures that all strategies have
    strategy: str,
    boundaries: tuple[int, ...],
    step: float,
    samples: int,
    busy: Sequence[float],
    memory: Sequence[RankMemory],
    traffic: Sequence[Traffic],
) -> Prediction:
    """Combines the figures of a step of `samples` samples, in which the ranks compute for `busy` seconds."""
    return Prediction(
        strategy=strategy,
        boundaries=boundaries,
        step_seconds=step,
        samples_per_second=samples / step if step else math.inf,
        share_of_ideal=max(busy) / step if step else 1.0,
        bubble=1 - sum(busy) / len(busy) / step if step else 0.0,
        memory=tuple(memory),
        traffic=tuple(traffic),
    )


def _run_flushed(shape: PipelineShape, costs: Sequence[StageCosts], setting: Setting) -> tuple[Timeline, float, int]:
    """Returns the timeline of three steps, the seconds of the third, and the number of micro-batches in all."""
    seconds = seconds_of(shape.kind, costs, shape.ranks)
    timeline = simulate(flushed(shape, setting.micro_batches, 3), seconds, setting.link)
    ends = [[span.end for span in spans if span.operation.kind == "S"] for spans in timeline.spans]
    _, second, third = map(max, zip(*ends, strict=True))
    return timeline, third - second, 3 * setting.micro_batches


def _run_decoupled(shape: PipelineShape, costs: Sequence[StageCosts], setting: Setting) -> tuple[Timeline, float, int]:
    """Returns the timeline, the seconds per `micro_batches` packets in steady state, and the packets in all."""
    every = setting.accumulate
    # The first half fills pipeline and links; whole optimizer steps, so that both halves have as many updates.
    half = every * math.ceil((2 * (shape.ranks + setting.capacity) + 8) / every)
    programs = decoupled(shape, setting.capacity, 2 * half, every)
    timeline = simulate(programs, seconds_of(shape.kind, costs, shape.ranks), setting.link)
    done = {span.operation.micro_batch: span.end for span in timeline.spans[-1]}  # the last span of a packet ends it
    period = (done[2 * half - 1] - done[half - 1]) / half
    return timeline, period * setting.micro_batches, 2 * half


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


def _buffers(shape: PipelineShape, rank: int, setting: Setting) -> int:
    """Returns the bytes of a rank's link buffers, as the libraries allocate them."""
    total = 0
    for stage in shape.stages_of(rank):
        receives = stage > 0 and shape.rank_of(stage - 1) != rank
        sends = stage + 1 < shape.stages and shape.rank_of(stage + 1) != rank
        incoming = shape.sizes[stage - 1] if receives else 0
        outgoing = shape.sizes[stage] if sends else 0
        returning = shape.gradient_sizes[stage] if sends else 0
        if shape.kind == "decoupled":
            total += setting.capacity * (incoming + outgoing)
        elif shape.kind == "deepspeed":  # inputs for `num_pipe_buffers`, one gradient
            total += max(2, min(shape.stages - stage + 1, setting.micro_batches)) * incoming + returning
        else:  # a receive buffer per micro-batch of a step and direction (`PipelineStage`, torch 2.13)
            total += setting.micro_batches * (incoming + returning)
    return total


def _fits_in(profile: Profile, setting: Setting) -> Callable[[int, int, int], bool]:
    """Returns a function that says whether the layers `first` to `end` fit as decoupled stage `stage`.

    Counted are states and saved activations of layers and critic, and the packets in the links.
    """
    sums = list(accumulate((layer.memory + layer.saved_bytes for layer in profile.layers), initial=0))
    critics = [0 if critic is None else critic.memory + critic.saved_beside for critic in (*profile.critics, None)]
    packets = [setting.capacity * (layer.output_bytes + profile.target_bytes) for layer in profile.layers]
    packets[-1] = 0

    def fits(stage: int, first: int, end: int) -> bool:
        buffers = packets[end - 1] + (packets[first - 1] if first else 0)
        return sums[end] - sums[first] + critics[end - 1] + buffers <= setting.memory[stage]

    return fits


def _traffic(timeline: Timeline, samples: int) -> list[Traffic]:
    traffic = []
    for pair in sorted({key[:2] for key in timeline.bytes_sent}):
        sent = [timeline.bytes_sent.get((*pair, kind), 0) for kind in ("activation", "gradient", "credit")]
        traffic.append(Traffic(*pair, *(size / samples for size in sent)))
    return traffic


def exposed_all_reduce(size: float, ranks: int, link: Link, backward: float) -> float:
    """Returns the seconds of a ring all-reduce of `size` bytes that the last backward pass does not hide.

    It begins with that pass, as DDP's buckets do. A ring of d ranks takes 2 (d - 1) messages of a d-th of the bytes.
    """
    if ranks == 1:
        return 0.0
    ring = 2 * (ranks - 1) * (size / ranks / link.bandwidth + link.latency + 2 * link.host)
    return max(0.0, ring - backward)


def _predict_whole(strategy: str, profile: Profile, setting: Setting) -> Prediction:
    """Predicts `backprop` and `data_parallel`, which have the whole network on every rank."""
    boundaries = (0, len(profile.layers))
    ranks = setting.ranks if strategy == "data_parallel" else 1
    slowest = (min(setting.speeds[:ranks]),) if setting.speeds else ()  # replicas wait for it
    (whole,) = stage_costs(profile, boundaries, critics=False, speeds=slowest)
    count = setting.micro_batches
    check_shared_evenly(count, ranks, "ranks")
    gradients = whole.parameter_bytes
    busy = count // ranks * (whole.forward + whole.backward) + whole.step
    step = busy + exposed_all_reduce(gradients, ranks, setting.link, whole.backward)
    memory = RankMemory(whole.memory, whole.saved, gradients if ranks > 1 else 0)  # DDP's buckets are copies
    sent = 2 * (ranks - 1) / ranks * gradients / (count * profile.samples)
    ring = [Traffic(rank, (rank + 1) % ranks, 0.0, sent) for rank in range(ranks)] if ranks > 1 else []
    return _prediction(strategy, boundaries, step, count * profile.samples, [busy], [memory] * ranks, ring)


def check_shared_evenly(micro_batches: int, among: int, name: str) -> None:
    """Raises UsageError if a step's micro-batches do not divide evenly among ranks or replicas."""
    if micro_batches % among:
        raise UsageError(
            f"{micro_batches} micro-batches per step cannot be shared by {among} {name} evenly; "
            f"use a multiple of {among}",
            code="schedule-does-not-fit",
        )
