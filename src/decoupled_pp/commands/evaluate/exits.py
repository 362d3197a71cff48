"""What the exits of a trained network give: their cost, leaving early where one is confident, all of them together."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from decoupled_pp.commands.evaluate.gradient_probe import GradientCosine
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import has_exit
from decoupled_pp.core.packets import Batch, Payload, as_tuple, is_classification, map_payload
from decoupled_pp.core.plans import count_parameters
from decoupled_pp.core.reports import Exit
from decoupled_pp.pipeline.losses import ExitScore
from decoupled_pp.pipeline.stage import Stage


@dataclass(frozen=True)
class ExitCost:
    """What one exit takes: the stages up to it, and its critic.

    Attributes:
        parameters: Of both.
        flops: Floating-point operations of one sample's forward pass (matrix products, convolutions, attention; a
            multiplication and an addition are two).
        tried: The same, with the critics of all earlier exits: what it takes to get here by trying them in turn.
    """

    parameters: int
    flops: float
    tried: float


@dataclass(frozen=True)
class Progressive:
    """Each sample leaves at the first exit whose largest softmax exceeds the threshold, at the latest at the last.

    Attributes:
        threshold: The confidence.
        accuracy: Share of samples classified right where they left.
        flops: Mean per sample, the critics that were tried included.
        share_of_flops: Of the whole network's, without critics.
        left: Share of the samples that left at each exit.
    """

    threshold: float
    accuracy: float
    flops: float
    share_of_flops: float
    left: tuple[float, ...]


@dataclass(frozen=True)
class Ensemble:
    """The sum of the logits of all exits.

    Attributes:
        loss: Held-out loss of the sum.
        accuracy: Share classified right; None without class targets.
    """

    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Evaluation:
    """What a run's exits are worth.

    Attributes:
        exits: Their held-out scores.
        costs: What each takes.
        progressive: Leaving early, for every confidence that was asked for.
        ensemble: All exits together, if asked for.
        cosines: Local beside true gradients of every stage, if asked for.
    """

    exits: tuple[Exit, ...]
    costs: tuple[ExitCost, ...]
    progressive: tuple[Progressive, ...] = ()
    ensemble: Ensemble | None = None
    cosines: tuple[GradientCosine, ...] = ()


@torch.no_grad()
def exit_costs(stages: Sequence[Stage], sample: Payload) -> tuple[ExitCost, ...]:
    """The cost of every exit, counted on a sample micro-batch."""
    hidden = map_payload(lambda tensor: tensor.to(stages[0].body.device), sample)
    count = as_tuple(sample)[0].shape[0]
    trunks = parameters = critics = 0
    costs = []
    for stage in stages:
        trunk, critic = copy.deepcopy(stage.trunk).eval(), copy.deepcopy(stage.critic)
        with FlopCounterMode(display=False) as counter:
            hidden = trunk(hidden)
        trunks, parameters = trunks + counter.get_total_flops(), parameters + count_parameters(trunk)
        own = 0
        if critic is not None and has_exit(critic):
            with FlopCounterMode(display=False) as counter:
                critic.eval()(hidden)
            own = counter.get_total_flops()
        critics += own
        total = parameters + (count_parameters(critic) if has_exit(critic) else 0)
        costs.append(ExitCost(total, (trunks + own) / count, (trunks + critics) / count))
    return tuple(costs)


def exit_logits(stages: Sequence[Stage], batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Payload]]:
    """Held-out logits of all exits, (exits, B, ..., classes), with the targets, micro-batch by micro-batch.

    Raises:
        UsageError: A stage has no exit.
    """
    if without := [stage.index for stage in stages if not stage.body.judge.exits]:
        raise UsageError(f"stage {without[0]} has no exit: its critic makes no logits")
    modules = [(stage.trunk, stage.critic) for stage in stages]
    modes = [(part, part.training) for pair in modules for m in pair if m is not None for part in m.modules()]
    for pair in modules:
        for module in pair:
            _ = module.eval() if module is not None else None
    try:
        for batch in batches:
            inputs, target = (map_payload(lambda t: t.to(stages[0].body.device), part) for part in batch)
            with torch.no_grad():
                yield torch.stack(list(_through(modules, inputs))), target
    finally:
        for part, mode in modes:
            part.training = mode


def _through(modules: Sequence[tuple[nn.Module, nn.Module | None]], hidden: Payload) -> Iterator[Tensor]:
    for trunk, critic in modules:
        hidden = trunk(hidden)
        yield critic(hidden) if critic is not None else as_tuple(hidden)[0]


def progressive(
    stages: Sequence[Stage], batches: Iterable[Batch], costs: Sequence[ExitCost], thresholds: Sequence[float]
) -> tuple[Progressive, ...]:
    """Leave at the first confident exit, for each of several confidences.

    Raises:
        UsageError: The targets are not one class index per sample, or a threshold is no probability.
    """
    if bad := [threshold for threshold in thresholds if not 0 < threshold < 1]:
        raise UsageError(f"--progressive {bad[0]} must be a confidence between 0 and 1")
    correct = torch.zeros(len(thresholds))
    left = torch.zeros(len(thresholds), len(stages))
    for logits, target in exit_logits(stages, batches):
        classes = as_tuple(target)[0].cpu()
        if logits.dim() != 3 or not is_classification(logits[0], target):
            raise UsageError("--progressive is for one class per sample: each sample leaves as a whole")
        confidence, guesses = (t.cpu() for t in logits.float().softmax(dim=-1).max(dim=-1))  # (exits, B)
        for n, threshold in enumerate(thresholds):
            confident = confidence > threshold
            confident[-1] = True
            exits = confident.float().argmax(dim=0)  # the first that is
            correct[n] += (guesses.gather(0, exits[None])[0] == classes).sum()
            left[n] += torch.bincount(exits, minlength=len(stages))
    whole = costs[-1].flops
    return tuple(_progressive(t, correct[n], left[n], costs, whole) for n, t in enumerate(thresholds))


def _progressive(
    threshold: float, correct: Tensor, left: Tensor, costs: Sequence[ExitCost], whole: float
) -> Progressive:
    shares = [float(share) for share in left / left.sum()]
    flops = sum(share * cost.tried for share, cost in zip(shares, costs, strict=True))
    return Progressive(threshold, float(correct / left.sum()), flops, flops / whole, tuple(shares))


def ensemble(stages: Sequence[Stage], batches: Iterable[Batch]) -> Ensemble:
    """Score the sum of all exits' logits with the run's loss."""
    score = ExitScore()
    for logits, target in exit_logits(stages, batches):
        summed = logits.sum(dim=0)
        score.add(stages[-1].body.loss(summed, target), summed, target)
    return Ensemble(*score.result())
