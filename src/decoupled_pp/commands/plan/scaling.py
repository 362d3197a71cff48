"""Scaling curves: a transformer on more and more devices, as pipelines side by side. No torch.

Devices = depth x replicas. The depth of a pipeline is the largest divisor of the devices that leaves every stage a
block (or `depth`); the rest are replicas, which share the micro-batches of a step and add up their gradients.

Long steps are not simulated in full. With equal stages a step takes T(p, m) seconds, which is affine in m once the
pipeline is full, and affine along p = t p0, m = t m0; so two smaller simulations give the rest (`step_seconds`; the
tests compare it with full simulations).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from decoupled_pp.commands.plan.orders import stages_per_rank
from decoupled_pp.commands.plan.predict import (
    STRATEGIES,
    RankMemory,
    Setting,
    StageCosts,
    predict_stages,
    ring_all_reduce,
)
from decoupled_pp.commands.plan.simulate import Link
from decoupled_pp.commands.plan.transformer import BYTES_PER_PARAMETER, GRADIENT_BYTES, Transformer

_FULL_ROUNDS = 3
_LONG_ROUNDS = 4
_DEEP = 32


@dataclass(frozen=True)
class Point:
    """One strategy on so many devices.

    Attributes:
        strategy: Its name.
        devices: In all.
        depth: Ranks of a pipeline.
        replicas: Pipelines side by side.
        micro_batches: Of one pipeline and step.
        step_seconds: Of an optimizer step.
        tokens_per_second: Of all devices.
        efficiency: Time that the network's forward and backward (critics left out) would keep all devices busy, over
            the step.
        memory: Bytes of the fullest device.
    """

    strategy: str
    devices: int
    depth: int
    replicas: int
    micro_batches: int
    step_seconds: float
    tokens_per_second: float
    efficiency: float
    memory: int


@dataclass(frozen=True)
class Scale:
    """What is scaled.

    Attributes:
        model: The network and its devices.
        link: Between any two devices.
        micro_batches: Per optimizer step: of the whole run, or (`weak`) of every replica.
        weak: Whether more replicas mean a larger batch.
        depth: Deepest pipeline; 0 for as deep as there are blocks.
        capacity: Packets a decoupled link may hold.
    """

    model: Transformer
    link: Link
    micro_batches: int = 1024
    weak: bool = False
    depth: int = 0
    capacity: int = 4


def curve(strategy: str, scale: Scale, devices: Sequence[int]) -> list[Point | str]:
    """A point for every number of devices, or why there is none."""
    points: list[Point | str] = []
    for count in devices:
        try:
            points.append(point(strategy, scale, count))
        except ValueError as error:
            points.append(str(error))
    return points


def point(strategy: str, scale: Scale, devices: int) -> Point:
    """One strategy on so many devices.

    Raises:
        ValueError: It cannot run there; says why.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is not known; of {', '.join(STRATEGIES)}")
    if devices < 1 or scale.micro_batches < 1 or scale.depth < 0 or scale.capacity < 1:
        raise ValueError(
            f"devices {devices}, micro-batches {scale.micro_batches} and capacity {scale.capacity} must be at least 1"
        )
    if strategy == "backprop" and devices > 1:
        raise ValueError(f"backprop runs on one device, not {devices}")
    model = scale.model
    depth = 1 if strategy in ("data_parallel", "backprop") else pipeline_depth(strategy, scale, devices)
    replicas = devices // depth
    count = scale.micro_batches if scale.weak else scale.micro_batches // replicas
    if not scale.weak and count * replicas != scale.micro_batches:
        raise ValueError(
            f"{scale.micro_batches} micro-batches per step cannot be shared by {replicas} replicas evenly; "
            f"use a multiple of {replicas}"
        )
    if depth == 1:
        step, memory = _without_pipeline(scale, replicas, count)
    else:
        step, memory = _pipeline(strategy, scale, depth, replicas, count)
    work = count * replicas
    return Point(
        strategy,
        devices,
        depth,
        replicas,
        count,
        step,
        work * model.tokens / step,
        work * model.seconds / devices / step,
        memory.total,
    )


def pipeline_depth(strategy: str, scale: Scale, devices: int) -> int:
    """The largest divisor of the devices that leaves every stage a block, and is no more than asked for."""
    most = scale.model.layers // stages_per_rank(strategy)
    most = min(most, scale.depth) if scale.depth else most
    return max(d for d in range(1, min(most, devices) + 1) if devices % d == 0) if most else 1


def _exposed(scale: Scale, parameters: float, replicas: int, backward: float) -> float:
    """What the replicas' all-reduce takes beyond the last backward pass, under which it begins."""
    return max(0.0, ring_all_reduce(GRADIENT_BYTES * parameters, replicas, scale.link) - backward)


def _without_pipeline(scale: Scale, replicas: int, count: int) -> tuple[float, RankMemory]:
    (one,) = scale.model.stages(1, critics=False)
    step = count * scale.model.seconds + _exposed(scale, scale.model.total_parameters, replicas, one.backward)
    return step, RankMemory(round(BYTES_PER_PARAMETER * scale.model.total_parameters), one.saved, 0)


def _pipeline(strategy: str, scale: Scale, depth: int, replicas: int, count: int) -> tuple[float, RankMemory]:
    """Seconds of a step and the fullest device. A decoupled stage updates as often as the others: once a step."""
    own_critics = strategy == "decoupled"
    stages = depth * stages_per_rank(strategy)
    share = 1 + scale.model.critic_share if own_critics else 1.0
    (bare, *_) = scale.model.stages(stages, critics=own_critics)
    gradients = scale.model.total_parameters / depth * share
    wait = _exposed(scale, gradients, replicas, bare.backward) / stages_per_rank(strategy)
    costs = scale.model.stages(stages, critics=own_critics, step=wait)
    setting = Setting(depth, count, scale.link, scale.capacity, count if own_critics else 1)
    return step_seconds(strategy, costs, setting)


def step_seconds(
    strategy: str, costs: Sequence[StageCosts], setting: Setting, *, deep: int = _DEEP
) -> tuple[float, RankMemory]:
    """Seconds of a step of equal stages, and the fullest rank, without simulating long steps or deep pipelines in full.

    - decoupled: the period per packet does not depend on the depth; 8 ranks are simulated.
    - m above 4 p: affine in m, from m = 3 p and 4 p (plus what m lacks to a multiple of p).
    - p above 2 `deep` and m a multiple of p: affine along the ray, from `deep` and 2 `deep` ranks.

    Raises:
        ValueError: The schedule refuses the numbers.
    """
    ranks, count = setting.ranks, setting.micro_batches
    if strategy == "decoupled":
        few = [*costs[: min(ranks, 8) - 1], costs[-1]]
        once = replace(setting, ranks=len(few), accumulate=1)
        plain = [replace(one, step=0.0) for one in few]
        prediction = predict_stages(strategy, plain, once, 1)
        waits = max(one.step for one in costs) * count / setting.accumulate
        return prediction.step_seconds + waits, max(prediction.memory, key=lambda one: one.total)
    if count > _LONG_ROUNDS * ranks:
        over = count % ranks
        near, far = (_FULL_ROUNDS * ranks + over, _LONG_ROUNDS * ranks + over)
        if count > far:
            return _line(strategy, costs, [replace(setting, micro_batches=m) for m in (near, far)], setting)
    if ranks > 2 * deep and count % ranks == 0:
        rounds = count // ranks
        sizes = [replace(setting, ranks=p, micro_batches=p * rounds) for p in (deep, 2 * deep)]
        return _line(strategy, costs, sizes, setting)
    prediction = predict_stages(strategy, costs, setting, 1)
    return prediction.step_seconds, max(prediction.memory, key=lambda one: one.total)


def _line(
    strategy: str, costs: Sequence[StageCosts], settings: Sequence[Setting], aim: Setting
) -> tuple[float, RankMemory]:
    """The line through the steps of two settings, at a third; memory along the same line."""
    per_rank = stages_per_rank(strategy)
    values = [step_seconds(strategy, list(costs[: one.ranks * per_rank]), one) for one in settings]
    near, far = settings
    share = (aim.micro_batches - near.micro_batches) / (far.micro_batches - near.micro_batches)

    def at(low: float, high: float) -> float:
        return low + (high - low) * share

    (low_step, low), (high_step, high) = values
    return at(low_step, high_step), RankMemory(
        round(at(low.states, high.states)),
        round(at(low.activations, high.activations)),
        round(at(low.buffers, high.buffers)),
    )
