"""Baselines for decoupled runs: the same network trained by backpropagation, in one process and pipelined."""

from __future__ import annotations

import torch

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.plans import Plan
from decoupled_pp.training.baselines.deepspeed_pipeline import DeepSpeedPipeline
from decoupled_pp.training.baselines.strategy import Strategy, Training
from decoupled_pp.training.baselines.torch_pipeline import SCHEDULES, TorchPipeline
from decoupled_pp.training.baselines.whole import Backprop, DataParallel
from decoupled_pp.training.ranks import refuse_ranks

BASELINES = ("backprop", *SCHEDULES, "deepspeed", "data_parallel")
"""Names of all baselines."""


def stages_needed(kind: str, ranks: int) -> int | None:
    """Return the stages that a plan must have for a baseline on so many ranks; None if any plan will do."""
    if kind == "deepspeed":
        return ranks
    return ranks * SCHEDULES[kind].stages_per_rank if kind in SCHEDULES else None


def build_baseline(
    kind: str, plan: Plan, training: Training, device: torch.device, *, rank: int, ranks: int
) -> Strategy:
    """Build one rank of a baseline; more than one rank must have joined the default process group."""
    if kind not in BASELINES:
        raise UsageError(
            f"`strategy`: {kind!r} is not known; one of {', '.join(BASELINES)}",
            code="not-one-of-the-choices",
            key="strategy",
        )
    refuse_ranks(kind, ranks)
    wanted = stages_needed(kind, ranks)
    if wanted not in {None, plan.stages}:
        raise UsageError(
            f"`strategy` {kind} on {ranks} ranks needs a plan of {wanted} stages, not {plan.stages}; cut the network "
            "into as many",
            code="stages-do-not-fit-strategy",
            key="stages",
        )
    if kind == "backprop":
        return Backprop(plan, training, device)
    if kind == "data_parallel":
        return DataParallel(plan, training, device, rank=rank, ranks=ranks)
    if kind == "deepspeed":
        return DeepSpeedPipeline(plan, training, device, rank=rank, ranks=ranks)
    return TorchPipeline(kind, plan, training, device, rank=rank, ranks=ranks)
