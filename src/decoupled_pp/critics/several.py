"""Builds several fresh critics of one simple kind, for the critics that are made of them."""

from __future__ import annotations

from typing import Literal

from torch import nn

from decoupled_pp.core.objective import CriticContext
from decoupled_pp.critics.head import matching_head
from decoupled_pp.critics.mlp_sr import build_mlp_sr
from decoupled_pp.settings.critics import MlpSrCritic


def build_bases(kind: Literal["head", "mlp_sr"], count: int, context: CriticContext) -> list[nn.Module]:
    """Build `count` critics of one stage, each with weights of its own."""
    if kind == "head":
        return [matching_head(context.hidden, context.output, context.stage, context.class_dim) for _ in range(count)]
    return [build_mlp_sr(MlpSrCritic(kind="mlp_sr"), context) for _ in range(count)]
