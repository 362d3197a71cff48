"""Measures seconds of forward and backward of every layer, and of the critic at every cut, on copies of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from decoupled_pp.core.copies import copy_of
from decoupled_pp.core.device import cuda_devices, on_meta
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import CriticBuilder, CriticContext
from decoupled_pp.core.packets import Payload, as_tuple, map_payload, takes_gradient
from decoupled_pp.models.cutting.layers import LAYER_FAULTS, misfit, zeros_if_meta
from decoupled_pp.models.cutting.objective import CriticWithLoss, Objective

WARM_UP = 2  # runs before the measured ones: allocator, lazy library initialisation, kernel choice

Reach: TypeAlias = Literal["forward", "input", "all"]  # "input": and backward, without the weights' gradients


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of a module's passes."""

    forward: float
    input_gradient: float  # the backward pass to the input alone; 0 if the input takes no gradient
    weight_gradient: float  # the rest of the whole backward pass


def measure_passes(
    module: nn.Module, given: Payload, device: torch.device, *, objective: Objective | None = None, repeats: int = 5
) -> PassSeconds:
    """Measure the passes of a module and its `objective`. Measuring changes the module: give a copy."""
    reaches: tuple[Reach, ...] = ("forward", "input", "all")
    forward, to_input, whole = (_seconds(module, given, device, objective, repeats, reach) for reach in reaches)
    # The medians of a short pass may come in any order; a longer pass counts as taking at least as long.
    to_input = min(max(to_input, forward), whole)
    forward = min(forward, to_input)
    return PassSeconds(forward, to_input - forward, whole - to_input)


def measure_layers(
    module: nn.Sequential,
    hiddens: Sequence[Payload],
    device: torch.device,
    *,
    objective: Objective | None = None,
    repeats: int = 5,
) -> tuple[float, ...]:
    """Return seconds of forward + backward of every layer, on copies: module and generators stay as they are.

    The backward pass includes the gradient for the layer's input, which the first layer of a stage will not need.
    """
    seconds: list[float] = []
    layers = list(module.named_children())
    with torch.random.fork_rng(devices=cuda_devices(device)):
        for (name, layer), given in zip(layers, hiddens, strict=True):
            # The loss runs on the last layer's output, so that layer's stage pays for it.
            is_last = len(seconds) == len(layers) - 1
            try:
                copied = runnable_copy(layer, device)
                seconds.append(_seconds(copied, given, device, objective if is_last else None, repeats))
            except UsageError:
                raise
            except LAYER_FAULTS as error:
                raise misfit(f"layer {name!r}", layer, given, error) from error
    return tuple(seconds)


def measure_critics(
    contexts: Sequence[CriticContext],
    critic: CriticBuilder,
    device: torch.device,
    *,
    objective: Objective,
    repeats: int = 5,
) -> tuple[float | UsageError, ...]:
    """Return seconds of forward + backward of the critic at every place, or why there is none.

    Critics of different stages behind one layer that compute alike are measured once. The generators stay as they are.
    """
    results: list[float | UsageError] = []
    known: dict[object, float | UsageError] = {}
    with torch.random.fork_rng(devices=cuda_devices(device)):
        for context in contexts:
            try:
                built = critic(context)
            except UsageError as error:
                results.append(error)
                continue
            key = context.boundary, critic_signature(built)
            if key not in known:
                known[key] = _critic_seconds(built, context, device, objective, repeats)
            results.append(known[key])
    return tuple(results)


def critic_signature(critic: nn.Module) -> str:
    """Return a text that is equal for critics that compute alike: their modules, plain attributes and shapes."""
    attributes = []
    for part in critic.modules():
        attributes.append({key: value for key, value in vars(part).items() if isinstance(value, int | float | str)})
    return f"{critic} {attributes} {[tuple(parameter.shape) for parameter in critic.parameters()]}"


def runnable_copy(module: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy on a device; a copy of a module on the meta device gets storage and small random weights."""
    copied = copy_of(module)
    if on_meta(copied):
        # to_empty leaves whatever was in the memory, NaNs and denormals included, which can slow arithmetic down.
        copied.to_empty(device=device)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.normal_(0, 0.02)
            for buffer in copied.buffers():
                buffer.zero_()
    return copied.to(device)


def _critic_seconds(
    critic: nn.Module, context: CriticContext, device: torch.device, objective: Objective, repeats: int
) -> float | UsageError:
    try:
        module = CriticWithLoss(critic, context, objective)
        seconds = _seconds(module, context.hidden, device, None, repeats)
        if objective.relearned:
            seconds += _seconds(module, context.hidden, device, None, repeats, "forward")
        return seconds
    except UsageError as error:
        return error
    except LAYER_FAULTS as error:
        return misfit(f"the critic of stage {context.stage}", critic, context.hidden, error)


def _seconds(  # noqa: PLR0917 - what to run, where, how far and how often
    module: nn.Module,
    given: Payload,
    device: torch.device,
    objective: Objective | None,
    repeats: int,
    reach: Reach = "all",
) -> float:
    """Return the median seconds of one pass in training mode. The module is changed: give a copy."""
    module = module.to(device).train()
    leaves = map_payload(lambda tensor: _leaf(tensor, device), given)

    def run() -> None:
        _one_pass(module, leaves, objective, reach)

    with torch.enable_grad():  # the caller may have switched gradients off
        for _ in range(WARM_UP):
            run()
        if device.type == "cuda":
            return _seconds_on_cuda(run, repeats, device)
        return _seconds_on_cpu(run, repeats)


def _leaf(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device that takes a gradient if its dtype can have one."""
    moved = zeros_if_meta(tensor).detach().to(device, copy=True)
    return moved.requires_grad_(takes_gradient(moved))


def _one_pass(module: nn.Module, given: Payload, objective: Objective | None, reach: Reach = "all") -> None:
    """Run forward and backward once; without an objective the gradient of the output is made of ones."""
    # The clone lets a module work in place on what would otherwise be a leaf, which autograd refuses.
    result = module(map_payload(torch.clone, given))
    if objective is not None:
        result = objective(result)
    roots = [tensor for tensor in as_tuple(result) if tensor.requires_grad]
    leaves = [tensor for tensor in as_tuple(given) if tensor.requires_grad]
    gradients = [torch.ones_like(root) for root in roots]
    if reach == "all" and roots:
        torch.autograd.backward(roots, gradients)
    elif reach == "input" and roots and leaves:
        torch.autograd.backward(roots, gradients, inputs=leaves)
    module.zero_grad(set_to_none=True)
    for tensor in as_tuple(given):
        tensor.grad = None


def _seconds_on_cpu(run: Callable[[], None], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _seconds_on_cuda(run: Callable[[], None], repeats: int, device: torch.device) -> float:
    # Kernels run after their launch returns, so events on the stream are timed and the host waits once, at the end.
    with torch.cuda.device(device):
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        torch.cuda.synchronize(device)
        for start, end in pairs:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
        milliseconds: list[float] = [start.elapsed_time(end) for start, end in pairs]
        return statistics.median(milliseconds) / 1000
