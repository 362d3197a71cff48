"""What critics with rules of their own ask of their stage and of the targets: one class index for every sample."""

from __future__ import annotations

from torch import Tensor

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import CriticContext
from decoupled_pp.core.packets import Payload, as_tuple, first_tensor


def judged_tensor(kind: str, context: CriticContext, dims: tuple[int, ...] = (2, 4)) -> Tensor:
    """A sample of the tensor that is judged, of a stage before a network that gives one row of logits per sample.

    Args:
        kind: `critic.kind`, for the error.
        context: Of the stage.
        dims: How many dimensions the tensor may have: 2 is a vector per sample, 4 an image.

    Raises:
        UsageError: The stage's output or the network's has another form.
    """
    hidden, output = first_tensor(context.hidden), context.output
    if output.dim() != 2 or hidden.dim() not in dims or not hidden.is_floating_point():
        what = "images" if dims == (4,) else "images and vectors"
        raise UsageError(
            f"stage {context.stage}: critic {kind} is for {what} with one label each, not for a stage output of shape "
            f"{tuple(hidden.shape)} {hidden.dtype} and network outputs of shape {tuple(output.shape)}; choose "
            "critic.kind head or auglocal"
        )
    return hidden


def class_indices(kind: str, target: Payload, logits: Tensor) -> Tensor:
    """The class index of every sample, (B,) int64.

    Raises:
        UsageError: The targets are something else.
    """
    classes = as_tuple(target)[0]
    if classes.is_floating_point() or classes.shape != logits.shape[:-1]:
        raise UsageError(
            f"critic {kind} needs one class index per sample as target, not {tuple(classes.shape)} {classes.dtype}; "
            "choose critic.kind head or auglocal"
        )
    return classes
