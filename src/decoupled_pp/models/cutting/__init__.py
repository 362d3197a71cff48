"""From a list of layers to a plan: measure, cut, check.

Named so because `dpp.partition` is the public function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import CriticBuilder, CriticContext
from decoupled_pp.core.packets import Loss, Payload
from decoupled_pp.core.plans import Plan, count_parameters
from decoupled_pp.models.cutting.cut import Fits, listed_cut, minmax_cut, uniform_cut
from decoupled_pp.models.cutting.layers import as_sequential, critic_context, present, trace
from decoupled_pp.models.cutting.measure import (
    Objective,
    measure_critics,
    measure_layers,
    measure_passes,
    stand_in_objective,
)
from decoupled_pp.models.cutting.shared import refuse_shared

__all__ = [
    "By",
    "Devices",
    "Fits",
    "as_sequential",
    "critic_context",
    "cut_network",
    "listed_cut",
    "measure_critics",
    "measure_layers",
    "measure_passes",
    "minmax_cut",
    "refuse_shared",
    "stand_in_objective",
    "trace",
    "uniform_cut",
]

By: TypeAlias = Literal["time", "parameters", "uniform"] | list[int]
"""Balance stages by measured time, by parameters, by number of layers; or the layers per stage."""

_CPU = torch.device("cpu")

_Traced: TypeAlias = tuple[list[Payload], Tensor]


_Cost: TypeAlias = "float | UsageError"
"""Of a critic, or why none can be there."""


def _candidates(module: nn.Sequential, traced: _Traced, stages: int) -> list[CriticContext]:
    """A context for every stage but the last and every place where it can end: each other stage needs a layer too."""
    spare = len(module) - stages
    return [
        critic_context(module, *traced, boundary=boundary, stage=stage, stages=stages)
        for stage in range(stages - 1)
        for boundary in range(stage + 1, stage + spare + 2)
    ]


@dataclass(frozen=True)
class Devices:
    """What a balanced cut has to respect.

    Attributes:
        places: Boundaries to choose from (`cut_after`); None: all.
        speeds: Of the device of every stage, relative to each other; None: all alike.
        fits: Which stages have room on their device; None: all.
    """

    places: Sequence[int] | None = None
    speeds: Sequence[float] | None = None
    fits: Fits | None = None

    def cut(self, costs: Sequence[float], stages: int, closing: Sequence[Sequence[float]] | None) -> tuple[int, ...]:
        """The best cut (`minmax_cut`)."""
        return minmax_cut(costs, stages, closing, speeds=self.speeds, fits=self.fits)


def _only_at(places: Sequence[int] | None, layers: int, stages: int) -> list[list[float]] | None:
    """Closing costs that leave only these places to cut: nothing there, infinity elsewhere."""
    if places is None:
        return None
    if stages > len(places) + 1:
        raise UsageError(f"stages is {stages} but the network is marked to be cut in {len(places)} places; mark more")
    row = [0.0 if end in places else math.inf for end in range(1, layers + 1)]
    return [list(row) for _ in range(stages - 1)]


def _balanced(
    costs: Sequence[float],
    stages: int,
    contexts: Sequence[CriticContext],
    critics: Sequence[_Cost],
    devices: Devices,
) -> tuple[int, ...]:
    """The best cut; where no critic can be built is no place for one. If that leaves none, why is raised.

    A critic's cost is that of the very stage it would belong to: AugLocal's is deeper near the input.
    """
    closing = [[math.inf] * len(costs) for _ in range(stages - 1)]
    for context, cost in zip(contexts, critics, strict=True):
        may = devices.places is None or context.boundary in devices.places
        closing[context.stage][context.boundary - 1] = cost if may and not isinstance(cost, UsageError) else math.inf
    try:
        return devices.cut(costs, stages, closing)
    except UsageError as error:
        raise next((cost for cost in critics if isinstance(cost, UsageError)), error) from error


def _parameters_of(critic: CriticBuilder, context: CriticContext) -> _Cost:
    try:
        with torch.random.fork_rng(devices=[]):
            return float(count_parameters(critic(context)))
    except UsageError as error:
        return error


def _cut_by_parameters(
    module: nn.Sequential, stages: int, traced: _Traced | None, critic: CriticBuilder | None, devices: Devices
) -> tuple[int, ...]:
    parameters = [float(count_parameters(layer)) for layer in module]
    if critic is None or stages == 1:
        return devices.cut(parameters, stages, _only_at(devices.places, len(parameters), stages))
    if traced is None:
        raise UsageError(
            "cut 'parameters' counts the critics, and needs a sample to build them for; pass sample or critic=None"
        )
    contexts = _candidates(module, traced, stages)
    return _balanced(parameters, stages, contexts, [_parameters_of(critic, context) for context in contexts], devices)


def _cut_by_time(
    module: nn.Sequential,
    stages: int,
    traced: _Traced,
    critic: CriticBuilder | None,
    *,
    objective: Objective,
    device: torch.device,
    devices: Devices,
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...] | None]:
    """Boundaries, seconds per layer, seconds of the critic of each cut stage."""
    layer_seconds = measure_layers(module, traced[0], device, objective=objective)
    if critic is None or stages == 1:
        boundaries = devices.cut(layer_seconds, stages, _only_at(devices.places, len(layer_seconds), stages))
        return boundaries, layer_seconds, None if critic is None else ()
    contexts = _candidates(module, traced, stages)
    measured = measure_critics(contexts, critic, device, objective=objective)
    boundaries = _balanced(layer_seconds, stages, contexts, measured, devices)
    ends = set(enumerate(boundaries[1:-1]))
    chosen = [cost for one, cost in zip(contexts, measured, strict=True) if (one.stage, one.boundary) in ends]
    return boundaries, layer_seconds, tuple(cost for cost in chosen if not isinstance(cost, UsageError))


def cut_network(  # noqa: PLR0917 - the plain facts, as `dpp.partition` takes them
    layers: object,
    stages: int,
    by: By,
    sample: Payload | None,
    critic: CriticBuilder | None,
    loss: Loss | None = None,
    device: torch.device = _CPU,
    *,
    relearned: bool = False,
    speeds: Sequence[float] | None = None,
    fits: Fits | None = None,
) -> Plan:
    """Cut a network into stages.

    Args:
        layers: An `nn.Sequential`, or a list of modules; marked with `cut_after`, it is cut at these places only,
            unless `by` is a list.
        stages: Number of stages.
        by: "time" (measured forward + backward, critics and loss included), "parameters" (critics included), "uniform"
            (number of layers), or the number of layers of every stage.
        sample: An input micro-batch; "time" needs one, and "parameters" with a critic. With one, the layers are
            checked to fit each other, whatever `by` is.
        critic: Builds the critic of every stage but the last; None to leave critics out of the balance. While the cut
            is sought, it builds one for every stage and every layer behind which that stage can end.
        loss: Counted with the last layer and every critic, with a made-up target; None for a plain mean square.
        device: Where to measure.
        relearned: Critics go forward once more, to learn from the next stage's losses (`critic_target`).
        speeds: Of the device of every stage, relative to each other; for "time" and "parameters".
        fits: Which stages have room on their device; for "time" and "parameters".

    Returns:
        The plan; its `sample` is an empty tuple if none was given, its seconds are None if not measured.

    Raises:
        UsageError: Bad `by`, more stages than layers, layers that do not fit, parameters shared between stages, or no
            place for a critic.
    """
    module = as_sequential(layers)
    traced = trace(module, sample) if sample is not None else None
    layer_seconds: tuple[float, ...] | None = None
    critic_seconds: tuple[float, ...] | None = None
    devices = Devices(getattr(module, "places", None), speeds, fits)
    only = _only_at(devices.places, len(module), stages)
    if by == "uniform":
        boundaries = minmax_cut([1.0] * len(module), stages, only) if only else uniform_cut(len(module), stages)
    elif by == "parameters":
        boundaries = _cut_by_parameters(module, stages, traced, critic, devices)
    elif by == "time":
        if traced is None:
            raise UsageError("cut 'time' needs a sample to measure with; pass sample, or cut by 'uniform'")
        objective = stand_in_objective(loss, present(traced[1]).to(device), relearned=relearned)
        boundaries, layer_seconds, critic_seconds = _cut_by_time(
            module, stages, traced, critic, objective=objective, device=device, devices=devices
        )
    elif isinstance(by, list | tuple):
        boundaries = listed_cut(by, len(module), stages)
    else:
        raise UsageError(f"cut {by!r} must be 'time', 'parameters', 'uniform' or a list of layers per stage")
    refuse_shared(module, boundaries)
    return Plan(module, boundaries, sample if sample is not None else (), layer_seconds, critic_seconds)
