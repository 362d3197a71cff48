"""Seconds of forward and backward of every layer and of the critic at every cut, on copies of them."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from decoupled_pp.core.device import cuda_devices
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import Critic, CriticBuilder, CriticContext, View, local_loss
from decoupled_pp.core.packets import Loss, Payload, as_tuple, map_payload
from decoupled_pp.models.cutting.layers import LAYER_FAULTS, misfit, present

WARM_UP = 2
"""Runs before the measured ones: allocator, lazy library initialisation, kernel choice."""


@dataclass(frozen=True)
class Objective:
    """The scalar that is differentiated where there is no real target.

    Attributes:
        loss: Of logits and `target`.
        target: A made-up one that fits.
        relearned: Critics learn from the next stage's losses, and go forward once more for it (`critic_target`).
    """

    loss: Loss
    target: Payload
    relearned: bool = False

    def __call__(self, logits: Tensor) -> Tensor:
        """The scalar of a module that gives logits."""
        return self.loss(logits, map_payload(lambda tensor: tensor.to(logits.device), self.target))


class Judged(nn.Module):
    """A critic with the loss that its stage lowers, as one module: hidden -> scalar."""

    def __init__(self, critic: nn.Module, context: CriticContext, objective: Objective) -> None:
        super().__init__()
        self.critic, self._objective, self._sample = critic, objective, context.sample

    def forward(self, hidden: Payload) -> Tensor:
        """The local loss of a made-up target; the network's input stands for what is given and for what rides along.

        A critic that differentiates through the stage's layers is measured without that part: they are not here.
        """
        device = as_tuple(hidden)[0].device
        target, sample = (map_payload(lambda t: t.to(device), p) for p in (self._objective.target, self._sample))
        rider = () if isinstance(self.critic, Critic) and self.critic.follows_input else sample
        return local_loss(self.critic, View(sample, hidden, target, rider), self._objective.loss)


def stand_in_objective(loss: Loss | None, output: Tensor, *, relearned: bool = False) -> Objective:
    """`loss` with a made-up target that fits, so that its cost is measured too (it counts with a large vocabulary).

    Tried in turn: class indices shaped like the output without its last dimension; values shaped like the output.
    A loss that takes neither, or None, is replaced by the mean square of the output.
    """
    if loss is not None:
        indices = torch.zeros(output.shape[:-1], dtype=torch.int64, device=output.device)
        for target in (indices, torch.zeros_like(output)):
            if _accepts(loss, output, target):
                return Objective(loss, target, relearned)
    return Objective(_mean_square, (), relearned)


def _mean_square(logits: Tensor, _: Payload) -> Tensor:
    return logits.float().square().mean()


def _accepts(loss: Loss, output: Tensor, target: Tensor) -> bool:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")  # mse_loss only warns of a target it broadcasts
            return loss(output, target).dim() == 0
    except Exception:  # a user's function may raise anything at a target it was not made for
        return False


def runnable_copy(module: nn.Module, device: torch.device) -> nn.Module:
    """A deep copy on a device; one of a module on the meta device gets storage, and small random weights."""
    copied = copy.deepcopy(module)
    if any(tensor.is_meta for tensor in chain(copied.parameters(), copied.buffers())):
        copied.to_empty(device=device)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.normal_(0, 0.02)
            for buffer in copied.buffers():
                buffer.zero_()
    return copied.to(device)


def _leaf(tensor: Tensor, device: torch.device) -> Tensor:
    moved = present(tensor).detach().to(device, copy=True)
    return moved.requires_grad_(moved.is_floating_point() or moved.is_complex())


Reach: TypeAlias = Literal["forward", "input", "all"]
"""How far a pass goes: forward only; back to the input, without the weights' gradients; all of it."""


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of a module's passes.

    Attributes:
        forward: The forward pass.
        input_gradient: The backward pass to the input alone; 0 if the input takes no gradient.
        weight_gradient: What the whole backward pass takes beyond that.
    """

    forward: float
    input_gradient: float
    weight_gradient: float


def _one_pass(module: nn.Module, given: Payload, objective: Objective | None, reach: Reach = "all") -> None:
    """Forward and backward once; without an objective the gradient of the output is made of ones."""
    # The clone lets a module work in place on what would otherwise be a leaf.
    result = module(map_payload(torch.clone, given))
    results = as_tuple(objective(result) if objective is not None else result)
    roots = [tensor for tensor in results if tensor.requires_grad]
    leaves = [tensor for tensor in as_tuple(given) if tensor.requires_grad]
    if roots and (reach == "all" or (reach == "input" and leaves)):
        aims = leaves if reach == "input" else None
        torch.autograd.backward(roots, [torch.ones_like(root) for root in roots], inputs=aims)
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


def _seconds(  # noqa: PLR0917 - what to run, where, how far and how often
    module: nn.Module,
    given: Payload,
    device: torch.device,
    objective: Objective | None,
    repeats: int,
    reach: Reach = "all",
) -> float:
    """Median seconds of one pass of `module`, which is changed by it (a copy), in training mode."""
    module = module.to(device).train()
    leaves = map_payload(lambda tensor: _leaf(tensor, device), given)

    def run() -> None:
        _one_pass(module, leaves, objective, reach)

    with torch.enable_grad():
        for _ in range(WARM_UP):
            run()
        if device.type == "cuda":
            return _seconds_on_cuda(run, repeats, device)
        return _seconds_on_cpu(run, repeats)


def measure_passes(
    module: nn.Module, given: Payload, device: torch.device, *, objective: Objective | None = None, repeats: int = 5
) -> PassSeconds:
    """Seconds of the passes of a module, which is changed by it: give a copy.

    Args:
        module: A layer or a critic.
        given: Its input.
        device: Where to measure.
        objective: Counted with it (see `stand_in_objective`).
        repeats: Measured runs; the median counts.
    """
    reaches: tuple[Reach, ...] = ("forward", "input", "all")
    forward, to_input, whole = (_seconds(module, given, device, objective, repeats, reach) for reach in reaches)
    to_input = min(max(to_input, forward), whole)  # medians of a short pass may come in any order
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
    """Seconds of forward + backward of every layer, on deep copies: the module and the generators stay as they are.

    The backward pass includes the gradient for the layer's input, which the first layer of a stage will not need.

    Args:
        module: The network.
        hiddens: Input of every layer, from `trace`.
        device: Where to measure.
        objective: Counted with the last layer (see `stand_in_objective`).
        repeats: Measured runs; the median counts.

    Raises:
        UsageError: A layer fails in training mode (such as batch normalisation of a single value).
    """
    seconds: list[float] = []
    layers = list(module.named_children())
    with torch.random.fork_rng(devices=cuda_devices(device)):
        for (name, layer), given in zip(layers, hiddens, strict=True):
            last = len(seconds) == len(layers) - 1
            try:
                copied = runnable_copy(layer, device)
                seconds.append(_seconds(copied, given, device, objective if last else None, repeats))
            except UsageError:
                raise
            except LAYER_FAULTS as error:
                raise misfit(name, layer, given, error) from error
    return tuple(seconds)


def measure_critics(
    contexts: Sequence[CriticContext],
    critic: CriticBuilder,
    device: torch.device,
    *,
    objective: Objective,
    repeats: int = 5,
) -> tuple[float | UsageError, ...]:
    """Seconds of forward + backward of the critic at every place, or why none can be there.

    Args:
        contexts: One for every place; critics that look alike behind one layer, of different stages, are measured once.
        critic: Builds the critics; the generators stay as they are.
        device: Where to measure.
        objective: The critic's loss (see `stand_in_objective`).
        repeats: Measured runs; the median counts.

    Returns:
        For every context the seconds, or the UsageError that the builder or the critic raised.
    """
    results: list[float | UsageError] = []
    alike: dict[object, float | UsageError] = {}
    with torch.random.fork_rng(devices=cuda_devices(device)):
        for context in contexts:
            try:
                built = critic(context)
            except UsageError as error:
                results.append(error)
                continue
            look = context.boundary, look_of(built)
            if look not in alike:
                alike[look] = _critic_seconds(built, context, device, objective, repeats)
            results.append(alike[look])
    return tuple(results)


def look_of(critic: nn.Module) -> str:
    """Text that is the same for critics that compute alike: their modules, plain attributes and shapes."""
    plain = [{k: v for k, v in vars(part).items() if isinstance(v, int | float | str)} for part in critic.modules()]
    return f"{critic} {plain} {[tuple(parameter.shape) for parameter in critic.parameters()]}"


def _critic_seconds(
    critic: nn.Module, context: CriticContext, device: torch.device, objective: Objective, repeats: int
) -> float | UsageError:
    try:
        judged = Judged(critic, context, objective)
        seconds = _seconds(judged, context.hidden, device, None, repeats)
        again = _seconds(judged, context.hidden, device, None, repeats, "forward") if objective.relearned else 0.0
        return seconds + again
    except UsageError as error:
        return error
    except LAYER_FAULTS as error:
        return misfit(f"critic of stage {context.stage}", critic, context.hidden, error)
