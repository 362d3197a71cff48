"""Checks that a critic judges: its output must be shaped like the network's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import CriticContext, has_exit
from decoupled_pp.core.packets import Payload, as_tuple, first_tensor, map_payload


def _refuse_changed(where: str, before: Payload, after: Payload) -> None:
    """A stage's output is on its way to the next stage while its critic runs: the critic must not change it."""
    pairs = zip(as_tuple(before), as_tuple(after), strict=True)
    if not all(torch.allclose(old, new, rtol=0, atol=0, equal_nan=True) for old, new in pairs):
        raise UsageError(
            f"{where} changes the stage's output in place, while it is being sent to the next stage; "
            "use operations that return a new tensor (inplace=False)"
        )


@torch.no_grad()
def check_critic(critic: nn.Module, context: CriticContext) -> None:
    """Run the critic on the sample (a copy; eval mode, no gradient, restored after) and look at what comes out.

    Raises:
        UsageError: It fails on the sample, changes the sample in place, or its output is not a tensor shaped like
            the network's output.
    """
    if not has_exit(critic):  # no logits to look at
        return
    where = f"stage {context.stage}: critic {type(critic).__name__}"
    given, wanted = tuple(first_tensor(context.hidden).shape), tuple(context.output.shape)
    parameter = next(critic.parameters(), None)
    device = parameter.device if parameter is not None else context.output.device
    was_training = [(part, part.training) for part in critic.modules()]
    critic.eval()
    sample = map_payload(lambda tensor: tensor.to(device, copy=True), context.hidden)
    before = map_payload(torch.clone, sample)
    try:
        result = critic(sample)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).split("\n", 1)[0]
        raise UsageError(
            f"{where} fails on a stage output of shape {given}: {reason}; it must return logits of shape {wanted}"
        ) from error
    finally:
        for part, flag in was_training:
            part.training = flag
    _refuse_changed(where, before, sample)
    got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
    if not isinstance(result, Tensor) or tuple(result.shape) != wanted:
        raise UsageError(
            f"{where} turns a stage output of shape {given} into {got}, but the network's output has shape {wanted}; "
            "make the critic return logits of that shape, or choose critic.kind head"
        )
