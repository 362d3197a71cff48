"""Measures a network for the planner: times, activations, parameters, optimizer state of layers and critics."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from decoupled_pp.commands.plan.costs import Piece, Profile
from decoupled_pp.core.copies import copy_of
from decoupled_pp.core.device import choose_device, cuda_devices
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import CriticBuilder, CriticContext
from decoupled_pp.core.packets import Loss, Payload, as_tuple, batch_size, map_payload, payload_bytes, takes_gradient
from decoupled_pp.core.threads import choose_threads
from decoupled_pp.critics import build_critic
from decoupled_pp.models.cutting import measure_passes, stand_in_objective, trace
from decoupled_pp.models.cutting.layers import LAYER_FAULTS, critic_context, misfit, zeros_if_meta
from decoupled_pp.models.cutting.measure import runnable_copy
from decoupled_pp.models.cutting.objective import CriticWithLoss, Objective
from decoupled_pp.pipeline.activations import SavedActivations
from decoupled_pp.pipeline.losses import find_loss
from decoupled_pp.pipeline.optim import OptimizerFactory
from decoupled_pp.settings.run import BalanceSettings, OptimizerSettings, Settings
from decoupled_pp.training.memory import optimizer_cost
from decoupled_pp.training.prepare import prepare


@dataclass(frozen=True)
class _Method:
    """Device, loss and optimizer of a measurement."""

    device: torch.device
    objective: Objective
    optimizer: OptimizerSettings | OptimizerFactory


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
) -> Profile:
    """Measures every layer, and the critic after every layer but the last, on copies of them.

    The loss, with a made-up target, counts with the last layer and every critic. Critics that depend on the number of
    stages are built for an even cut. UsageError says which layer fails.
    """
    hiddens, output = trace(module, sample)
    objective = stand_in_objective(loss, zeros_if_meta(output).to(device))
    outputs = [*hiddens[1:], output]
    method = _Method(device, objective, optimizer)
    saved = _saved(module, sample, device, objective)
    layers: list[Piece] = []
    # What the network draws later must not depend on having been planned: the generators come back as they were.
    with torch.random.fork_rng(devices=cuda_devices(device)):
        for index, (name, layer) in enumerate(module.named_children()):
            last = index == len(module) - 1
            floating = [tensor for tensor in as_tuple(outputs[index]) if takes_gradient(tensor)]
            costs = _costs(name, layer, hiddens[index], method, objective if last else None)
            sizes = {"output_bytes": payload_bytes(outputs[index]), "gradient_bytes": payload_bytes(tuple(floating))}
            layers.append(Piece(name, **costs, **saved[index], **sizes))
        count = max(2, stages)
        critics = []
        for end in range(1, len(module)):
            stage = min(max(round(end * count / len(module)) - 1, 0), count - 2)  # AugLocal's depth depends on it
            context = critic_context(module, hiddens, output, loss, boundary=end, stage=stage, stages=count)
            critics.append(_critic(critic, context, hiddens[end - 1], method))
    machine = f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}"
    return Profile(
        source=f"{source}; {machine}; {time.strftime('%Y-%m-%d')}",
        samples=batch_size(sample),
        target_bytes=as_tuple(output)[0][..., 0].numel() * 8,  # int64 class indices; for others see docs/planner.md
        layers=tuple(layers),
        critics=tuple(critics),
        stages=stages,
    )


def measure_configured(settings: Settings, ranks: int, name: str) -> tuple[Profile, nn.Sequential]:
    """Returns the profile and the network of a settings file, as one of `ranks` ranks on this machine would run it."""
    torch.set_num_threads(choose_threads(settings.threads, ranks).count)
    # One stage: the cut is what is to be found, and a cut by time would measure everything once more.
    uncut = {"stages": 1, "cut": "uniform", "balance": BalanceSettings()}
    _, _, plan = prepare(settings.model_copy(update=uncut))
    profile = measure_profile(
        plan.module,
        plan.sample,
        build_critic(settings.critic, settings.critic_overlap),
        stages=ranks,
        loss=find_loss(settings.loss),
        optimizer=settings.optimizer,
        device=choose_device(settings.device, 0, 1),
        source=name,
    )
    return profile, plan.module


def _costs(
    name: str, module: nn.Module, given: Payload, method: _Method, objective: Objective | None = None
) -> dict[str, Any]:
    """Measures times, parameters and optimizer state of a module on a copy; returns those fields of a `Piece`."""
    copied = runnable_copy(module, method.device)
    try:
        passes = measure_passes(copied, given, method.device, objective=objective)
    except UsageError:
        raise
    except LAYER_FAULTS as error:
        raise misfit(f"layer {name!r}", module, given, error) from error
    step, state = optimizer_cost(copied, method.optimizer)
    parameters = tuple(copied.parameters())
    trainable = payload_bytes(tuple(p for p in parameters if p.requires_grad))
    return {
        **asdict(passes),
        "step": step,
        "parameter_bytes": trainable,
        "state_bytes": state,
        "frozen_bytes": payload_bytes(parameters) - trainable + payload_bytes(tuple(copied.buffers())),
    }


def _saved(module: nn.Sequential, sample: Payload, device: torch.device, objective: Objective) -> list[dict[str, int]]:
    """Returns the bytes that autograd keeps for every layer alone, and beside what the layers before it keep."""
    if any(parameter.is_meta for parameter in module.parameters()):  # it may be too large; shapes are enough here
        device = torch.device("meta")
    copied = copy_of(module).to(device).train()
    owned = [*copied.parameters(), *copied.buffers()]
    saved: list[dict[str, int]] = []
    with torch.enable_grad(), torch.random.fork_rng(devices=cuda_devices(device)), SavedActivations(owned) as chain:
        current = map_payload(lambda tensor: tensor.to(device), sample)
        for index, layer in enumerate(copied):
            last = index == len(copied) - 1
            alone = _kept(copy_of(layer), map_payload(torch.detach, current), objective if last else None)
            before = chain.peak
            current = layer(current)
            if last:
                objective(as_tuple(current)[0])
            saved.append({"saved_bytes": alone, "saved_beside": chain.peak - before})
    return saved


def _kept(module: nn.Module, given: Payload, objective: Objective | None = None) -> int:
    """Returns the bytes that autograd keeps after a forward pass on a tensor that takes a gradient."""
    with SavedActivations([*module.parameters(), *module.buffers()]) as saved:
        inputs = map_payload(
            lambda tensor: tensor.clone().requires_grad_() if takes_gradient(tensor) else tensor, given
        )
        result = module(map_payload(torch.clone, inputs))  # a module may work in place, which no leaf allows
        if objective is not None:
            objective(result)
    return saved.peak


def _critic(critic: CriticBuilder, context: CriticContext, below_input: Payload, method: _Method) -> Piece | None:
    """Measures a critic with its loss; returns None where none can be built.

    Its saved activations are counted beside those of the layer below it, because both may keep that layer's output.
    """
    try:
        built = CriticWithLoss(critic(context), context, method.objective)
        costs = _costs("critic", built, context.hidden, method)
    except UsageError:
        return None
    built = built.to(method.device).train()
    kept = _kept(built, map_payload(lambda tensor: tensor.to(method.device), context.hidden))
    below = runnable_copy(context.layers[context.boundary - 1], method.device).train()
    given = map_payload(lambda tensor: zeros_if_meta(tensor).to(method.device), below_input)
    beside = max(0, _kept(nn.Sequential(below, built), given) - _kept(below, given))
    return Piece("critic", **costs, saved_bytes=kept, saved_beside=beside)
