"""Declares the `loss` section of the settings: one class for every kind, with the arguments of torch's function."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from decoupled_pp.core.errors import shown
from decoupled_pp.settings.sections import Factory, Scale, Section, Weight


class LossSection(Section):
    """Base of the sections that choose a loss."""

    kind: str


class ClassLoss(LossSection):
    """Base of the losses between logits and classes."""

    weight: list[Weight] | None = Field(None, min_length=1)
    """Weight of every class; the mean is weighted, over however many micro-batches. Default: all alike."""
    ignore_index: int = -100
    """Class index that counts for nothing."""
    class_dim: int | None = Field(None, ge=-8, le=7)
    """Dimension of the classes in the network's output; default: the last of up to 3, the second (1) of 4 or more."""


class CrossEntropyLoss(ClassLoss):
    """Cross-entropy of class indices, or of class probabilities (soft, one-hot) shaped like the output."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(0.0, ge=0, le=1)
    """Share of the target that is spread evenly over the classes."""


class NllLoss(ClassLoss):
    """Negative log-likelihood of class indices, for a network whose output is log-probabilities (`log_softmax`)."""

    kind: Literal["nll"]


class BceWithLogitsLoss(LossSection):
    """Binary cross-entropy of logits: several labels at once, each a target between 0 and 1."""

    kind: Literal["bce_with_logits"]
    pos_weight: list[Weight] | None = Field(None, min_length=1)
    """Weight of the positive targets of every label."""


class MseLoss(LossSection):
    """Mean squared error against a target shaped like the output."""

    kind: Literal["mse"]


class L1Loss(LossSection):
    """Mean absolute error against a target shaped like the output."""

    kind: Literal["l1"]


class SmoothL1Loss(LossSection):
    """Squared error below `beta`, absolute error above it."""

    kind: Literal["smooth_l1"]
    beta: Weight = 1.0
    """Error at which the square ends."""


class HuberLoss(LossSection):
    """Squared error below `delta`, `delta` times the absolute error above it."""

    kind: Literal["huber"]
    delta: Scale = 1.0
    """Error at which the square ends."""


class CtcLoss(LossSection):
    """Connectionist temporal classification: output (B, T, C), target (labels, frames (B,), lengths (B,))."""

    kind: Literal["ctc"]
    blank: int = Field(0, ge=0)
    """Index of the blank class."""
    zero_infinity: bool = False
    """Count a sample whose labels do not fit its frames as 0."""


class FactoryLoss(Factory, LossSection):
    """A loss of your own: a function called as `function(output, target, **arguments)`, or a class of losses."""

    kind: Literal["factory"]


def _by_name(value: Any) -> Any:
    """Let a name alone stand for its section, and `package.module:function` for a factory."""
    if isinstance(value, dict | LossSection):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is no loss; give a name, a section with a `kind`, or package.module:function")
    return {"kind": "factory", "factory": value} if ":" in value else {"kind": value}


LossSettings = Annotated[
    CrossEntropyLoss
    | NllLoss
    | BceWithLogitsLoss
    | MseLoss
    | L1Loss
    | SmoothL1Loss
    | HuberLoss
    | CtcLoss
    | FactoryLoss,
    Field(discriminator="kind"),
    BeforeValidator(_by_name),
]
