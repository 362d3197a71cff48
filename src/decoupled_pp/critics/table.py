"""The table of critics that a settings file can name. A critic maps a stage's output to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.factory import call_factory
from decoupled_pp.core.objective import Critic, CriticBuilder, CriticContext
from decoupled_pp.critics.auglocal import build_auglocal
from decoupled_pp.critics.auto import build_auto
from decoupled_pp.critics.collaborative import build_collaborative
from decoupled_pp.critics.conv import build_conv
from decoupled_pp.critics.head import build_head
from decoupled_pp.critics.infopro import build_infopro
from decoupled_pp.critics.lls import build_lls
from decoupled_pp.critics.mlp_sr import build_mlp_sr
from decoupled_pp.critics.neuron_groups import build_neuron_groups
from decoupled_pp.critics.overlap import OverlapBuilder
from decoupled_pp.critics.predsim import build_predsim
from decoupled_pp.critics.reconstruct import build_reconstruct
from decoupled_pp.critics.sgr import LastStageSgr, build_sgr
from decoupled_pp.critics.vocabulary import build_vocabulary
from decoupled_pp.settings.critics import CriticSettings, FactoryCritic, SgrCritic


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


KINDS: dict[str, Callable[[Any, CriticContext], nn.Module]] = {
    "auto": build_auto,
    "head": build_head,
    "conv": build_conv,
    "mlp_sr": build_mlp_sr,
    "auglocal": build_auglocal,
    "predsim": build_predsim,
    "infopro": build_infopro,
    "lls": build_lls,
    "neuron_groups": build_neuron_groups,
    "collaborative": build_collaborative,
    "sgr": build_sgr,
    "reconstruct": build_reconstruct,
    "vocabulary": build_vocabulary,
    "factory": build_from_factory,
}
"""`critic.kind` -> the function that builds the critic of one stage."""


@dataclass(frozen=True)
class _SettingsBuilder:
    """Builds the critics that a `critic` section names."""

    settings: CriticSettings

    def __call__(self, context: CriticContext) -> nn.Module:
        """Build the critic of one stage before the last."""
        return KINDS[self.settings.kind](self.settings, context)

    def closing(self) -> Critic | None:
        """Build what judges the last stage, whose output is the logits; None: the run's loss alone."""
        return LastStageSgr(self.settings) if isinstance(self.settings, SgrCritic) else None


def build_critic(settings: CriticSettings, overlap: int = 0) -> CriticBuilder:
    """Return the builder of every stage's critic; initial weights come from torch's global generator.

    With `overlap`, every stage trains that many first layers of the next one redundantly, below its critic. The
    builder's `closing()` builds what judges the last stage, if this kind has a say there.
    """
    builder = _SettingsBuilder(settings)
    return OverlapBuilder(builder, overlap) if overlap else builder
