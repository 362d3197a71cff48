"""Checks that a critic judges: its output must be shaped like the network's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from decoupled_pp.core.device import kept_modes
from decoupled_pp.core.errors import UsageError, first_line
from decoupled_pp.core.gradients import WithoutGradients
from decoupled_pp.core.objective import CriticContext, has_exit
from decoupled_pp.core.packets import Payload, as_tuple, first_tensor, map_payload
from decoupled_pp.core.structures import as_bytes, memory_of


@torch.no_grad()
def check_critic(critic: nn.Module, context: CriticContext) -> None:
    """Run the critic on a copy of the sample, without gradients, and look at what comes out.

    It runs in eval mode; its modes are restored.
    """
    if not has_exit(critic):  # no logits to look at
        return
    where = f"stage {context.stage}: critic {type(critic).__name__}"
    given = tuple(first_tensor(context.hidden).shape)
    wanted = tuple(context.output.shape)
    parameter = next(critic.parameters(), None)
    device = context.output.device if parameter is None else parameter.device
    sample = map_payload(lambda tensor: tensor.to(device, copy=True), context.hidden)
    before = map_payload(torch.clone, sample)
    with kept_modes(critic):
        critic.eval()
        try:
            result = WithoutGradients()(critic, sample)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise UsageError(
                f"{where} fails on a stage output of shape {given}: {first_line(error)}; it must return logits of "
                f"shape {wanted}",
                code="critic-fails",
                key="critic",
            ) from error
    _refuse_changed(where, before, sample)
    is_tensor = isinstance(result, Tensor)
    if not is_tensor or tuple(result.shape) != wanted:
        got = f"shape {tuple(result.shape)}" if is_tensor else type(result).__name__
        raise UsageError(
            f"{where} turns a stage output of shape {given} into {got}, but the network's output has shape {wanted}; "
            "make the critic return logits of that shape, or choose `critic.kind` head",
            code="critic-wrong-output",
            key="critic",
        )


def _refuse_changed(where: str, before: Payload, after: Payload) -> None:
    """Raise UsageError if the critic changed its input, which is on its way to the next stage while the critic runs."""
    pairs = zip(as_tuple(before), as_tuple(after), strict=True)
    if not all(_is_same(old, new) for old, new in pairs):
        raise UsageError(
            f"{where} changes the stage's output in place, while it is being sent to the next stage; "
            "use operations that return a new tensor (inplace=False)",
            code="critic-changes-input",
            key="critic",
        )


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same bits; a NaN is the same as itself."""
    pairs = zip(memory_of(one).values(), memory_of(other).values(), strict=True)
    return all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in pairs)
