"""Builds the user's own critic, by a function named in the settings."""

from __future__ import annotations

from torch import nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.factory import call_factory
from decoupled_pp.core.objective import CriticContext
from decoupled_pp.settings.critics import FactoryCritic


def build_from_factory(settings: FactoryCritic, context: CriticContext) -> nn.Module:
    """Call `factory(context, **arguments)`."""
    critic = call_factory(settings.factory, "critic.factory", context, **settings.arguments)
    if not isinstance(critic, nn.Module):
        raise UsageError(
            f"`critic.factory` {settings.factory!r} returned {type(critic).__name__}; "
            "return an nn.Module that maps the stage's output to logits",
            code="factory-wrong-result",
            key="critic.factory",
        )
    return critic
