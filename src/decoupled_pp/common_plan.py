"""The public `partition`: rank 0 chooses the cut, and every rank takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from decoupled_pp import environment
from decoupled_pp.assemble import CriticChoice, CriticTargetChoice, resolve_critic, resolve_target
from decoupled_pp.contracts import Loss, Payload, Plan
from decoupled_pp.critic_sections import LabelTarget
from decoupled_pp.device import choose_device
from decoupled_pp.links import join_world
from decoupled_pp.losses import find_loss
from decoupled_pp.partitioning import By, cut_network


def partition(
    layers: nn.Sequential | Sequence[nn.Module],
    stages: int,
    by: By = "time",
    sample: Payload | None = None,
    *,
    critic: CriticChoice | None = "auto",
    critic_target: CriticTargetChoice = "label",
    loss: str | Loss = "cross_entropy",
    device: str = "auto",
    timeout_seconds: float = 300.0,
) -> Plan:
    """Cut a network into stages.

    Under torchrun every rank calls this with the same layers; rank 0 chooses the cut for all.

    Args:
        layers: An `nn.Sequential` or a list of modules; each gets what the one before returned, a tensor or a tuple.
        stages: Number of stages; under torchrun the number of ranks.
        by: "time" (measured forward + backward of every layer and critic), "parameters", "uniform", or the number of
            layers of every stage, e.g. [3, 3, 2, 2]. Min-max cuts are exact.
        sample: An input micro-batch. Critics are built to fit its shapes, so `Trainer` needs it too.
        critic: Counted in the balance; use the same for `Trainer`. None: leave critics out.
        critic_target: As for `Trainer`; critics that learn from the next stage's losses go forward twice.
        loss: Counted in the balance.
        device: Where to measure: "auto", "cpu" or "cuda".
        timeout_seconds: Longest wait for rank 0's choice.

    Returns:
        The plan.

    Raises:
        UsageError: Layers that do not fit each other, more stages than layers, a cut that does not add up, parameters
            shared across a cut, and the like, each named.
    """
    builder = resolve_critic(critic) if critic is not None else None
    relearned = not isinstance(resolve_target(critic_target), LabelTarget)
    place = choose_device(device, environment.local_rank(), environment.local_world_size())

    def cut(how: By) -> Plan:
        return cut_network(layers, stages, how, sample, builder, find_loss(loss), place, relearned=relearned)

    if environment.world_size() == 1:
        return cut(by)

    def measure() -> dict[str, Any]:
        plan = cut(by)
        return {"sizes": plan.sizes, "layers": plan.layer_seconds, "critics": plan.critic_seconds}

    chosen = join_world(timeout_seconds).channel().from_rank_0("cut", measure, timeout_seconds)
    return replace(
        cut(list(chosen["sizes"])),
        layer_seconds=tuple(chosen["layers"]) if chosen["layers"] is not None else None,
        critic_seconds=tuple(chosen["critics"]) if chosen["critics"] is not None else None,
    )
