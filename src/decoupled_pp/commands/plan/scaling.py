"""Computes scaling curves: a transformer on more and more devices, as pipelines side by side. No torch.

Devices = depth x replicas. The depth of a pipeline is the largest divisor of the devices that leaves every stage a
block (or `depth`); the rest are replicas, which share the micro-batches of a step and add up their gradients.

Long steps are not simulated in full. With equal stages a step takes T(p, m) seconds, which is affine in m once the
pipeline is full, and affine along p = t p0, m = t m0; so two smaller simulations give the rest (`step_seconds`; the
tests compare it with full simulations).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from decoupled_pp.commands.plan.costs import StageCosts
from decoupled_pp.commands.plan.memory import RankMemory
from decoupled_pp.commands.plan.orders import stages_per_rank
from decoupled_pp.commands.plan.predict import (
    Setting,
    check_known,
    check_shared_evenly,
    predict_stages,
    ring_all_reduce,
)
from decoupled_pp.commands.plan.simulate import Link
from decoupled_pp.commands.plan.transformer import BYTES_PER_PARAMETER, GRADIENT_BYTES, Transformer
from decoupled_pp.core.errors import UsageError

_FULL_ROUNDS = 3
_LONG_ROUNDS = 4
_DEEP = 32


@dataclass(frozen=True)
class Point:
    """Prediction for one strategy on a number of devices.

    Attributes:
        strategy: Name of the strategy.
        devices: Number of devices.
        depth: Ranks of a pipeline.
        replicas: Pipelines side by side.
        micro_batches: Micro-batches of one pipeline and step.
        step_seconds: Seconds of an optimizer step.
        tokens_per_second: Tokens per second of all devices.
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
    """A network, its batch and its links, without the number of devices.

    Attributes:
        model: The network and its devices.
        link: Link between any two devices.
        micro_batches: Per optimizer step: of the whole run, or (`weak`) of every replica.
        weak: True if more replicas mean a larger batch.
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
    """Returns a point for every number of devices, or the reason why there is none."""
    points: list[Point | str] = []
    for count in devices:
        try:
            points.append(point(strategy, scale, count))
        except UsageError as error:
            points.append(str(error))
    return points


def point(strategy: str, scale: Scale, devices: int) -> Point:
    """Predicts one strategy on a number of devices.

    Raises:
        UsageError: It cannot run there; says why.
    """
    check_known(strategy)
    if devices < 1 or scale.micro_batches < 1 or scale.depth < 0 or scale.capacity < 1:
        raise UsageError(
            f"devices {devices}, micro-batches {scale.micro_batches} and capacity {scale.capacity} must be at least 1",
            code="option-out-of-range",
        )
    if strategy == "backprop" and devices > 1:
        raise UsageError(f"backprop runs on one device, not {devices}", code="schedule-does-not-fit")
    model = scale.model
    depth = 1 if strategy in ("data_parallel", "backprop") else pipeline_depth(strategy, scale, devices)
    replicas = devices // depth
    count = scale.micro_batches
    if not scale.weak:
        check_shared_evenly(count, replicas, "replicas")
        count //= replicas
    if depth == 1:
        step, memory = _without_pipeline(scale, replicas, count)
    else:
        step, memory = _pipeline(strategy, scale, depth, replicas, count)
    work = count * replicas
    return Point(
        strategy=strategy,
        devices=devices,
        depth=depth,
        replicas=replicas,
        micro_batches=count,
        step_seconds=step,
        tokens_per_second=work * model.tokens / step,
        efficiency=work * model.seconds / devices / step,
        memory=memory.total,
    )


def pipeline_depth(strategy: str, scale: Scale, devices: int) -> int:
    """Returns the largest divisor of the devices that leaves every stage a block, and is no more than asked for."""
    most = min(devices, scale.model.layers // stages_per_rank(strategy))
    if scale.depth:
        most = min(most, scale.depth)
    return max((depth for depth in range(1, most + 1) if devices % depth == 0), default=1)


def _exposed(scale: Scale, parameters: float, replicas: int, backward: float) -> float:
    """Returns the seconds of the replicas' all-reduce that the last backward pass does not hide."""
    return max(0.0, ring_all_reduce(GRADIENT_BYTES * parameters, replicas, scale.link) - backward)


def _without_pipeline(scale: Scale, replicas: int, count: int) -> tuple[float, RankMemory]:
    """Returns the seconds of a step with the whole network on every device, and a device's memory."""
    (one,) = scale.model.stages(1, critics=False)
    step = count * scale.model.seconds + _exposed(scale, scale.model.total_parameters, replicas, one.backward)
    return step, RankMemory(round(BYTES_PER_PARAMETER * scale.model.total_parameters), one.saved, 0)


def _pipeline(strategy: str, scale: Scale, depth: int, replicas: int, count: int) -> tuple[float, RankMemory]:
    """Returns the seconds of a step and the fullest device. A decoupled stage, too, updates once a step."""
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
    """Returns the seconds of a step of equal stages and the fullest rank, without simulating all of a long step.

    - decoupled: the period per packet does not depend on the depth; 8 ranks are simulated.
    - m above 4 p: affine in m, from m = 3 p and 4 p (plus what m lacks to a multiple of p).
    - p above 2 `deep` and m a multiple of p: affine along the ray, from `deep` and 2 `deep` ranks.

    Raises:
        UsageError: The schedule refuses the numbers.
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
        near = replace(setting, micro_batches=_FULL_ROUNDS * ranks + over)
        far = replace(setting, micro_batches=_LONG_ROUNDS * ranks + over)
        if count > far.micro_batches:
            return _extrapolate(strategy, costs, near, far, setting)
    if ranks > 2 * deep and count % ranks == 0:
        rounds = count // ranks
        near = replace(setting, ranks=deep, micro_batches=deep * rounds)
        far = replace(setting, ranks=2 * deep, micro_batches=2 * deep * rounds)
        return _extrapolate(strategy, costs, near, far, setting)
    prediction = predict_stages(strategy, costs, setting, 1)
    return prediction.step_seconds, max(prediction.memory, key=lambda one: one.total)


def _extrapolate(
    strategy: str, costs: Sequence[StageCosts], near: Setting, far: Setting, aim: Setting
) -> tuple[float, RankMemory]:
    """Extrapolates the steps of two settings to a third along a line, and memory likewise."""
    per_rank = stages_per_rank(strategy)
    near_step, near_memory = step_seconds(strategy, costs[: near.ranks * per_rank], near)
    far_step, far_memory = step_seconds(strategy, costs[: far.ranks * per_rank], far)
    share = (aim.micro_batches - near.micro_batches) / (far.micro_batches - near.micro_batches)

    def at(low: float, high: float) -> float:
        return low + (high - low) * share

    memory = RankMemory(
        states=round(at(near_memory.states, far_memory.states)),
        activations=round(at(near_memory.activations, far_memory.activations)),
        buffers=round(at(near_memory.buffers, far_memory.buffers)),
    )
    return at(near_step, far_step), memory
