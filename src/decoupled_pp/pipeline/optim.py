"""Builds optimizers and learning-rate schedules of a stage, from `torch.optim` by name or the user's factory."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.factory import call_factory
from decoupled_pp.core.suggestions import did_you_mean
from decoupled_pp.settings.run import OptimizerSettings, ScheduleSettings

_UNFIT = ("LBFGS", "SparseAdam", "Optimizer")  # they need a closure or sparse gradients; and their base

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Makes the optimizer of one stage from its trainable parameters (its critic's included)."""


def build_optimizers(
    choice: OptimizerSettings | OptimizerFactory, trunk: nn.Module, critic: nn.Module | None, *, owns_head: bool
) -> list[Optimizer]:
    """Build the optimizers of one stage: one, or two for Muon, or none if nothing requires a gradient.

    `owns_head` is true if the trunk's last layer is the network's head, which Muon leaves to AdamW.

    Raises:
        UsageError: Unknown name, wrong arguments, or a factory that returns something else.
    """
    # Layers and critic are updated together, as in decoupled greedy learning (Belilovsky et al. 2020).
    parameters = [*trunk.parameters(), *(critic.parameters() if critic is not None else ())]
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if not parameters:
        return []
    if not isinstance(choice, OptimizerSettings):
        return [_checked(choice(parameters), "the optimizer factory")]
    arguments = {"lr": choice.lr, **choice.arguments}
    if ":" in choice.kind:
        return [_checked(call_factory(choice.kind, "optimizer.kind", parameters, **arguments), choice.kind)]
    kind = find_optimizer(choice.kind)
    _check_arguments(kind, choice.arguments)
    try:
        if choice.kind == "Muon":
            return _muon(kind, parameters, hidden_matrices(trunk, owns_head), arguments)
        return [kind(parameters, **arguments)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"`optimizer`: torch.optim.{choice.kind} refuses {arguments}: {error}; change `optimizer.arguments`",
            code="optimizer-refuses-arguments",
            key="optimizer.arguments",
        ) from error


def _check_arguments(kind: type[Optimizer], arguments: dict[str, Any]) -> None:
    """Raise UsageError for what torch's own checks miss or do not explain: unknown names, values of another form."""
    parameters = inspect.signature(kind).parameters
    known = {name: parameter.default for name, parameter in parameters.items() if name not in ("params", "lr")}
    for name, value in arguments.items():
        if name not in known:
            fault = f"has no such argument{did_you_mean(name, known)}; one of {', '.join(known)}"
        elif isinstance(known[name], tuple) and not _is_list_like(value, known[name]):
            fault = f"takes a list of {len(known[name])} like {list(known[name])}, not {value!r}"
        elif isinstance(known[name], float) and not isinstance(value, int | float | torch.Tensor):
            fault = f"takes a number like {known[name]}, not {value!r}"
        else:
            continue
        key = f"optimizer.arguments.{name}"
        raise UsageError(f"`{key}`: torch.optim.{kind.__name__} {fault}", code="optimizer-refuses-arguments", key=key)


def _is_list_like(value: object, default: tuple[Any, ...]) -> bool:
    return isinstance(value, list | tuple) and len(value) == len(default)


def find_optimizer(name: str) -> type[Optimizer]:
    """Return the class of `torch.optim` with this name; UsageError if a stage cannot use any such."""
    # Read from torch, so that an optimizer of a newer release needs no entry here.
    usable = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and key not in _UNFIT
    }
    if name not in usable:
        known = sorted(usable)
        remedy = f"{did_you_mean(name, known)}; one of {', '.join(known)}"
        raise UsageError(
            f"`optimizer.kind`: torch.optim has no usable {name!r} here{remedy}",
            code="unknown-optimizer",
            key="optimizer.kind",
        )
    return usable[name]


def hidden_matrices(trunk: nn.Module, owns_head: bool) -> set[int]:
    """Return the ids of the weights Muon is made for: those of `nn.Linear` layers other than the network's head."""
    layers = list(trunk.children())
    hidden = layers[:-1] if owns_head else layers
    modules = [module for layer in hidden for module in layer.modules()]
    return {id(module.weight) for module in modules if isinstance(module, nn.Linear)}


def _muon(
    kind: type[Optimizer], parameters: list[nn.Parameter], matrices: set[int], arguments: dict[str, Any]
) -> list[Optimizer]:
    """Build Muon for the hidden matrices and AdamW for all else (torch's Muon takes 2-D parameters only)."""
    hidden = [p for p in parameters if id(p) in matrices]
    others = [p for p in parameters if id(p) not in matrices]
    shared = {key: value for key, value in arguments.items() if key in ("lr", "weight_decay")}
    made: list[Optimizer] = []
    if hidden:
        # "match_rms_adamw" scales Muon's update so that one learning rate serves both (Liu et al. 2025, 2502.16982).
        made.append(kind(hidden, **{"adjust_lr_fn": "match_rms_adamw", **arguments}))
    if others:
        made.append(torch.optim.AdamW(others, **shared))
    return made


def _checked(optimizer: object, source: str) -> Optimizer:
    if not isinstance(optimizer, Optimizer):
        raise UsageError(
            f"`optimizer`: {source} returned {type(optimizer).__name__}; it must return a torch.optim.Optimizer",
            code="optimizer-is-none",
            key="optimizer",
        )
    return optimizer


def build_schedules(
    settings: ScheduleSettings, optimizers: list[Optimizer], steps: int, done: int = 0
) -> list[LambdaLR]:
    """Build one scheduler per optimizer, `done` steps on its way; none for a constant rate."""
    # The rate is a function of the step alone: a resumed run needs nothing but its step, and may change the settings.
    if settings.kind == "constant" and not settings.warmup:
        return []
    schedules = [LambdaLR(optimizer, lambda step: rate_factor(settings, step, steps)) for optimizer in optimizers]
    for schedule in schedules:
        # Set by hand: `step()` called `done` times before any optimizer step would warn, and take its time.
        schedule.last_epoch = done
        for group, base in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
            group["lr"] = base * rate_factor(settings, done, steps)
    return schedules


def rate_factor(settings: ScheduleSettings, step: int, steps: int) -> float:
    """Return the multiplier of the learning rate at optimizer step `step` (from 0) of `steps`."""
    if step < settings.warmup:
        return (step + 1) / (settings.warmup + 1)
    if settings.kind == "constant":
        return 1.0
    if settings.kind == "steps":
        return float(settings.factor ** sum(step >= milestone for milestone in settings.milestones))
    progress = min(1.0, (step - settings.warmup) / max(1, steps - settings.warmup))
    remaining = (1 + math.cos(math.pi * progress)) / 2
    if settings.kind == "linear":
        remaining = 1 - progress
    return settings.final + (1 - settings.final) * remaining
