"""From a profile to what a strategy would take: time, bubble, memory of ranks, traffic of links. No torch.

The step of a flushed pipeline is its period in steady state: the third of three simulated steps, so that what one
step overlaps with the next counts. A decoupled run has no flush: its period per micro-batch counts, once it is full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import TypeAlias

from decoupled_pp.commands.plan.orders import PIPELINES, SPLIT, Operation, rank_of, stages_per_rank
from decoupled_pp.commands.plan.profile import Piece, Profile
from decoupled_pp.commands.plan.programs import Shape, decoupled, flushed
from decoupled_pp.commands.plan.simulate import Link, Span, Timeline, simulate

STRATEGIES = ("decoupled", *PIPELINES, "data_parallel", "backprop")

Cut: TypeAlias = Callable[..., tuple[int, ...]]
"""cut(seconds per layer, stages, for every stage but the last seconds of a critic after every layer, speeds=, fits=)
-> boundaries; see `partitioning.minmax_cut`."""


@dataclass(frozen=True)
class Setting:
    """How it is to run.

    Attributes:
        ranks: Number of ranks.
        micro_batches: Micro-batches per optimizer step of every strategy that is not decoupled.
        link: What the links are like.
        capacity: Packets a decoupled link may hold.
        accumulate: Micro-batches per optimizer step of a decoupled stage.
        speeds: Of the ranks' devices, relative to the one that was measured; empty: all alike.
        memory: Bytes of the ranks' devices; empty: no bound.
    """

    ranks: int
    micro_batches: int
    link: Link = field(default_factory=Link)
    capacity: int = 4
    accumulate: int = 1
    speeds: tuple[float, ...] = ()
    memory: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for counts below 1, and for devices that are not one for each rank."""
        for name in ("ranks", "micro_batches", "capacity", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("speeds", "memory"):
            given = getattr(self, name)
            if given and (len(given) != self.ranks or min(given) <= 0):
                raise ValueError(f"{name} {list(given)} must be {self.ranks} numbers above 0, one for each rank")


@dataclass(frozen=True)
class StageCosts:
    """One stage, in seconds and bytes of one micro-batch; its critic, if it has one, apart."""

    forward: float
    input_gradient: float
    weight_gradient: float
    step: float
    memory: int
    saved: int
    output: int = 0
    gradient: int = 0
    critic: float = 0.0
    critic_saved: int = 0

    @property
    def backward(self) -> float:
        """Seconds of the whole backward pass."""
        return self.input_gradient + self.weight_gradient


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank: parameters, gradients and optimizer state; saved activations at their peak; link buffers."""

    states: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it."""
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
    """What a strategy would take.

    Attributes:
        strategy: Its name.
        boundaries: Index of the first layer of every stage, then the number of layers.
        step_seconds: Seconds per `micro_batches` micro-batches in steady state.
        samples_per_second: Of the whole run.
        share_of_ideal: The busiest rank's own compute, back to back, over the step.
        bubble: Share of all ranks' time in which they do not compute.
        memory: Of every rank.
        traffic: Of every pair of ranks that talk, per sample.
    """

    strategy: str
    boundaries: tuple[int, ...]
    step_seconds: float
    samples_per_second: float
    share_of_ideal: float
    bubble: float
    memory: tuple[RankMemory, ...]
    traffic: tuple[Traffic, ...]


def predict(strategy: str, profile: Profile, setting: Setting, cut: Cut) -> Prediction:
    """What one strategy would take.

    Raises:
        ValueError: Unknown, or not possible with these ranks, layers and micro-batches; says why.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is not known; of {', '.join(STRATEGIES)}")
    if strategy in ("backprop", "data_parallel"):
        return _whole(strategy, profile, setting)
    own_critics = strategy == "decoupled"
    stages = setting.ranks * stages_per_rank(strategy)
    closing = (
        [critic.seconds if critic is not None else math.inf for critic in profile.critics] if own_critics else None
    )
    by_stage = None if closing is None else [[*closing, 0.0]] * (stages - 1)
    ranks = [rank_of(strategy, stage, setting.ranks) for stage in range(stages)]
    speeds = [setting.speeds[rank] for rank in ranks] if setting.speeds else None
    fits = _room(profile, setting) if own_critics and setting.memory else None
    boundaries = cut([layer.seconds for layer in profile.layers], stages, by_stage, speeds=speeds, fits=fits)
    costs = stage_costs(profile, boundaries, critics=own_critics)
    if speeds is not None:
        costs = [_at_speed(one, speed) for one, speed in zip(costs, speeds, strict=True)]
    found = predict_stages(strategy, costs, setting, profile.samples, boundaries)
    _refuse_overflow(strategy, found.memory, setting.memory)
    return found


def _at_speed(one: StageCosts, speed: float) -> StageCosts:
    times = ("forward", "input_gradient", "weight_gradient", "step", "critic")
    return replace(one, **{name: getattr(one, name) / speed for name in times})


def _room(profile: Profile, setting: Setting) -> Callable[[int, int, int], bool]:
    """Which decoupled stages fit: states and saved activations of layers and critic, and packets in the links."""
    sums = list(accumulate((layer.memory + layer.saved_bytes for layer in profile.layers), initial=0))
    critics = [critic.memory + critic.saved_beside if critic is not None else 0 for critic in (*profile.critics, None)]
    packets = [setting.capacity * (layer.output_bytes + profile.target_bytes) for layer in profile.layers]
    packets[-1] = 0

    def fits(stage: int, first: int, end: int) -> bool:
        buffers = packets[end - 1] + (packets[first - 1] if first else 0)
        return sums[end] - sums[first] + critics[end - 1] + buffers <= setting.memory[stage]

    return fits


def _refuse_overflow(strategy: str, memory: Sequence[RankMemory], limits: Sequence[int]) -> None:
    for rank, (one, limit) in enumerate(zip(memory, limits, strict=False)):
        if one.total > limit:
            raise ValueError(
                f"{strategy} needs {one.total / 2**20:.1f} MiB on rank {rank}, whose device has {limit / 2**20:.1f}"
            )


def predict_stages(
    strategy: str, costs: Sequence[StageCosts], setting: Setting, samples: int, boundaries: tuple[int, ...] = ()
) -> Prediction:
    """The same from the costs of the stages, for `decoupled` and the pipelines with a flush."""
    ranks, count = setting.ranks, setting.micro_batches
    sizes, gradients = tuple(one.output for one in costs[:-1]), tuple(one.gradient for one in costs[:-1])
    shape = Shape(strategy, ranks, sizes, gradients)
    if strategy == "decoupled":
        timeline, step, packets = _run_decoupled(shape, costs, setting)
        updates = count / setting.accumulate
    else:
        timeline, step, packets = _run_flushed(shape, costs, setting)
        updates = 1.0
    mine = [[s for s in range(shape.stages) if shape.rank_of(s) == rank] for rank in range(ranks)]
    busy = [
        sum(count * (costs[s].forward + costs[s].backward + costs[s].critic) + updates * costs[s].step for s in stages)
        for stages in mine
    ]
    memory = tuple(
        RankMemory(
            sum(costs[s].memory for s in mine[rank]), _peak(timeline.spans[rank], costs), _buffers(shape, setting, rank)
        )
        for rank in range(ranks)
    )
    return Prediction(
        strategy,
        boundaries,
        step,
        count * samples / step if step else math.inf,
        max(busy) / step if step else 1.0,
        1 - sum(busy) / ranks / step if step else 0.0,
        memory,
        _traffic(timeline, packets * samples),
    )


def stage_costs(profile: Profile, boundaries: Sequence[int], *, critics: bool) -> list[StageCosts]:
    """The costs of the stages of a cut, with the critics of all but the last or without."""
    costs = []
    for first, end in pairwise(boundaries):
        layers = profile.layers[first:end]
        critic = profile.critics[end - 1] if critics and end < len(profile.layers) else None
        owned: list[Piece] = [*layers, critic] if critic is not None else list(layers)
        costs.append(
            StageCosts(
                forward=sum(layer.forward for layer in layers),
                input_gradient=sum(layer.input_gradient for layer in layers),
                weight_gradient=sum(layer.weight_gradient for layer in layers),
                step=sum(piece.step for piece in owned),
                memory=sum(piece.memory for piece in owned),
                saved=layers[0].saved_bytes + sum(layer.saved_beside for layer in layers[1:]),
                output=layers[-1].output_bytes + (profile.target_bytes if critics else 0),
                gradient=0 if critics else layers[-1].gradient_bytes,
                critic=critic.seconds if critic is not None else 0.0,
                critic_saved=critic.saved_beside if critic is not None else 0,
            )
        )
    return costs


def seconds_of(strategy: str, costs: Sequence[StageCosts], ranks: int) -> Callable[[Operation], float]:
    """How long every operation takes.

    Of the first stage's input torch computes no gradient: its split backward is all in W (torch 2.13, `stage.py`,
    `backward_one_chunk`).
    """

    def seconds(operation: Operation) -> float:
        kind, stage, _ = operation
        if kind == "S" and strategy != "decoupled":  # of a rank, with all its stages
            return sum(cost.step for s, cost in enumerate(costs) if rank_of(strategy, s, ranks) == stage)
        one = costs[stage]
        if strategy in SPLIT and stage == 0 and kind in "IW":
            return 0.0 if kind == "I" else one.backward
        times = {"F": one.forward, "B": one.backward, "I": one.input_gradient, "W": one.weight_gradient}
        return {**times, "C": one.critic, "S": one.step}[kind]

    return seconds


def _run_flushed(shape: Shape, costs: Sequence[StageCosts], setting: Setting) -> tuple[Timeline, float, int]:
    """Timeline of three steps, seconds of the third, micro-batches in all."""
    seconds = seconds_of(shape.kind, costs, shape.ranks)
    timeline = simulate(flushed(shape, setting.micro_batches, 3), seconds, setting.link)
    ends = [
        max(span.end for spans in timeline.spans for span in spans if span.operation[::2] == ("S", step))
        for step in (1, 2)
    ]
    return timeline, ends[1] - ends[0], 3 * setting.micro_batches


def _run_decoupled(shape: Shape, costs: Sequence[StageCosts], setting: Setting) -> tuple[Timeline, float, int]:
    """Timeline, seconds per `micro_batches` packets once the pipeline is full, packets in all."""
    every = setting.accumulate
    half = every * math.ceil((2 * (shape.ranks + setting.capacity) + 8) / every)
    programs = decoupled(shape, setting.capacity, 2 * half, every)
    timeline = simulate(programs, seconds_of(shape.kind, costs, shape.ranks), setting.link)
    done = {span.operation.micro_batch: span.end for span in timeline.spans[-1]}  # the last span of a packet ends it
    return timeline, (done[2 * half - 1] - done[half - 1]) / half * setting.micro_batches, 2 * half


def _peak(spans: Sequence[Span], costs: Sequence[StageCosts]) -> int:
    """Largest number of bytes that autograd keeps on a rank: from F to the end of B or W, a critic's during C."""
    held = peak = 0
    for (kind, stage, _), _, _ in spans:
        held += costs[stage].saved if kind == "F" else 0
        peak = max(peak, held + (costs[stage].critic_saved if kind == "C" else 0))
        held -= costs[stage].saved if kind in "BW" else 0
    return peak


def _buffers(shape: Shape, setting: Setting, rank: int) -> int:
    """Bytes of a rank's link buffers.

    Decoupled: `capacity` packets at each end. torch: a receive buffer per micro-batch of a step and direction
    (`PipelineStage`, torch 2.13). DeepSpeed: inputs for `num_pipe_buffers`, one gradient.
    """
    total = 0
    for stage in range(shape.stages):
        if shape.rank_of(stage) != rank:
            continue
        into = shape.sizes[stage - 1] if stage and shape.rank_of(stage - 1) != rank else 0
        beyond = stage + 1 < shape.stages and shape.rank_of(stage + 1) != rank
        if shape.kind == "decoupled":
            total += setting.capacity * (into + (shape.sizes[stage] if beyond else 0))
            continue
        back = shape.gradient_sizes[stage] if beyond else 0
        if shape.kind == "deepspeed":
            total += max(2, min(shape.stages - stage + 1, setting.micro_batches)) * into + back
        else:
            total += setting.micro_batches * (into + back)
    return total


def _traffic(timeline: Timeline, samples: int) -> tuple[Traffic, ...]:
    ways = sorted({(source, target) for source, target, _ in timeline.bytes_sent})
    kinds = ("activation", "gradient", "credit")
    return tuple(Traffic(*way, *(timeline.bytes_sent.get((*way, kind), 0) / samples for kind in kinds)) for way in ways)


def ring_all_reduce(size: float, ranks: int, link: Link) -> float:
    """Seconds of a ring all-reduce: 2 (d - 1) messages of a d-th of the bytes, one after the other."""
    if ranks == 1:
        return 0.0
    return 2 * (ranks - 1) * (size / ranks / link.bandwidth + link.latency + 2 * link.host)


def _whole(strategy: str, profile: Profile, setting: Setting) -> Prediction:
    """`backprop` and `data_parallel`: the whole network on every rank.

    The all-reduce begins with the last micro-batch's backward, as DDP's buckets do; what is longer than that counts.
    """
    (one,) = stage_costs(profile, (0, len(profile.layers)), critics=False)
    ranks = setting.ranks if strategy == "data_parallel" else 1
    if setting.speeds:  # replicas wait for the slowest
        one = _at_speed(one, min(setting.speeds[:ranks]))
    count = setting.micro_batches
    if count % ranks:
        raise ValueError(
            f"data_parallel: {count} micro-batches per step cannot be shared by {ranks} ranks evenly; "
            f"use a multiple of {ranks}"
        )
    gradients = sum(layer.parameter_bytes for layer in profile.layers)
    exposed = max(0.0, ring_all_reduce(gradients, ranks, setting.link) - one.backward)
    busy = count // ranks * (one.forward + one.backward) + one.step
    step = busy + exposed
    share = busy / step if step else 1.0
    memory = RankMemory(one.memory, one.saved, gradients if ranks > 1 else 0)  # DDP's buckets are copies
    sent = 2 * (ranks - 1) / ranks * gradients / (count * profile.samples)
    traffic = [Traffic(rank, (rank + 1) % ranks, 0.0, sent) for rank in range(ranks)] if ranks > 1 else []
    _refuse_overflow(strategy, (memory,) * ranks, setting.memory)
    rate = count * profile.samples / step if step else math.inf
    bounds = (0, len(profile.layers))
    return Prediction(strategy, bounds, step, rate, share, 1 - share, (memory,) * ranks, tuple(traffic))
