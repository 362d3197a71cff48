"""Measures a network for the planner: times, activations, parameters, optimizer state of layers and critics."""

from __future__ import annotations

import copy
import platform
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from decoupled_pp.commands.plan.profile import Piece, Profile
from decoupled_pp.core.device import cuda_devices
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import CriticBuilder, CriticContext
from decoupled_pp.core.packets import Loss, Payload, as_tuple, map_payload, payload_bytes
from decoupled_pp.models.cutting import measure_passes, stand_in_objective, trace
from decoupled_pp.models.cutting.layers import LAYER_FAULTS, critic_context, misfit, zeros_if_meta
from decoupled_pp.models.cutting.measure import runnable_copy
from decoupled_pp.models.cutting.objective import CriticWithLoss, Objective
from decoupled_pp.pipeline.activations import SavedActivations
from decoupled_pp.pipeline.optim import OptimizerFactory
from decoupled_pp.settings.run import OptimizerSettings
from decoupled_pp.training.memory import optimizer_cost


@dataclass(frozen=True)
class _How:
    """How to measure: where, with what loss and optimizer, how often."""

    device: torch.device
    objective: Objective
    optimizer: OptimizerSettings | OptimizerFactory
    repeats: int


def measure_profile(
    module: nn.Sequential,
    sample: Payload,
    critic: CriticBuilder,
    *,
    stages: int,
    loss: Loss,
    optimizer: OptimizerSettings | OptimizerFactory,
    device: torch.device,
    source: str,
    repeats: int = 5,
) -> Profile:
    """Measure every layer, and the critic after every layer but the last, on copies of them.

    Args:
        module: The network; as it was afterwards.
        sample: An input micro-batch.
        critic: Builds the critics.
        stages: Number of stages, for critics that depend on it; as if the cut were even.
        loss: Counted with the last layer and every critic, with a made-up target.
        optimizer: Its step and its state are measured.
        device: Where to measure.
        source: What is measured; the machine is added.
        repeats: Measured runs of every pass; the median counts.

    Raises:
        UsageError: A layer fails in training mode.
    """
    hiddens, output = trace(module, sample)
    objective = stand_in_objective(loss, zeros_if_meta(output).to(device))
    outputs = [*hiddens[1:], output]
    how = _How(device, objective, optimizer, repeats)
    kept, beside = _saved(module, sample, device, objective)
    layers = []
    with torch.random.fork_rng(devices=cuda_devices(device)):
        for index, (name, layer) in enumerate(module.named_children()):
            last = index == len(module) - 1
            piece = _piece(name, layer, hiddens[index], how, objective if last else None)
            layers.append(
                {
                    **piece,
                    "saved_bytes": kept[index],
                    "saved_beside": beside[index],
                    "output_bytes": payload_bytes(outputs[index]),
                    "gradient_bytes": sum(payload_bytes(t) for t in as_tuple(outputs[index]) if t.is_floating_point()),
                }
            )
        count = max(2, stages)
        contexts = [
            critic_context(module, hiddens, output, boundary=k, stage=_even_stage(k, len(module), count), stages=count)
            for k in range(1, len(module))
        ]
        critics = [_critic(critic, context, hiddens[context.boundary - 1], how) for context in contexts]
    with_loss = as_tuple(output)[0]
    target_bytes = with_loss[..., 0].numel() * 8  # class indices, int64; for other targets see docs/planner.md
    machine = f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}"
    return Profile(
        f"{source}; {machine}; {time.strftime('%Y-%m-%d')}",
        as_tuple(sample)[0].shape[0],
        target_bytes,
        tuple(Piece(**layer) for layer in layers),
        tuple(critics),
        stages,
    )


def _even_stage(boundary: int, layers: int, stages: int) -> int:
    """The stage that ends before layer `boundary` in an even cut: a critic may depend on it (AugLocal's depth)."""
    return min(max(round(boundary * stages / layers) - 1, 0), stages - 2)


def _piece(
    name: str,
    module: nn.Module,
    given: Payload,
    how: _How,
    objective: Objective | None,
) -> dict[str, Any]:
    """Times, parameters and optimizer state of a module, on a copy."""
    copied = runnable_copy(module, how.device)
    try:
        passes = measure_passes(copied, given, how.device, objective=objective, repeats=how.repeats)
    except UsageError:
        raise
    except LAYER_FAULTS as error:
        raise misfit(f"layer {name!r}", module, given, error) from error
    step, state = optimizer_cost(copied, how.optimizer)
    trainable = [p for p in copied.parameters() if p.requires_grad]
    return {
        "name": name,
        "forward": passes.forward,
        "input_gradient": passes.input_gradient,
        "weight_gradient": passes.weight_gradient,
        "step": step,
        "parameter_bytes": sum(p.numel() * p.element_size() for p in trainable),
        "state_bytes": state,
        "frozen_bytes": payload_bytes(tuple(copied.parameters()))
        - payload_bytes(tuple(trainable))
        + payload_bytes(tuple(copied.buffers())),
    }


def _saved(
    module: nn.Sequential, sample: Payload, device: torch.device, objective: Objective
) -> tuple[list[int], list[int]]:
    """Bytes that autograd keeps for every layer by itself, and beside what the layers before it keep."""
    if any(parameter.is_meta for parameter in module.parameters()):  # shapes will do, and no machine may hold it
        device = torch.device("meta")
    copied = copy.deepcopy(module).to(device).train()
    owned = [*copied.parameters(), *copied.buffers()]
    alone: list[int] = []
    beside: list[int] = []
    with torch.enable_grad(), torch.random.fork_rng(devices=cuda_devices(device)), SavedActivations(owned) as chain:
        current = map_payload(lambda tensor: tensor.to(device), sample)
        for index, layer in enumerate(copied):
            last = index == len(copied) - 1
            alone.append(_kept(copy.deepcopy(layer), map_payload(torch.detach, current), objective if last else None))
            before = chain.peak
            current = layer(current)
            held = objective(as_tuple(current)[0]) if last else current
            beside.append(chain.peak - before)
        del held
    return alone, beside


def _kept(module: nn.Module, given: Payload, objective: Objective | None) -> int:
    """Bytes that autograd keeps after a forward pass on a tensor that takes a gradient."""
    with SavedActivations([*module.parameters(), *module.buffers()]) as saved:
        inputs = map_payload(
            lambda tensor: tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor, given
        )
        result = module(map_payload(lambda tensor: tensor.view_as(tensor), inputs))
        result = objective(result) if objective is not None else result
        peak = saved.peak
        del result
    return peak


def _critic(
    critic: CriticBuilder,
    context: CriticContext,
    below_input: Payload,
    how: _How,
) -> Piece | None:
    """The critic's costs, its loss included, or None where none can be built.

    What it saves is counted beside what the layer below it saves, whose output both may keep.
    """
    try:
        built = CriticWithLoss(critic(context), context, how.objective)
        piece = _piece("critic", built, context.hidden, how, None)
    except UsageError:
        return None
    built = built.to(how.device).train()
    kept = _kept(built, map_payload(lambda tensor: tensor.to(how.device), context.hidden), None)
    below = runnable_copy(context.layers[context.boundary - 1], how.device).train()
    given = map_payload(lambda tensor: zeros_if_meta(tensor).to(how.device), below_input)
    both = _kept(nn.Sequential(below, built), given, None)
    beside = max(0, both - _kept(below, given, None))
    return Piece(**piece, saved_bytes=kept, saved_beside=beside)
