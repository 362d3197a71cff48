"""Cuts a network into stages: collects what every layer and critic costs, and lets `cut` choose the boundaries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import CriticBuilder, CriticContext
from decoupled_pp.core.packets import Loss, Payload
from decoupled_pp.core.plans import Plan, count_parameters
from decoupled_pp.core.structures import dismantle
from decoupled_pp.models.cutting.cut import Fits, listed_cut, minmax_cut, uniform_cut
from decoupled_pp.models.cutting.layers import (
    as_sequential,
    critic_context,
    describe_layer,
    make_lazy_weights,
    trace,
    zeros_if_meta,
)
from decoupled_pp.models.cutting.measure import measure_critics, measure_layers
from decoupled_pp.models.cutting.objective import stand_in_objective
from decoupled_pp.models.cutting.shared import refuse_shared
from decoupled_pp.models.cutting.side_channels import refuse_side_channels

By: TypeAlias = Literal["time", "parameters", "uniform"] | list[int]
"""Balance stages by measured time, by parameters, by number of layers; or the layers per stage."""

_CPU = torch.device("cpu")

_CriticCost: TypeAlias = "float | UsageError"  # or why none can be built at that place
_CriticCosts: TypeAlias = Mapping[tuple[int, int], _CriticCost]  # by (stage, boundary)


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
    make_lazy_weights(module, sample)
    traced = trace(module, sample) if sample is not None else None
    cutter = _Cutter(module, stages, critic, traced, getattr(module, "places", None), speeds, fits, loss)
    if isinstance(by, str):
        cutter.check_places()
    layer_seconds: tuple[float, ...] | None = None
    critic_seconds: tuple[float, ...] | None = None
    if by == "uniform":
        boundaries = cutter.uniform()
    elif by == "parameters":
        boundaries = cutter.by_parameters()
    elif by == "time":
        boundaries, layer_seconds, critic_seconds = cutter.by_time(device, relearned=relearned)
    elif isinstance(by, list | tuple):
        boundaries = listed_cut(by, len(module), stages)
    else:
        raise UsageError(
            f"`cut` {by!r} must be 'time', 'parameters', 'uniform' or a list of layers per stage",
            code="bad-cut",
            key="cut",
        )
    refuse_shared(module, boundaries, None if traced is None else traced[0])
    if traced is not None:
        refuse_side_channels(module, boundaries, *traced)
        _refuse_untravelling(module, boundaries, traced[0])
    return Plan(module, boundaries, () if traced is None else traced[0][0], layer_seconds, critic_seconds)


def _refuse_untravelling(module: nn.Sequential, boundaries: tuple[int, ...], hiddens: list[Payload]) -> None:
    """Raise UsageError if something that a stage returns cannot travel: so it is in one process and on ranks alike."""
    layers = list(module.named_children())
    for boundary in boundaries[1:-1]:
        dismantle(hiddens[boundary], f"{describe_layer(*layers[boundary - 1])} returned")


@dataclass(frozen=True)
class _Cutter:
    """Cuts one network by each of the measures of balance."""

    module: nn.Sequential
    stages: int
    critic: CriticBuilder | None
    traced: tuple[list[Payload], Tensor] | None  # from `trace`, if there is a sample
    places: Sequence[int] | None  # boundaries to choose from (`cut_after`); None: all
    speeds: Sequence[float] | None
    fits: Fits | None
    loss: Loss | None

    def check_places(self) -> None:
        """Raise UsageError if fewer places are marked than cuts are needed."""
        if self.places is not None and self.stages > len(self.places) + 1:
            raise UsageError(
                f"`stages` is {self.stages} but `cut_after` marks only {len(self.places)} places to cut the network "
                f"at; mark {self.stages - 1} or more",
                code="too-few-cut-places",
                key="stages",
            )

    def uniform(self) -> tuple[int, ...]:
        """Give every stage as many layers."""
        layers = len(self.module)
        if self.places is None or self.stages == 1:
            return uniform_cut(layers, self.stages)
        # Marked places are seldom evenly spaced: as even as they allow.
        return minmax_cut([1.0] * layers, self.stages, self._closing_costs(None))

    def by_parameters(self) -> tuple[int, ...]:
        """Balance the number of parameters."""
        parameters = [float(count_parameters(layer)) for layer in self.module]
        if self.critic is None or self.stages == 1:
            return self._cut(parameters, None)
        hiddens, output = self._need_traced("'parameters' counts the critics too; pass a sample, or critic=None")
        contexts = self._critic_contexts(hiddens, output)
        costs = {(one.stage, one.boundary): _parameters_of(self.critic, one) for one in contexts}
        return self._cut(parameters, costs)

    def by_time(
        self, device: torch.device, *, relearned: bool
    ) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...] | None]:
        """Return boundaries, seconds of every layer, seconds of every chosen critic (None without critics)."""
        hiddens, output = self._need_traced("'time' measures the layers; pass a sample, or cut by 'uniform'")
        objective = stand_in_objective(self.loss, zeros_if_meta(output).to(device), relearned=relearned)
        layer_seconds = measure_layers(self.module, hiddens, device, objective=objective)
        if self.critic is None:
            return self._cut(layer_seconds, None), layer_seconds, None
        if self.stages == 1:
            return self._cut(layer_seconds, None), layer_seconds, ()
        contexts = self._critic_contexts(hiddens, output)
        measured = measure_critics(contexts, self.critic, device, objective=objective)
        costs = {(one.stage, one.boundary): cost for one, cost in zip(contexts, measured, strict=True)}
        boundaries = self._cut(layer_seconds, costs)
        chosen = [costs[place] for place in enumerate(boundaries[1:-1])]
        return boundaries, layer_seconds, tuple(cost for cost in chosen if not isinstance(cost, UsageError))

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
                    critic_context(
                        self.module,
                        hiddens,
                        output,
                        self.loss,
                        boundary=boundary,
                        stage=stage,
                        stages=self.stages,
                    )
                )
        return contexts

    def _cut(self, costs: Sequence[float], critics: _CriticCosts | None) -> tuple[int, ...]:
        """Return the best cut that ends no stage where its critic cannot be built; None: critics cost nothing."""
        try:
            return minmax_cut(costs, self.stages, self._closing_costs(critics), speeds=self.speeds, fits=self.fits)
        except UsageError as error:
            faults = [cost for cost in (critics or {}).values() if isinstance(cost, UsageError)]
            if not faults:
                raise
            raise faults[0] from error  # it says why no cut is left

    def _closing_costs(self, critics: _CriticCosts | None) -> list[list[float]]:
        """Return the costs behind every layer of every stage but the last; infinite where no cut is possible."""
        layers = len(self.module)
        closing = [[math.inf] * layers for _ in range(self.stages - 1)]
        for stage, row in enumerate(closing):
            for boundary in range(1, layers + 1) if self.places is None else self.places:
                # By stage, too, because a critic may depend on it: AugLocal's is deeper near the input.
                cost = 0.0 if critics is None else critics.get((stage, boundary), math.inf)
                if not isinstance(cost, UsageError):
                    row[boundary - 1] = cost
        return closing


def _parameters_of(critic: CriticBuilder, context: CriticContext) -> _CriticCost:
    """Return the number of parameters of a critic; the generators stay as they are."""
    try:
        with torch.random.fork_rng(devices=[]):
            return float(count_parameters(critic(context)))
    except UsageError as error:
        return error
