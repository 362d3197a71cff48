"""Where local learning loses: how a stage's local gradient points beside the true one, of the whole network's loss."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decoupled_pp.core.device import untouched
from decoupled_pp.core.packets import Batch, Packet, PacketKind, Payload, as_tuple, map_payload
from decoupled_pp.pipeline.stage import Stage


@dataclass(frozen=True)
class GradientCosine:
    """Cosine between the local and the true gradient of one stage's layers.

    Attributes:
        stage: Index of the stage.
        mean: Over the micro-batches.
        low: The least of them.
        high: The greatest of them.
        norm_ratio: Mean of the local gradient's norm over the true one's.
    """

    stage: int
    mean: float
    low: float
    high: float
    norm_ratio: float


def gradient_cosines(module: nn.Module, stages: Sequence[Stage], batches: Iterable[Batch]) -> list[GradientCosine]:
    """Compare gradients on micro-batches, in training mode, with the same dropout; nothing is changed by it.

    Args:
        module: The whole network, of which the stages have the layers.
        stages: All of them.
        batches: Micro-batches; each gives one cosine per stage.

    Raises:
        ValueError: There is no micro-batch.
    """
    rows = [_one(module, stages, batch) for batch in batches]
    if not rows:
        raise ValueError("a gradient needs at least one micro-batch")
    found = []
    for stage, column in zip(stages, zip(*rows, strict=True), strict=True):
        cosines, ratios = zip(*column, strict=True)
        found.append(
            GradientCosine(stage.index, statistics.mean(cosines), min(cosines), max(cosines), statistics.mean(ratios))
        )
    return found


def _one(module: nn.Module, stages: Sequence[Stage], batch: Batch) -> list[tuple[float, float]]:
    """Cosine, and ratio of norms, of every stage."""
    inputs, target = (map_payload(lambda t: t.to(stages[0].body.device), part) for part in batch)
    judges = nn.ModuleList([module, *(stage.critic for stage in stages if stage.critic is not None)])
    with untouched(judges, stages[0].body.device), torch.enable_grad():
        torch.manual_seed(0)
        local = _local(stages, inputs, target)
    with untouched(judges, stages[0].body.device), torch.enable_grad():
        torch.manual_seed(0)
        hidden = inputs
        for stage in stages:
            torch.manual_seed(stage.index)
            hidden = stage.trunk(hidden)
        true = _gradients(stages[-1].body.loss(as_tuple(hidden)[0], target), stages)
    return [_compared(ours, theirs) for ours, theirs in zip(local, true, strict=True)]


def _local(stages: Sequence[Stage], inputs: Payload, target: Payload) -> list[Tensor]:
    found = []
    rider: Payload = ()
    for stage in stages:
        torch.manual_seed(stage.index)
        view = stage.body.view(Packet(PacketKind.TRAIN, 0, inputs, target, rider))
        found += _gradients(stage.body.local_loss(view), [stage])
        inputs = map_payload(torch.detach, view.hidden)
        rider = map_payload(torch.detach, stage.body.judge.rider(view))
    return found


def _gradients(loss: Tensor, stages: Sequence[Stage]) -> list[Tensor]:
    """The gradient of every stage's layers, flat, fp64."""
    parameters = [[p for p in stage.trunk.parameters() if p.requires_grad] for stage in stages]
    flat = [p for of_stage in parameters for p in of_stage]
    gradients = iter(torch.autograd.grad(loss, flat, allow_unused=True) if flat else ())
    return [
        torch.cat([torch.zeros(0), *(_flat(next(gradients), p) for p in of_stage)]).double() for of_stage in parameters
    ]


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return (torch.zeros_like(parameter) if gradient is None else gradient).detach().flatten().cpu()


def _compared(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    norms = float(ours.norm()), float(theirs.norm())
    if not all(norms):  # nothing to train here, or no gradient
        return 0.0, 0.0
    return float(ours @ theirs) / norms[0] / norms[1], norms[0] / norms[1]
