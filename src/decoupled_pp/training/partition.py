"""Implements the public `partition`: rank 0 chooses the cut, and every rank takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from decoupled_pp.core import environment
from decoupled_pp.core.device import choose_device
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Payload
from decoupled_pp.core.plans import Plan
from decoupled_pp.links import join_world
from decoupled_pp.models.cutting import By, Fits, as_sequential, cut_network
from decoupled_pp.pipeline.losses import LossChoice, find_loss
from decoupled_pp.settings.run import refuse_speeds
from decoupled_pp.training.choices import (
    CriticChoice,
    OptimizerChoice,
    RuleChoice,
    choose_critic,
    choose_optimizer,
    choose_rule,
    choose_value,
)
from decoupled_pp.training.memory import Room, limits_of, predict_memory, refuse_overflow
from decoupled_pp.training.script_terms import script_terms


@script_terms()
def partition(
    layers: nn.Sequential | Sequence[nn.Module],
    stages: int,
    by: By = "time",
    sample: Payload | None = None,
    *,
    critic: CriticChoice | None = "auto",
    critic_target: RuleChoice = "label",
    loss: LossChoice = "cross_entropy",
    device: str = "auto",
    speeds: Sequence[float] | None = None,
    memory: str | int | Sequence[str | int] | None = None,
    optimizer: OptimizerChoice = "AdamW",
    accumulate: int = 1,
    timeout_seconds: float = 300.0,
) -> Plan:
    """Cut a network into stages.

    Under torchrun every rank calls this with the same layers; rank 0 chooses the cut for all.

    Args:
        layers: An `nn.Sequential` or a list of modules; each gets what the one before returned, a tensor or a tuple.
            Marked with `cut_after`, it is cut at these places only, unless `by` is a list.
        stages: Number of stages; under torchrun the number of ranks.
        by: "time" (measured forward + backward of every layer and critic), "parameters", "uniform", or the number of
            layers of every stage, e.g. [3, 3, 2, 2]. Min-max cuts are exact.
        sample: An input micro-batch. Critics are built to fit its shapes, so `Trainer` needs it too.
        critic: Counted in the balance; use the same for `Trainer`. None: leave critics out.
        critic_target: As for `Trainer`; critics that learn from the next stage's losses go forward twice.
        loss: Counted in the balance.
        device: Where to measure: "auto", "cpu" or "cuda".
        speeds: Speeds of the stages' devices, relative to each other, e.g. [1, 1, 0.5, 1]; for "time" and "parameters".
        memory: Memory of the devices, "20GiB" or one for each stage: no stage may need more for weights,
            gradients, optimizer and activations. For "time" and "parameters"; another cut is checked.
        optimizer: Its state is counted; use the same for `Trainer`.
        accumulate: Micro-batches per optimizer step; then gradients stay while activations come and go.
        timeout_seconds: Longest wait for rank 0's choice.

    Returns:
        The plan.

    Raises:
        UsageError: Layers that do not fit each other, more stages than layers, a cut that does not add up, parameters
            shared across a cut, and the like, each named.
    """
    passes = choose_rule(critic_target).critic_passes
    builder = choose_critic(critic) if critic is not None and passes else None
    relearned = passes > 1
    criterion = find_loss(loss)
    stages = choose_value("stages", stages)
    by = choose_value("cut", by)
    speeds = choose_value("balance.speeds", speeds)
    refuse_speeds(speeds, stages, by)
    accumulate = choose_value("training.accumulate", accumulate)
    timeout_seconds = choose_value("links.timeout_seconds", timeout_seconds)
    world = join_world(timeout_seconds) if environment.world_size() > 1 else None
    place = choose_device(device, environment.local_rank(), environment.local_world_size())

    def cut(how: By, fits: Fits | None = None) -> Plan:
        return cut_network(
            layers, stages, how, sample, builder, criterion, place, relearned=relearned, speeds=speeds, fits=fits
        )

    def choose() -> Plan:
        if memory is None:
            return cut(by)
        if sample is None:
            raise UsageError(
                "`balance.memory` needs a sample to measure with: pass sample=",
                code="plan-without-sample",
                key="balance.memory",
            )
        limits = limits_of(memory, stages)
        needs: dict[str, Any] = {
            "loss": criterion,
            "optimizer": choose_optimizer(optimizer),
            "accumulate": accumulate,
        }
        plan = cut(by, Room(as_sequential(layers), sample, builder, limits=limits, **needs))
        refuse_overflow(predict_memory(plan, builder, **needs), limits)
        return plan

    if world is None:
        return choose()

    def measure() -> dict[str, Any]:
        plan = choose()
        return {"sizes": plan.sizes, "layers": plan.layer_seconds, "critics": plan.critic_seconds}

    chosen = world.channel().from_rank_0("cut", measure, timeout_seconds)
    return replace(
        cut(list(chosen["sizes"])),
        layer_seconds=tuple(chosen["layers"]) if chosen["layers"] is not None else None,
        critic_seconds=tuple(chosen["critics"]) if chosen["critics"] is not None else None,
    )
