"""Compares the local gradient of every stage with the true one, that of the whole network's loss."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from decoupled_pp.core.device import untouched
from decoupled_pp.core.packets import Batch, Packet, PacketKind, Payload, as_tuple, map_payload
from decoupled_pp.pipeline.stage import Stage


@dataclass(frozen=True)
class GradientCosine:
    """Cosine between the local and the true gradient of the layers of one stage, over some micro-batches."""

    stage: int
    mean: float
    low: float
    high: float
    norm_ratio: float  # mean of the local gradient's norm over the true one's


def gradient_cosines(module: nn.Module, stages: Sequence[Stage], batches: Iterable[Batch]) -> list[GradientCosine]:
    """Compares gradients on micro-batches, in training mode, with equal dropout on both sides; changes nothing."""
    rows = [_compare(module, stages, batch) for batch in batches]
    if not rows:
        raise ValueError("a gradient needs at least one micro-batch")
    found = []
    for stage, column in zip(stages, zip(*rows, strict=True), strict=True):
        cosines, ratios = zip(*column, strict=True)
        found.append(
            GradientCosine(stage.index, statistics.mean(cosines), min(cosines), max(cosines), statistics.mean(ratios))
        )
    return found


def _compare(module: nn.Module, stages: Sequence[Stage], batch: Batch) -> list[tuple[float, float]]:
    """Returns the cosine and the ratio of norms of every stage, on one micro-batch."""
    device = stages[0].body.device
    inputs, target = (map_payload(lambda t: t.to(device), part) for part in batch)
    critics = [stage.critic for stage in stages if stage.critic is not None]
    everything = nn.ModuleList([module, *critics])
    with untouched(everything, device), torch.enable_grad():
        local = _local_gradients(stages, inputs, target)
    with untouched(everything, device), torch.enable_grad():
        true = _true_gradients(stages, inputs, target)
    return [_cosine_and_ratio(ours, theirs) for ours, theirs in zip(local, true, strict=True)]


def _local_gradients(stages: Sequence[Stage], inputs: Payload, target: Payload) -> list[Tensor]:
    """Returns the gradient of every stage's own loss."""
    found = []
    rider: Payload = ()
    for stage in stages:
        torch.manual_seed(stage.index)  # by stage, so that dropout is equal in `_true_gradients`
        view = stage.body.view(Packet(PacketKind.TRAIN, 0, inputs, target, rider))
        found += _gradients(stage.body.local_loss(view), [stage])
        inputs = map_payload(torch.detach, view.hidden)
        rider = map_payload(torch.detach, stage.body.judge.rider(view))
    return found


def _true_gradients(stages: Sequence[Stage], hidden: Payload, target: Payload) -> list[Tensor]:
    """Returns the gradient of the last stage's loss in every stage."""
    for stage in stages:
        torch.manual_seed(stage.index)
        hidden = stage.trunk(hidden)
    return _gradients(stages[-1].body.loss(as_tuple(hidden)[0], target), stages)


def _gradients(loss: Tensor, stages: Sequence[Stage]) -> list[Tensor]:
    """Returns the gradient of every stage's layers as one fp64 vector on the CPU."""
    by_stage = [[p for p in stage.trunk.parameters() if p.requires_grad] for stage in stages]
    parameters = list(chain(*by_stage))
    if not parameters:
        return [torch.zeros(0, dtype=torch.float64) for _ in stages]
    # One call for all stages, because it frees the graph. Parameters that the loss does not use get zeros.
    gradients = iter(torch.autograd.grad(loss, parameters, materialize_grads=True))
    vectors = [torch.cat([torch.zeros(0), *(next(gradients).flatten().cpu() for _ in own)]) for own in by_stage]
    return [vector.double() for vector in vectors]  # sums over millions of products lose digits in fp32


def _cosine_and_ratio(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    our_norm = float(ours.norm())
    their_norm = float(theirs.norm())
    if our_norm == 0 or their_norm == 0:  # the stage has nothing to train, or gets no gradient
        return 0.0, 0.0
    return float(ours @ theirs) / our_norm / their_norm, our_norm / their_norm
