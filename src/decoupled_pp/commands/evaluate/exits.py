"""Scores the exits of a trained network: their costs, early exit at a confidence, the ensemble of all exits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from decoupled_pp.commands.depth import Depth
from decoupled_pp.commands.evaluate.gradient_probe import GradientCosine
from decoupled_pp.core.copies import copy_of
from decoupled_pp.core.device import untouched
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Batch, Payload, as_tuple, batch_size, map_payload
from decoupled_pp.core.plans import count_parameters
from decoupled_pp.core.reports import Exit
from decoupled_pp.pipeline.score import ExitScore
from decoupled_pp.pipeline.stage import Stage


@dataclass(frozen=True)
class ExitCost:
    """Cost of one exit: the stages up to it and its critic."""

    parameters: int
    # Of one sample's forward pass: matrix products, convolutions, attention; a multiplication and an addition are two.
    flops: float
    tried: float  # `flops` and those of all earlier critics: the cost of getting here by trying the exits in turn


@dataclass(frozen=True)
class Progressive:
    """Early exit: a sample leaves at the first exit whose largest softmax exceeds the threshold, else at the last."""

    threshold: float
    accuracy: float  # share of samples that are classified right at the exit where they left
    flops: float  # mean per sample, including the critics that were tried
    share_of_flops: float  # `flops` over those of the whole network without critics
    left: tuple[float, ...]  # share of the samples that left at each exit


@dataclass(frozen=True)
class Ensemble:
    """Score of the sum of the logits of all exits."""

    loss: float  # held-out
    accuracy: float | None  # None without class targets


@dataclass(frozen=True)
class Evaluation:
    """Result of `dpp evaluate`; what was not asked for is empty or None."""

    exits: tuple[Exit, ...]
    costs: tuple[ExitCost, ...]  # of each exit
    progressive: tuple[Progressive, ...] = ()  # at every confidence
    ensemble: Ensemble | None = None
    cosines: tuple[GradientCosine, ...] = ()  # of every stage
    depth: Depth | None = None  # beside plain backpropagation


@torch.no_grad()
def exit_costs(stages: Sequence[Stage], sample: Payload) -> tuple[ExitCost, ...]:
    """Counts the cost of every exit on a sample micro-batch."""
    hidden = map_payload(lambda tensor: tensor.to(stages[0].body.device), sample)
    samples = batch_size(sample)
    trunk_flops = 0
    trunk_parameters = 0
    earlier_critic_flops = 0
    costs = []
    for stage in stages:
        # Copies: counting must not change the modules' modes, nor the statistics of batch normalisation.
        trunk = copy_of(stage.trunk).eval()
        hidden, flops = _counted(trunk, hidden)
        trunk_flops += flops
        trunk_parameters += count_parameters(trunk)
        critic_flops = 0
        critic_parameters = 0
        if stage.critic is not None and stage.body.judge.exits:
            _, critic_flops = _counted(copy_of(stage.critic).eval(), hidden)
            critic_parameters = count_parameters(stage.critic)
        earlier_critic_flops += critic_flops
        costs.append(
            ExitCost(
                parameters=trunk_parameters + critic_parameters,
                flops=(trunk_flops + critic_flops) / samples,
                tried=(trunk_flops + earlier_critic_flops) / samples,
            )
        )
    return tuple(costs)


def _counted(module: nn.Module, hidden: Payload) -> tuple[Payload, int]:
    """Returns the output of a module, and the floating-point operations of its forward pass."""
    with FlopCounterMode(display=False) as counter:
        output = module(hidden)
    return output, counter.get_total_flops()


def exit_logits(stages: Sequence[Stage], batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Payload]]:
    """Yields held-out logits of all exits, (exits, B, ..., classes), with the targets, for every micro-batch."""
    without = [stage.index for stage in stages if not stage.body.judge.exits]
    if without:
        raise UsageError(
            f"stage {without[0]} has no exit, because its critic makes no logits; leave out --progressive and "
            "--ensemble",
            code="stage-without-exit",
        )
    device = stages[0].body.device
    critics = [stage.critic for stage in stages if stage.critic is not None]
    modules = nn.ModuleList([*(stage.trunk for stage in stages), *critics])
    with untouched(modules, device):
        modules.eval()
        for inputs, target in batches:
            with torch.no_grad():
                logits = torch.stack(list(_logits(stages, map_payload(lambda t: t.to(device), inputs))))
            yield logits, map_payload(lambda t: t.to(device), target)


def _logits(stages: Sequence[Stage], hidden: Payload) -> Iterator[Tensor]:
    for stage in stages:
        hidden = stage.trunk(hidden)
        yield stage.critic(hidden) if stage.critic is not None else as_tuple(hidden)[0]


def progressive(
    stages: Sequence[Stage], batches: Iterable[Batch], costs: Sequence[ExitCost], thresholds: Sequence[float]
) -> tuple[Progressive, ...]:
    """Scores early exit at the first confident exit, for each of several confidences."""
    for threshold in thresholds:
        if not 0 < threshold < 1:
            raise UsageError(
                f"--progressive {threshold} must be a confidence between 0 and 1", code="option-out-of-range"
            )
    correct = torch.zeros(len(thresholds))
    left = torch.zeros(len(thresholds), len(stages))
    for logits, target in exit_logits(stages, batches):
        classes = as_tuple(target)[0].cpu()
        if logits.dim() != 3 or classes.shape != logits.shape[1:2] or classes.is_floating_point():
            raise UsageError(
                "--progressive is for one class per sample, because a sample leaves as a whole; leave it out",
                code="progressive-needs-classes",
            )
        confidence, guesses = (t.cpu() for t in logits.float().softmax(dim=-1).max(dim=-1))  # each (exits, B)
        for row, threshold in enumerate(thresholds):
            confident = confidence > threshold
            confident[-1] = True
            exits = confident.float().argmax(dim=0)  # argmax returns the first of equal values: the first exit
            correct[row] += (guesses.gather(0, exits[None])[0] == classes).sum()
            left[row] += torch.bincount(exits, minlength=len(stages))
    return tuple(_progressive(*row, costs) for row in zip(thresholds, correct, left, strict=True))


def _progressive(threshold: float, correct: Tensor, left: Tensor, costs: Sequence[ExitCost]) -> Progressive:
    samples = left.sum()
    shares = [float(share) for share in left / samples]
    flops = sum(share * cost.tried for share, cost in zip(shares, costs, strict=True))
    return Progressive(threshold, float(correct / samples), flops, flops / costs[-1].flops, tuple(shares))


def ensemble(stages: Sequence[Stage], batches: Iterable[Batch]) -> Ensemble:
    """Scores the sum of all exits' logits with the run's loss."""
    criterion = stages[-1].body.held_out_loss
    score = ExitScore(criterion)
    for logits, target in exit_logits(stages, batches):
        summed = logits.sum(dim=0)
        score.add(summed, target, criterion.weight((summed, target)))
    return Ensemble(*score.result())
