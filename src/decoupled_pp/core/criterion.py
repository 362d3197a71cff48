"""Defines what training knows of a loss: how much a micro-batch counts in it, and where its classes are."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Batch, Loss, Payload, as_tuple

IGNORED = -100
"""Class index that counts for nothing, as in `torch.nn.functional.cross_entropy`."""


class Hits(NamedTuple):
    """The targets of a micro-batch that are classified right."""

    correct: Tensor  # 0-dim
    counted: Tensor  # 0-dim


class Criterion:
    """A loss, with what training has to know of it. This class takes any function of the user's.

    A function is taken for a mean over samples (dimension 0 of the target), unless attributes of it say otherwise:
    `reduction` "sum", `count(target)` (how much a micro-batch counts in the mean), `class_dim` (where the classes are).

    Attributes:
        class_dim: Dimension of the classes in the logits; None: see `classes_in`.
        wants: Form of the network's output that it is made for; None: that is not known. Losses of logits are right for
            any real output.
        ignored: Class index that counts for nothing.
        by_sample: True if the loss of every sample is known (`per_sample`).
    """

    wants: Literal["logits", "log-probabilities", "probabilities"] | None = None
    by_sample = False
    ignored = IGNORED

    def __init__(self, function: Loss, *, reduction: str | None = None, class_dim: int | None = None) -> None:
        _refuse_parameters(function)
        self.function = function
        self.reduction = str(getattr(function, "reduction", "mean") if reduction is None else reduction)
        if self.reduction == "none":
            raise UsageError(
                f"`loss` {_name(function)} has the reduction none, and training needs one number; give reduction mean "
                "or sum",
                code="loss-is-no-scalar",
                key="loss",
            )
        self.class_dim = getattr(function, "class_dim", None) if class_dim is None else class_dim
        self._given: tuple[torch.device, torch.dtype] | None = None  # what the last output was like

    @property
    def name(self) -> str:
        """Name of the loss in error texts."""
        return _name(self.function)

    @property
    def sums(self) -> bool:
        """True if the losses of micro-batches add up; False if they are means, weighted by `weight`."""
        return self.reduction == "sum"

    def __call__(self, logits: Tensor, target: Payload) -> Tensor:
        """Return the loss of a micro-batch: one scalar, its mean or its sum."""
        given = logits.device, logits.dtype
        if self._given != given:  # its weights follow the output: a cut is measured elsewhere
            self.move(*given)
            self._given = given
        try:
            loss = self.compute(logits, target)
        except RuntimeError as error:
            if "numpy() on Tensor that requires grad" not in str(error):  # torch's advice would lose the gradient
                raise
            raise self._without_gradient() from error
        self._refuse_unusable(loss, logits)
        return loss

    def compute(self, logits: Tensor, target: Payload) -> Tensor:
        """Call the function."""
        return self.function(logits, target)

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move tensors that the loss holds to where the output is."""
        if isinstance(self.function, nn.Module):
            self.function.to(device)

    def weight(self, batch: Batch) -> float:
        """Return how much a micro-batch counts among others; 0 if it has no sample, or no target that counts."""
        inputs, target = batch
        rows = as_tuple(inputs)[0]
        if rows.dim() and not len(rows):
            return 0.0
        counted = float(self.count(target)) if as_tuple(target) else 1.0 * len(rows)
        if not math.isfinite(counted) or counted < 0:
            raise UsageError(
                f"`loss` {self.name}: its count of a micro-batch is {counted}; return how many targets "
                "count, at least 0",
                code="loss-count-unusable",
                key="loss",
            )
        return counted

    def count(self, target: Payload) -> float:
        """Return how many targets the mean is over."""
        own = getattr(self.function, "count", None)
        if callable(own):
            return float(own(target))
        first = as_tuple(target)[0]
        return float(len(first)) if first.dim() else 1.0

    def per_sample(self, logits: Tensor, target: Payload) -> Tensor:
        """Return the loss of every sample, (B,); NaN for one in which nothing counts."""
        raise AssertionError(f"{self!r} gives the loss of a micro-batch only")

    def hits(self, logits: Tensor, target: Payload) -> Hits | None:
        """Return how many targets are classified right; None where that means nothing.

        Of a function it is known for one class index per sample, and along its `class_dim` if it has one.
        """
        first, *others = as_tuple(target)
        if self.class_dim is None and (logits.dim() != 2 or first.dim() != 1 or others):
            return None
        return class_hits(logits, first, classes_in(logits, self.class_dim), IGNORED)

    def of_drawn_classes(self) -> Criterion:
        """Return the loss of a critic that draws classes of its own, whose index IGNORED counts for nothing."""
        return self

    def hint(self) -> str:
        """Return what else may be the cause of a loss that is NaN, to be added to an error's remedies."""
        if self.by_sample or callable(getattr(self.function, "count", None)):
            return ""
        return (
            "; or, if no target of the micro-batch counts, set `count` of your loss to a function of the target that "
            "returns how many do"
        )

    def __repr__(self) -> str:
        """Return a text that is equal on all ranks for equal losses."""
        return f"{type(self).__name__}({self.function!r}, reduction={self.reduction}, class_dim={self.class_dim})"

    def _refuse_unusable(self, loss: Any, logits: Tensor) -> None:
        if not isinstance(loss, Tensor) or loss.dim():
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UsageError(
                f"`loss` {self.name} returned {got}; it must return one scalar tensor",
                code="loss-is-no-scalar",
                key="loss",
            )
        if torch.is_grad_enabled() and logits.requires_grad and not loss.requires_grad:
            raise self._without_gradient()

    def _without_gradient(self) -> UsageError:
        return UsageError(
            f"`loss` {self.name} has no gradient, so nothing would be trained; compute it by torch's operations on the "
            "network's output, without detach, item, argmax, no_grad or numpy",
            code="loss-without-gradient",
            key="loss",
        )


class Closed(Criterion):
    """A criterion behind an operation on the output, such as the log-softmax of a network whose critics give logits."""

    def __init__(self, inner: Criterion, closing: nn.Module) -> None:
        super().__init__(inner.function, reduction=inner.reduction, class_dim=inner.class_dim)
        self._inner = inner
        self._closing = closing
        self.by_sample = inner.by_sample
        self.ignored = inner.ignored

    def __call__(self, logits: Tensor, target: Payload) -> Tensor:
        """Return the loss of a micro-batch."""
        return self._inner(self._closing(logits), target)

    def of_drawn_classes(self) -> Criterion:
        """Return the loss of a critic that draws classes of its own."""
        return Closed(self._inner.of_drawn_classes(), self._closing)

    def count(self, target: Payload) -> float:
        """Return how many targets the mean is over."""
        return self._inner.count(target)

    def per_sample(self, logits: Tensor, target: Payload) -> Tensor:
        """Return the loss of every sample."""
        return self._inner.per_sample(self._closing(logits), target)

    def hits(self, logits: Tensor, target: Payload) -> Hits | None:
        """Return how many targets are classified right."""
        return self._inner.hits(self._closing(logits), target)


def classes_in(logits: Tensor, class_dim: int | None) -> int:
    """Return the dimension of the classes, from 0: as said, else the last of up to 3 dimensions, else 1 (images)."""
    if class_dim is None:
        class_dim = -1 if logits.dim() < 4 else 1
    elif logits.dim() > 1 and not -logits.dim() <= class_dim < logits.dim():  # one sample's scores have one dimension
        raise UsageError(
            f"`loss`: `class_dim` {class_dim} is no dimension of the network's output {tuple(logits.shape)}; give "
            f"one of {-logits.dim()} to {logits.dim() - 1}",
            code="no-such-dimension",
            key="loss",
        )
    return class_dim % max(logits.dim(), 1)


def class_hits(logits: Tensor, classes: Tensor, dim: int, ignored: int) -> Hits | None:
    """Return the hits of class indices, or of one-hot or soft targets shaped like the logits (the likeliest class)."""
    if classes.shape == logits.shape:
        correct = logits.argmax(dim) == classes.argmax(dim)
        return Hits(correct.sum(), torch.tensor(correct.numel()))
    if classes.is_floating_point() or classes.shape != logits.shape[:dim] + logits.shape[dim + 1 :]:
        return None
    counted = classes != ignored
    return Hits(((logits.argmax(dim) == classes) & counted).sum(), counted.sum())


def _refuse_parameters(function: Loss) -> None:
    if not isinstance(function, nn.Module):
        return
    trainable = [name for name, parameter in function.named_parameters() if parameter.requires_grad]
    if trainable:
        raise UsageError(
            f"`loss` {_name(function)} has the parameter {trainable[0]}, which no optimizer trains; put it into the "
            "network's last layer, or make it a buffer",
            code="loss-has-parameters",
            key="loss",
        )


def _name(function: object) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
