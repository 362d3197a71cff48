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
from decoupled_pp.commands.plan.orders import stages_per_rank
from decoupled_pp.commands.plan.predict import Setting, check_shared_evenly, exposed_all_reduce, predict_stages
from decoupled_pp.commands.plan.simulate import Link
from decoupled_pp.commands.plan.transformer import GRADIENT_BYTES, Transformer
from decoupled_pp.core.errors import UsageError

_FULL_ROUNDS = 3
_LONG_ROUNDS = 4
_DEEP = 32


@dataclass(frozen=True)
class Point:
    """Prediction for one strategy on a number of devices."""

    strategy: str
    devices: int
    depth: int  # ranks of a pipeline
    replicas: int  # pipelines side by side
    micro_batches: int  # of one pipeline and step
    step_seconds: float
    tokens_per_second: float  # of all devices
    efficiency: float  # time that the network without critics would keep all devices busy, over the step
    memory: int  # bytes of the fullest device


@dataclass(frozen=True)
class Scale:
    """A network, its batch and its links, without the number of devices."""

    model: Transformer
    link: Link  # between any two devices
    micro_batches: int = 1024  # per optimizer step: of the whole run, or (`weak`) of every replica
    weak: bool = False  # more replicas mean a larger batch
    depth: int = 0  # of the deepest pipeline; 0 for as deep as there are blocks
    capacity: int = 4  # packets that a decoupled link may hold


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
    """Predicts one strategy on a number of devices, or raises UsageError if it cannot run there."""
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
    step, memory = _step(strategy, scale, depth, replicas, count)
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
        memory=memory,
    )


def pipeline_depth(strategy: str, scale: Scale, devices: int) -> int:
    """Returns the largest divisor of the devices that leaves every stage a block, and is no more than asked for."""
    most = min(devices, scale.model.layers // stages_per_rank(strategy))
    if scale.depth:
        most = min(most, scale.depth)
    return max((depth for depth in range(1, most + 1) if devices % depth == 0), default=1)


def _step(strategy: str, scale: Scale, depth: int, replicas: int, count: int) -> tuple[float, int]:
    """Returns the seconds of a step, in which decoupled stages, too, update once, and the fullest device's bytes."""
    model = scale.model
    critics = strategy == "decoupled" and depth > 1
    per_rank = stages_per_rank(strategy) if depth > 1 else 1
    share = 1 + model.critic_share if critics else 1.0
    gradients = GRADIENT_BYTES * (model.total_parameters / depth * share)
    first = model.stages(depth * per_rank, critics=critics)[0]
    exposed = exposed_all_reduce(gradients, replicas, scale.link, first.backward)
    if depth == 1:  # nothing to simulate: the whole network on every device
        return count * model.seconds + exposed, first.memory + first.saved
    costs = model.stages(depth * per_rank, critics=critics, step=exposed / per_rank)
    return step_seconds(strategy, costs, Setting(depth, count, scale.link, scale.capacity, count if critics else 1))


def step_seconds(
    strategy: str, costs: Sequence[StageCosts], setting: Setting, *, deep: int = _DEEP
) -> tuple[float, int]:
    """Returns the seconds of a step of equal stages and the bytes of the fullest rank; long steps are extrapolated.

    - decoupled: the period per packet does not depend on the depth; 8 ranks are simulated.
    - m above 4 p: affine in m, from m = 3 p and 4 p (plus what m lacks to a multiple of p).
    - p above 2 `deep` and m a multiple of p: affine along the ray, from `deep` and 2 `deep` ranks.
    """
    ranks, count = setting.ranks, setting.micro_batches
    waits = 0.0
    if strategy == "decoupled":
        # With an update every `accumulate` packets as many would have to be simulated; the longest is added instead.
        waits = max(one.step for one in costs) * count / setting.accumulate
        costs = [replace(one, step=0.0) for one in (*costs[: min(ranks, 8) - 1], costs[-1])]
        setting = replace(setting, ranks=len(costs), accumulate=1)
    elif count > _LONG_ROUNDS * ranks + count % ranks:
        over = count % ranks
        near = replace(setting, micro_batches=_FULL_ROUNDS * ranks + over)
        far = replace(setting, micro_batches=_LONG_ROUNDS * ranks + over)
        return _extrapolate(strategy, costs, near, far, setting)
    elif ranks > 2 * deep and count % ranks == 0:
        rounds = count // ranks
        near = replace(setting, ranks=deep, micro_batches=deep * rounds)
        far = replace(setting, ranks=2 * deep, micro_batches=2 * deep * rounds)
        return _extrapolate(strategy, costs, near, far, setting)
    prediction = predict_stages(strategy, costs, setting, 1)
    return prediction.step_seconds + waits, max(one.total for one in prediction.memory)


def _extrapolate(
    strategy: str, costs: Sequence[StageCosts], near: Setting, far: Setting, aim: Setting
) -> tuple[float, int]:
    """Extrapolates the steps of two settings to a third along a line, and memory likewise."""
    per_rank = stages_per_rank(strategy)
    near_step, near_memory = step_seconds(strategy, costs[: near.ranks * per_rank], near)
    far_step, far_memory = step_seconds(strategy, costs[: far.ranks * per_rank], far)
    share = (aim.micro_batches - near.micro_batches) / (far.micro_batches - near.micro_batches)
    step = near_step + (far_step - near_step) * share
    return step, round(near_memory + (far_memory - near_memory) * share)
