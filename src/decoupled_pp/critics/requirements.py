"""Checks what a critic requires of its stage and of the targets, and tells where its stage is in the pipeline."""

from __future__ import annotations

from torch import Tensor

from decoupled_pp.core.criterion import IGNORED, Criterion
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import CriticContext
from decoupled_pp.core.packets import Loss, Payload, as_tuple, first_tensor


def critic_unfit(context: CriticContext, fault: str, *, option: str | None = None) -> UsageError:
    """Return the error for a kind of critic that cannot judge this stage; `option` is the key at fault, if one is."""
    remedy = "choose another `critic.kind`, such as head, or `cut` elsewhere"
    if option is not None:
        remedy = "leave it out"
    return UsageError(f"stage {context.stage}: {fault}; {remedy}", code="critic-unfit", key=option or "critic.kind")


def shapes_of(context: CriticContext) -> str:
    """Return the shapes of stage output and network output, for an error text."""
    hidden = first_tensor(context.hidden)
    return (
        f"a stage output of shape {tuple(hidden.shape)} {hidden.dtype} and network outputs of shape "
        f"{tuple(context.output.shape)}"
    )


def judged_tensor(kind: str, context: CriticContext, dims: tuple[int, ...] = (2, 4)) -> Tensor:
    """Return a sample of the tensor to judge, for critics of networks with one row of logits per sample."""
    hidden = first_tensor(context.hidden)
    if context.output.dim() != 2 or hidden.dim() not in dims or not hidden.is_floating_point():
        forms = "images" if dims == (4,) else "images and vectors"
        raise critic_unfit(context, f"critic {kind} is for {forms} with one label each, not for {shapes_of(context)}")
    return hidden


def class_indices(kind: str, target: Payload, judged: Tensor) -> Tensor:
    """Return the targets as class indices, int64."""
    classes = as_tuple(target)[0]
    if classes.is_floating_point() or classes.shape != judged.shape[:-1]:
        raise UsageError(
            f"critic {kind} needs class indices of shape {tuple(judged.shape[:-1])} as target, not {classes.dtype} of "
            f"shape {tuple(classes.shape)}; choose `critic.kind` head or auglocal",
            code="critic-needs-class-indices",
            key="critic.kind",
        )
    return classes


def refuse_single_value(kind: str, features: Tensor) -> None:
    """Raise UsageError if batch normalisation would have a single value of each channel (B, C, ...) to train on."""
    if features.numel() == features.shape[1]:
        raise UsageError(
            f"critic {kind} normalises over the micro-batch and cannot train on one of a single sample; raise "
            "`data.batch_size` to at least 2, or choose `critic.kind` head",
            code="batch-too-small",
            key="data.batch_size",
        )


def ignored_by(loss: Loss) -> int:
    """Return the class index that counts for nothing in a loss."""
    return loss.ignored if isinstance(loss, Criterion) else IGNORED


def of_drawn_classes(loss: Loss) -> Loss:
    """Return the loss of a critic that draws classes of its own; UsageError if the classes' weights are at odds."""
    return loss.of_drawn_classes() if isinstance(loss, Criterion) else loss


def share(counted: Tensor, like: Tensor) -> Tensor:
    """Return the share of what counts, 0-dim, to divide a mean by in which the rest is 0."""
    return counted.sum().clamp(min=1).to(like.dtype) / counted.numel()


def relative_position(stage: int, stages: int) -> float:
    """Return the position of a critic among the K - 1 critics of K stages: 0 for the first, 1 for the last."""
    return stage / (stages - 2) if stages > 2 else 0.0
