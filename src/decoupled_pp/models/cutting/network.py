"""Cuts a network into stages: collects what every layer and critic costs, and lets `cut` choose the boundaries."""

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
from decoupled_pp.models.cutting.layers import as_sequential, critic_context, trace, zeros_if_meta
from decoupled_pp.models.cutting.measure import measure_critics, measure_layers
from decoupled_pp.models.cutting.objective import stand_in_objective
from decoupled_pp.models.cutting.shared import refuse_shared

By: TypeAlias = Literal["time", "parameters", "uniform"] | list[int]
"""Balance stages by measured time, by parameters, by number of layers; or the layers per stage."""

_CPU = torch.device("cpu")

_CriticCost: TypeAlias = "float | UsageError"  # or why none can be built at that place


def cut_network(  # noqa: PLR0917 - the plain facts, as `dpp.partition` takes them
    layers: object,
    stages: int,
    by: By,
    sample: Payload | None,  # the layers are checked on it; "time" and critics that count need one
    critic: CriticBuilder | None,  # None: critics are left out of the balance
    loss: Loss | None = None,  # measured with the last layer and every critic; None: a plain mean square
    device: torch.device = _CPU,  # where to measure
    *,
    relearned: bool = False,  # True if critics run forward once more (`critic_target`)
    speeds: Sequence[float] | None = None,  # of every stage's device; for "time" and "parameters", as is `fits`
    fits: Fits | None = None,
) -> Plan:
    """Cut a network into stages; where `cut_after` marked it, only there (but by a list anywhere)."""
    module = as_sequential(layers)
    traced = trace(module, sample) if sample is not None else None
    devices = _Devices(getattr(module, "places", None), speeds, fits)
    if isinstance(by, str):
        devices.check_places(stages)
    cutter = _Cutter(module, stages, critic, traced, devices)
    layer_seconds: tuple[float, ...] | None = None
    critic_seconds: tuple[float, ...] | None = None
    if by == "uniform":
        boundaries = cutter.uniform()
    elif by == "parameters":
        boundaries = cutter.by_parameters()
    elif by == "time":
        boundaries, layer_seconds, critic_seconds = cutter.by_time(loss, device, relearned=relearned)
    elif isinstance(by, list | tuple):
        boundaries = listed_cut(by, len(module), stages)
    else:
        raise UsageError(
            f"`cut` {by!r} must be 'time', 'parameters', 'uniform' or a list of layers per stage",
            code="bad-cut",
            key="cut",
        )
    refuse_shared(module, boundaries)
    return Plan(module, boundaries, () if sample is None else sample, layer_seconds, critic_seconds)


@dataclass(frozen=True)
class _Devices:
    """The constraints that a balanced cut respects."""

    places: Sequence[int] | None  # boundaries to choose from (`cut_after`); None: all
    speeds: Sequence[float] | None
    fits: Fits | None

    def cut(self, costs: Sequence[float], stages: int, closing: Sequence[Sequence[float]] | None) -> tuple[int, ...]:
        """Return the best cut (`minmax_cut`)."""
        return minmax_cut(costs, stages, closing, speeds=self.speeds, fits=self.fits)

    def check_places(self, stages: int) -> None:
        """Raise UsageError if fewer places are marked than cuts are needed."""
        if self.places is not None and stages > len(self.places) + 1:
            raise UsageError(
                f"`stages` is {stages} but `cut_after` marks only {len(self.places)} places to cut the network at; "
                f"mark {stages - 1} or more",
                code="too-few-cut-places",
                key="stages",
            )

    def closing_costs(self, layers: int, stages: int) -> list[list[float]] | None:
        """Return closing costs that allow the marked places only: 0 there, infinity elsewhere; None without marks."""
        if self.places is None:
            return None
        row = [0.0 if end in self.places else math.inf for end in range(1, layers + 1)]
        return [list(row) for _ in range(stages - 1)]


@dataclass(frozen=True)
class _Cutter:
    """Cuts one network by each of the measures of balance."""

    module: nn.Sequential
    stages: int
    critic: CriticBuilder | None
    traced: tuple[list[Payload], Tensor] | None  # from `trace`, if there is a sample
    devices: _Devices

    def uniform(self) -> tuple[int, ...]:
        """Give every stage as many layers."""
        layers = len(self.module)
        closing = self.devices.closing_costs(layers, self.stages)
        if closing:  # marked places are seldom evenly spaced: as even as they allow
            return minmax_cut([1.0] * layers, self.stages, closing)
        return uniform_cut(layers, self.stages)

    def by_parameters(self) -> tuple[int, ...]:
        """Balance the number of parameters."""
        parameters = [float(count_parameters(layer)) for layer in self.module]
        if self.critic is None or self.stages == 1:
            return self._cut_without_critics(parameters)
        hiddens, output = self._need_traced("'parameters' counts the critics too; pass a sample, or critic=None")
        contexts = self._critic_contexts(hiddens, output)
        costs = [_parameters_of(self.critic, context) for context in contexts]
        return self._cut_with_critics(parameters, contexts, costs)

    def by_time(
        self, loss: Loss | None, device: torch.device, *, relearned: bool
    ) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...] | None]:
        """Return boundaries, seconds of every layer, seconds of every chosen critic (None without critics)."""
        hiddens, output = self._need_traced("'time' measures the layers; pass a sample, or cut by 'uniform'")
        objective = stand_in_objective(loss, zeros_if_meta(output).to(device), relearned=relearned)
        layer_seconds = measure_layers(self.module, hiddens, device, objective=objective)
        if self.critic is None:
            return self._cut_without_critics(layer_seconds), layer_seconds, None
        if self.stages == 1:
            return self._cut_without_critics(layer_seconds), layer_seconds, ()
        contexts = self._critic_contexts(hiddens, output)
        measured = measure_critics(contexts, self.critic, device, objective=objective)
        boundaries = self._cut_with_critics(layer_seconds, contexts, measured)
        chosen = set(enumerate(boundaries[1:-1]))
        critic_seconds = [
            cost
            for context, cost in zip(contexts, measured, strict=True)
            if (context.stage, context.boundary) in chosen and not isinstance(cost, UsageError)
        ]
        return boundaries, layer_seconds, tuple(critic_seconds)

    def _need_traced(self, reason: str) -> tuple[list[Payload], Tensor]:
        if self.traced is None:
            raise UsageError(f"`cut` {reason}", code="sample-missing", key="cut")
        return self.traced

    def _critic_contexts(self, hiddens: list[Payload], output: Tensor) -> list[CriticContext]:
        """Return a context for every stage but the last and every layer behind which that stage can end."""
        spare = len(self.module) - self.stages  # every other stage needs a layer, too
        contexts = []
        for stage in range(self.stages - 1):
            for boundary in range(stage + 1, stage + spare + 2):
                contexts.append(
                    critic_context(self.module, hiddens, output, boundary=boundary, stage=stage, stages=self.stages)
                )
        return contexts

    def _cut_without_critics(self, costs: Sequence[float]) -> tuple[int, ...]:
        return self.devices.cut(costs, self.stages, self.devices.closing_costs(len(costs), self.stages))

    def _cut_with_critics(
        self, costs: Sequence[float], contexts: Sequence[CriticContext], critics: Sequence[_CriticCost]
    ) -> tuple[int, ...]:
        """Return the best cut that ends no stage where its critic cannot be built.

        Costs are kept by stage and place, because a critic may depend on its stage: AugLocal's is deeper near the
        input.
        """
        places = self.devices.places
        closing = [[math.inf] * len(costs) for _ in range(self.stages - 1)]
        for context, cost in zip(contexts, critics, strict=True):
            if isinstance(cost, UsageError):
                continue
            if places is None or context.boundary in places:
                closing[context.stage][context.boundary - 1] = cost
        try:
            return self.devices.cut(costs, self.stages, closing)
        except UsageError as error:
            raise next((cost for cost in critics if isinstance(cost, UsageError)), error) from error


def _parameters_of(critic: CriticBuilder, context: CriticContext) -> _CriticCost:
    """Return the number of parameters of a critic; the generators stay as they are."""
    try:
        with torch.random.fork_rng(devices=[]):
            return float(count_parameters(critic(context)))
    except UsageError as error:
        return error
