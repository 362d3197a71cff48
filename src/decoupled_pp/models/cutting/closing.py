"""Finds the last operation of a network that makes its output no logits, so that the loss of critics goes through it.

A network may end in `log_softmax`, and its loss be `nll_loss`. Critics give logits, which have no such bound: their
stages would train towards minus infinity. So the network's last operation is done to what its critics give, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.criterion import Closed, Criterion
from decoupled_pp.core.device import untouched
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import CriticContext, has_exit
from decoupled_pp.core.packets import Loss, Payload, as_tuple, first_tensor, map_payload
from decoupled_pp.core.torch_private import DispatchMode, operator_name, storage_address, writes_in_place
from decoupled_pp.models.cutting.layers import zeros_if_meta

_LAYERS = 3  # from the end, in which the operation is looked for: views and reshapes may follow it
_TOLERANCE = 1e-3


class _Exponential(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits.exp()


_CLOSINGS: dict[str, Callable[..., nn.Module]] = {
    "aten::_log_softmax": lambda dim, *_: nn.LogSoftmax(dim),
    "aten::_softmax": lambda dim, *_: nn.Softmax(dim),
    "aten::sigmoid": nn.Sigmoid,
    "aten::log_sigmoid_forward": nn.LogSigmoid,
    "aten::tanh": nn.Tanh,
    "aten::hardtanh": nn.Hardtanh,
    "aten::hardsigmoid": nn.Hardsigmoid,
    "aten::softplus": nn.Softplus,
    "aten::exp": _Exponential,
}
"""Operation -> the module that does the same, given its arguments."""


def loss_of_critic(loss: Loss, critic: nn.Module, context: CriticContext) -> Loss:
    """Return the loss of a critic's logits: the run's, behind the network's last operation if the loss may want that.

    Raises:
        UsageError: The loss wants probabilities, or their logarithms, and the network gives none.
    """
    if not isinstance(loss, Criterion) or loss.wants == "logits":
        return loss
    count = min(_LAYERS, len(context.hiddens))
    closing = closing_of(nn.Sequential(*context.layers[-count:]), context.hiddens[-count])
    if closing is None and loss.wants == "probabilities" and _within_0_and_1(context.output):
        closing = nn.Sigmoid()
    _refuse_other_output(loss, closing, context)
    if closing is None:
        return loss
    if has_exit(critic) and type(closing_of(critic, context.hidden)) is type(closing):
        return loss  # it ends as the network does
    return Closed(loss, closing)


@torch.no_grad()
def closing_of(module: nn.Module, given: Payload) -> nn.Module | None:
    """Return the operation that the output of a module ends in, if it is a known one that leaves no logits."""
    given = map_payload(torch.clone, given)
    operations = _LastOperations()
    with untouched(module, as_tuple(given)[0].device), operations:
        module.eval()
        try:
            output: Tensor = first_tensor(module(given))
        except (RuntimeError, TypeError):  # code that works in no such mode
            return None
    found = operations.behind(output)
    if found is None or isinstance(found, nn.Softmax | nn.LogSoftmax):
        return _normalised(output, found)
    return found


class _LastOperations(DispatchMode):
    """Remembers which operation has computed each tensor, by the memory that it lies in."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, nn.Module | None] = {}
        self._kept: list[Tensor] = []  # so that no memory is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        output = result[0] if isinstance(result, tuple) and result else result
        if isinstance(output, Tensor):
            sources = {_memory(one) for one in args if isinstance(one, Tensor)}
            is_view = _memory(output) in sources and not writes_in_place(func)
            if not is_view:
                self._made[_memory(output)] = _closing(operator_name(func), output, args[1:])
                self._kept.append(output)
        return result

    def behind(self, output: Tensor) -> nn.Module | None:
        """Return what made the values of a tensor."""
        return self._made.get(_memory(output))


def _memory(tensor: Tensor) -> int:
    return storage_address(tensor.untyped_storage())


def _closing(name: str, output: Tensor, arguments: Sequence[Any]) -> nn.Module | None:
    make = _CLOSINGS.get(name.removesuffix("_"))
    if make is None or not output.is_floating_point() or any(isinstance(one, Tensor) for one in arguments):
        return None
    return make(*arguments)


def _normalised(output: Tensor, found: nn.Module | None) -> nn.Module | None:
    """Return the softmax, or its logarithm, that normalises the output; `found` if it cannot be known."""
    if output.is_meta or not output.is_floating_point():
        return found
    values = output.double()
    for dim in reversed(range(1, output.dim())):  # 0 is the batch
        # Counted from the end where it is the last: critics may judge rows of a sequence alone.
        place = -1 if dim == output.dim() - 1 else dim
        if output.shape[dim] == 1 or not output.numel():
            continue
        if bool((values.logsumexp(dim).abs() < _TOLERANCE).all()):
            return nn.LogSoftmax(place)
        if bool((values >= 0).all()) and bool(((values.sum(dim) - 1).abs() < _TOLERANCE).all()):
            return nn.Softmax(place)
    return None


def _within_0_and_1(output: Tensor) -> bool:
    return bool(((output >= 0) & (output <= 1)).all())


def _refuse_other_output(loss: Criterion, closing: nn.Module | None, context: CriticContext) -> None:
    if loss.wants is None or first_tensor(context.hiddens[-1]).is_meta:
        return
    if loss.wants == "log-probabilities" and not isinstance(closing, nn.LogSoftmax | nn.LogSigmoid):
        raise UsageError(
            f"`loss` {loss.name} wants log-probabilities, and those of the network's output do not sum to 1: end the "
            "network in log_softmax, or set `loss` to one of logits, such as cross_entropy",
            code="output-does-not-fit-loss",
            key="loss",
        )
    if loss.wants == "probabilities" and not _within_0_and_1(zeros_if_meta(context.output)):
        raise UsageError(
            f"`loss` {loss.name} wants probabilities, and the network's output is not between 0 and 1: end the network "
            "in a sigmoid, or set `loss` to bce_with_logits",
            code="output-does-not-fit-loss",
            key="loss",
        )
