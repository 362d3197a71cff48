"""Turns what a script chooses by name, dictionary or object into the checked section, or the builder, it means."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import torch
from pydantic import TypeAdapter, ValidationError, create_model
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from decoupled_pp.core.arguments import expect_function
from decoupled_pp.core.copies import copy_of
from decoupled_pp.core.errors import UsageError, shown
from decoupled_pp.core.objective import CriticBuilder, CriticContext
from decoupled_pp.core.paths import expanded
from decoupled_pp.critics import build_critic
from decoupled_pp.pipeline.optim import OptimizerFactory, refuse_closure
from decoupled_pp.pipeline.rules.table import RULES
from decoupled_pp.pipeline.schedules import ScheduleFactory
from decoupled_pp.settings.critics import CriticSettings
from decoupled_pp.settings.load import usage_error
from decoupled_pp.settings.rules import BUILT_IN_RULES, CorrectionSettings, CriticTargetSettings, RuleSettings
from decoupled_pp.settings.run import OptimizerSettings, ScheduleSettings, Settings
from decoupled_pp.settings.sections import Section, section_types

S = TypeVar("S", bound=Section)

ScheduleChoice: TypeAlias = "str | dict[str, Any] | ScheduleSettings | ScheduleFactory | None"
"""A learning-rate schedule by kind, as a settings section, or as a function of an optimizer; None: constant."""

CriticChoice: TypeAlias = "str | dict[str, Any] | CriticSettings | nn.Module | Sequence[nn.Module] | CriticBuilder"
"""A critic by kind, as a settings section, as one module (copied per stage), as one per stage, or as a builder."""

CorrectionChoice: TypeAlias = "dict[str, Any] | CorrectionSettings | None"
"""End-to-end steps between local ones, as a settings section."""

RuleChoice: TypeAlias = "str | dict[str, Any] | RuleSettings"
"""Target that critics learn from: a kind, or a settings section."""

OptimizerChoice: TypeAlias = "str | dict[str, Any] | OptimizerSettings | OptimizerFactory"
"""An optimizer of `torch.optim` by name, as a settings section, or a function of the parameters."""


def choose_section(choice: dict[str, Any] | S | None, section: type[S], key: str) -> S:
    """Return the section that a dictionary means; None means its defaults."""
    if isinstance(choice, section):
        return choice
    return cast(S, _checked(lambda: section.model_validate({} if choice is None else choice), key, section))


def choose_value(key: str, value: Any) -> Any:
    """Return the value of a setting that is an argument of its own in scripts, checked as in a file."""
    section, _, field = key.rpartition(".")
    return getattr(choose_section({field: value}, _alone(key), section), field)


@cache
def _alone(key: str) -> type[Section]:
    """Return a section with one field of the settings."""
    section, _, name = key.rpartition(".")
    owner = section_types(Settings.model_fields[section].annotation)[0] if section else Settings
    fields: Any = {name: (owner.model_fields[name].annotation, owner.model_fields[name])}
    return create_model(owner.__name__, __base__=Section, **fields)


def choose_critic(choice: CriticChoice) -> CriticBuilder:
    """Return the builder that a user's choice means."""
    if isinstance(choice, str):
        choice = {"kind": choice}
    if isinstance(choice, dict):
        return build_critic(_by_kind(choice, CriticSettings, "critic"))
    if isinstance(choice, nn.Module):
        return partial(_copied_critic, choice)
    if isinstance(choice, list | tuple):
        return partial(_listed_critic, choice)
    if isinstance(choice, Section):
        return build_critic(choice)
    wanted = "a kind, a dictionary, modules or a function of a CriticContext, or leave it out for the default"
    expect_function("`critic`", choice, 1, wanted, key="critic")
    return cast(CriticBuilder, choice)


def choose_folder(name: str, choice: Any) -> Path:
    """Return the folder that an argument of a script names."""
    if not isinstance(choice, str | Path):
        raise UsageError(f"{name} is {shown(choice)}; give the path of a folder", code="unusable-path")
    return Path(expanded(choice))


def choose_rule(choice: RuleChoice) -> RuleSettings:
    """Return the section that chooses the training rule."""
    if isinstance(choice, RuleSettings):
        return choice
    given = choice if isinstance(choice, dict) else {"kind": choice}
    kind = given.get("kind")
    if (
        isinstance(kind, str) and kind in RULES and kind not in BUILT_IN_RULES
    ):  # a rule of the user's own; options need a section of its own
        return choose_section(given, RuleSettings, "critic_target")
    return cast(RuleSettings, _by_kind(given, CriticTargetSettings, "critic_target"))


def choose_optimizer(choice: OptimizerChoice) -> OptimizerSettings | OptimizerFactory:
    """Return the optimizer that a user's choice means."""
    if isinstance(choice, str):
        choice = {"kind": choice}
    if isinstance(choice, dict):
        return choose_section(choice, OptimizerSettings, "optimizer")
    if isinstance(choice, Optimizer) or not (callable(choice) or isinstance(choice, OptimizerSettings)):
        if isinstance(choice, Optimizer):
            refuse_closure(choice)  # a function that builds it would be refused, too
        raise _not_a_recipe("optimizer", choice, f"{_as_recipe(choice)}, or give a function that builds one")
    if callable(choice):
        expect_function("`optimizer`", choice, 1, "a function of the parameters of one stage", key="optimizer")
    return choice


def choose_schedule(choice: ScheduleChoice) -> ScheduleSettings | ScheduleFactory:
    """Return the schedule that a user's choice means."""
    if isinstance(choice, str):
        choice = {"kind": choice}
    if isinstance(choice, dict | ScheduleSettings) or choice is None:
        return choose_section(choice, ScheduleSettings, "schedule")
    if isinstance(choice, LRScheduler) or not callable(choice):
        raise _not_a_recipe("schedule", choice, _as_schedule(choice))
    expect_function(
        "`schedule`", choice, 1, "a function of an optimizer that returns a torch scheduler", key="schedule"
    )
    return choice


def _as_recipe(optimizer: object) -> str:
    """Return the argument that means what a built optimizer is."""
    if not isinstance(optimizer, Optimizer) or not hasattr(torch.optim, type(optimizer).__name__):
        return 'optimizer={"kind": "AdamW", "lr": 1e-3}'
    usual = {name: one.default for name, one in inspect.signature(type(optimizer)).parameters.items()}
    changed = {key: value for key, value in optimizer.defaults.items() if value != usual.get(key, value)}
    recipe: dict[str, Any] = {"kind": type(optimizer).__name__, "lr": optimizer.defaults["lr"]}
    changed.pop("lr", None)
    if changed:
        recipe["arguments"] = changed
    return f"optimizer={recipe}"


def _as_schedule(choice: object) -> str:
    """Return the argument that means what a built scheduler is; of a list, how to take one after the other."""
    if isinstance(choice, ReduceLROnPlateau):
        return 'schedule={"kind": "plateau"}'
    name = type(choice).__name__ if isinstance(choice, LRScheduler) else "CosineAnnealingLR"
    arguments = {"ChainedScheduler": "[...]", "SequentialLR": "optimizer, [...], milestones=[...]"}
    if isinstance(choice, list | tuple):
        name = "SequentialLR"
    return f"schedule=lambda optimizer: {name}({arguments.get(name, 'optimizer, ...')})"


def _not_a_recipe(key: str, choice: object, line: str) -> UsageError:
    """Return the error of a built object, or of anything else, where each stage is to build its own."""
    return UsageError(
        f"`{key}` is a {type(choice).__name__}; every stage builds its own: write {line}",
        code=f"{key}-already-built",
        key=key,
    )


def _by_kind(given: dict[str, Any], union: Any, key: str) -> Any:
    if not isinstance(given.get("kind"), str):  # pydantic would print it, whatever it is
        given = given | {"kind": shown(given.get("kind"))}
    return _checked(lambda: TypeAdapter(union).validate_python(given), key)


def _checked(validate: Callable[[], Any], key: str, section: type[Section] | None = None) -> Any:
    try:
        return validate()
    except ValidationError as error:
        raise usage_error(error, key, section) from None


def _copied_critic(critic: nn.Module, _context: CriticContext) -> nn.Module:
    return copy_of(critic)


def _listed_critic(critics: Sequence[nn.Module], context: CriticContext) -> nn.Module:
    if len(critics) != context.stages - 1:
        raise UsageError(
            f"`critic` lists {len(critics)} modules for {context.stages} stages; give one for every stage but the last",
            code="one-critic-per-stage",
            key="critic",
        )
    return copy_of(critics[context.stage])
