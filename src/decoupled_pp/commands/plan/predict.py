"""Predicts what a strategy would take: time, bubble, memory of ranks, traffic of links. No torch.

The step of a flushed pipeline is its period in steady state: the third of three simulated steps, so that what one
step overlaps with the next counts. A decoupled run has no flush: its period per micro-batch counts, once it is full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from decoupled_pp.commands.plan.costs import StageCosts, seconds_of, stage_costs
from decoupled_pp.commands.plan.memory import RankMemory, fits_in, rank_memory, refuse_overflow
from decoupled_pp.commands.plan.orders import PIPELINES, rank_of, stages_per_rank
from decoupled_pp.commands.plan.profile import Profile
from decoupled_pp.commands.plan.programs import PipelineShape, decoupled, flushed
from decoupled_pp.commands.plan.simulate import Link, Timeline, simulate
from decoupled_pp.core.errors import UsageError

STRATEGIES = ("decoupled", *PIPELINES, "data_parallel", "backprop")

Cut: TypeAlias = Callable[..., tuple[int, ...]]
"""Cuts a list of layers, as `models.cutting.minmax_cut` does: (seconds per layer, number of stages, for every stage but
the last the seconds of a critic after every layer, speeds=, fits=) -> boundaries."""


@dataclass(frozen=True)
class Setting:
    """Ranks, links and batch that a prediction is for.

    Attributes:
        ranks: Number of ranks.
        micro_batches: Micro-batches per optimizer step of every strategy that is not decoupled.
        link: Every link between two ranks.
        capacity: Packets a decoupled link may hold.
        accumulate: Micro-batches per optimizer step of a decoupled stage.
        speeds: Speeds of the ranks' devices, relative to the one that was measured; empty: all alike.
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
class Traffic:
    """Bytes per sample from one rank to another: activations (and targets), gradients, credits."""

    source: int
    target: int
    activations: float
    gradients: float
    credits: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Prediction for one strategy.

    Attributes:
        strategy: Its name.
        boundaries: Index of the first layer of every stage, then the number of layers.
        step_seconds: Seconds per `micro_batches` micro-batches in steady state.
        samples_per_second: Samples per second of the whole run.
        share_of_ideal: The busiest rank's own compute, back to back, over the step.
        bubble: Share of all ranks' time in which they do not compute.
        memory: Memory of every rank.
        traffic: Traffic of every pair of ranks that exchange messages, per sample.
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
    """Predicts one strategy.

    Args:
        strategy: One of `STRATEGIES`.
        profile: Costs of the network.
        setting: Ranks, links and batch.
        cut: Cuts the network into stages.

    Raises:
        UsageError: The strategy is unknown, or does not go with these ranks, layers and micro-batches.
    """
    check_known(strategy)
    if strategy in ("backprop", "data_parallel"):
        return _predict_whole(strategy, profile, setting)
    stages = setting.ranks * stages_per_rank(strategy)
    options: dict[str, Any] = {"speeds": None, "fits": None}
    if setting.speeds:
        options["speeds"] = [setting.speeds[rank_of(strategy, stage, setting.ranks)] for stage in range(stages)]
    critics = None
    if strategy == "decoupled":
        after = [math.inf if critic is None else critic.seconds for critic in profile.critics]
        critics = [[*after, 0.0]] * (stages - 1)
        if setting.memory:
            options["fits"] = fits_in(profile, setting.capacity, setting.memory)
    boundaries = cut([layer.seconds for layer in profile.layers], stages, critics, **options)
    costs = stage_costs(profile, boundaries, critics=strategy == "decoupled")
    if setting.speeds:
        costs = [one.at_speed(speed) for one, speed in zip(costs, options["speeds"], strict=True)]
    found = predict_stages(strategy, costs, setting, profile.samples, boundaries)
    refuse_overflow(strategy, found.memory, setting.memory)
    return found


def check_known(strategy: str) -> None:
    """Raises UsageError for a strategy that is not in `STRATEGIES`."""
    if strategy not in STRATEGIES:
        raise UsageError(
            f"strategy {strategy!r} is unknown; choose from {', '.join(STRATEGIES)}",
            code="unknown-strategy",
            key="strategy",
        )


def predict_stages(
    strategy: str, costs: Sequence[StageCosts], setting: Setting, samples: int, boundaries: tuple[int, ...] = ()
) -> Prediction:
    """Predicts `decoupled` or a pipeline with a flush from the costs of its stages.

    Args:
        strategy: Its name.
        costs: Costs of every stage.
        setting: Ranks, links and batch.
        samples: Samples of a micro-batch.
        boundaries: The cut, to be kept in the prediction.
    """
    ranks = setting.ranks
    count = setting.micro_batches
    sizes = tuple(one.output for one in costs[:-1])
    gradients = tuple(one.gradient for one in costs[:-1])
    shape = PipelineShape(strategy, ranks, sizes, gradients)
    if strategy == "decoupled":
        timeline, step, packets = _run_decoupled(shape, costs, setting)
        updates = count / setting.accumulate
    else:
        timeline, step, packets = _run_flushed(shape, costs, setting)
        updates = 1.0
    per_stage = [count * (one.forward + one.backward + one.critic) + updates * one.step for one in costs]
    busy = [sum(per_stage[stage] for stage in shape.stages_of(rank)) for rank in range(ranks)]
    memory = [
        rank_memory(
            shape, costs, timeline.spans[rank], rank, capacity=setting.capacity, micro_batches=setting.micro_batches
        )
        for rank in range(ranks)
    ]
    return Prediction(
        strategy=strategy,
        boundaries=boundaries,
        step_seconds=step,
        samples_per_second=count * samples / step if step else math.inf,
        share_of_ideal=max(busy) / step if step else 1.0,
        bubble=1 - sum(busy) / ranks / step if step else 0.0,
        memory=tuple(memory),
        traffic=_traffic(timeline, packets * samples),
    )


def _run_flushed(shape: PipelineShape, costs: Sequence[StageCosts], setting: Setting) -> tuple[Timeline, float, int]:
    """Returns the timeline of three steps, the seconds of the third, and the number of micro-batches in all."""
    seconds = seconds_of(shape.kind, costs, shape.ranks)
    timeline = simulate(flushed(shape, setting.micro_batches, 3), seconds, setting.link)

    def end_of(step: int) -> float:
        return max(timeline.end_of_step(rank, step) for rank in range(shape.ranks))

    return timeline, end_of(2) - end_of(1), 3 * setting.micro_batches


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


def _traffic(timeline: Timeline, samples: int) -> tuple[Traffic, ...]:
    pairs = sorted({(source, target) for source, target, _ in timeline.bytes_sent})

    def per_sample(pair: tuple[int, int], kind: str) -> float:
        return timeline.bytes_sent.get((*pair, kind), 0) / samples

    kinds = ("activation", "gradient", "credit")
    return tuple(Traffic(*pair, *(per_sample(pair, kind) for kind in kinds)) for pair in pairs)


def ring_all_reduce(size: float, ranks: int, link: Link) -> float:
    """Returns the seconds of a ring all-reduce of d ranks: 2 (d - 1) messages of a d-th of the bytes, one by one."""
    if ranks == 1:
        return 0.0
    return 2 * (ranks - 1) * (size / ranks / link.bandwidth + link.latency + 2 * link.host)


def _predict_whole(strategy: str, profile: Profile, setting: Setting) -> Prediction:
    """Predicts `backprop` and `data_parallel`, which have the whole network on every rank.

    The all-reduce begins with the last micro-batch's backward pass, as DDP's buckets do; only its excess counts.
    """
    boundaries = (0, len(profile.layers))
    (whole,) = stage_costs(profile, boundaries, critics=False)
    ranks = setting.ranks if strategy == "data_parallel" else 1
    if setting.speeds:
        whole = whole.at_speed(min(setting.speeds[:ranks]))  # replicas wait for the slowest
    count = setting.micro_batches
    check_shared_evenly(count, ranks, "ranks")
    gradients = sum(layer.parameter_bytes for layer in profile.layers)
    exposed = max(0.0, ring_all_reduce(gradients, ranks, setting.link) - whole.backward)
    busy = count // ranks * (whole.forward + whole.backward) + whole.step
    step = busy + exposed
    share = busy / step if step else 1.0
    buffers = gradients if ranks > 1 else 0  # DDP's buckets are copies
    memory = (RankMemory(whole.memory, whole.saved, buffers),) * ranks
    refuse_overflow(strategy, memory, setting.memory)
    sent = 2 * (ranks - 1) / ranks * gradients / (count * profile.samples)
    ring = [Traffic(rank, (rank + 1) % ranks, 0.0, sent) for rank in range(ranks)]
    return Prediction(
        strategy=strategy,
        boundaries=boundaries,
        step_seconds=step,
        samples_per_second=count * profile.samples / step if step else math.inf,
        share_of_ideal=share,
        bubble=1 - share,
        memory=memory,
        traffic=tuple(ring) if ranks > 1 else (),
    )


def check_shared_evenly(micro_batches: int, among: int, name: str) -> None:
    """Raises UsageError if a step's micro-batches do not divide evenly among ranks or replicas."""
    if micro_batches % among:
        raise UsageError(
            f"{micro_batches} micro-batches per step cannot be shared by {among} {name} evenly; "
            f"use a multiple of {among}",
            code="schedule-does-not-fit",
        )
