"""Losses of torch as criteria: each says how much a micro-batch counts, and what it is of every sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from decoupled_pp.core.criterion import IGNORED, Criterion, Hits, class_hits, classes_in
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Payload, as_tuple

NAMES: dict[Callable[..., Tensor], str] = {
    functional.cross_entropy: "cross_entropy",
    functional.nll_loss: "nll",
    functional.binary_cross_entropy_with_logits: "bce_with_logits",
    functional.mse_loss: "mse",
    functional.l1_loss: "l1",
    functional.smooth_l1_loss: "smooth_l1",
    functional.huber_loss: "huber",
    functional.ctc_loss: "ctc",
}
"""Functions of torch, and what they are called in the settings (`loss.kind`)."""

_OF_ANY_OUTPUT = {
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
    functional.binary_cross_entropy_with_logits,
}
"""Losses between shapes that are right for any real output."""


class Torch(Criterion):
    """A loss of torch: a function, its arguments, and those of them that are tensors, such as class weights."""

    by_sample = True

    def __init__(self, function: Callable[..., Tensor], *, reduction: str = "mean", **arguments: Any) -> None:
        super().__init__(function, reduction=reduction)
        self.arguments = {key: _as_given(value) for key, value in arguments.items()}
        self.moved = self.arguments

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move class weights and the like; `arguments` keeps them on the CPU, where micro-batches are counted."""
        # fp64 for a network in fp64; never down to bf16.
        self.moved = {
            key: value.to(device, torch.promote_types(value.dtype, dtype)) if isinstance(value, Tensor) else value
            for key, value in self.arguments.items()
        }

    def __repr__(self) -> str:
        """Return a text that is equal on all ranks for equal losses."""
        given = f"{self.arguments}, reduction={self.reduction}, class_dim={self.class_dim}"
        return f"{type(self).__name__}({self.function.__name__}, {given})"

    @property
    def name(self) -> str:
        """Name of the loss in the settings, or else torch's."""
        return NAMES.get(self.function, str(self.function.__name__))


class Classification(Torch):
    """Cross-entropy, or negative log-likelihood, of class indices or of class probabilities shaped like the logits."""

    def __init__(self, function: Callable[..., Tensor], *, class_dim: int | None = None, **arguments: Any) -> None:
        super().__init__(function, **arguments)
        self.class_dim = class_dim
        self.wants = "logits" if function is functional.cross_entropy else "log-probabilities"
        self.ignored = int(self.arguments.get("ignore_index", IGNORED))

    def compute(self, logits: Tensor, target: Payload) -> Tensor:
        """Return the loss; the classes are where `classes_in` says."""
        classes = self._classes(logits, target)
        dim = classes_in(logits, self.class_dim)
        if dim == logits.dim() - 1:  # one row for every target, as language models make them
            width = logits.shape[-1]
            rows = classes.reshape(-1, width) if classes.dim() == logits.dim() else classes.reshape(-1)
            return self._torch(logits.reshape(-1, width), rows, self.reduction)
        return self._torch(*self._classes_second(logits, classes), self.reduction)

    def count(self, target: Payload) -> float:
        """Return the number of targets that count, each by the weight of its class."""
        classes = as_tuple(target)[0]
        if classes.is_floating_point():  # torch's mean over probabilities is over all positions, whatever they weigh
            return classes.numel() / max(classes.shape[classes_in(classes, self.class_dim)], 1)
        return float(self._weights(classes).sum())

    def per_sample(self, logits: Tensor, target: Payload) -> Tensor:
        """Return the mean (or sum) over the targets of each sample that count."""
        classes = self._classes(logits, target)
        each = self._torch(*self._classes_second(logits, classes), "none")
        summed = each.reshape(len(each), -1).sum(dim=1)
        weights = torch.ones_like(each) if classes.dim() == logits.dim() else self._weights(classes)
        weight = weights.reshape(len(each), -1).sum(dim=1)
        counted = weight > 0
        losses = summed if self.sums else summed / torch.where(counted, weight, 1)
        return losses.masked_fill(~counted, torch.nan)

    def of_drawn_classes(self) -> Criterion:
        """Return the same loss of other classes, which have no weights."""
        if "weight" in self.arguments:
            raise UsageError(
                f"`loss` {self.name} has a weight for every class, and this critic learns from other classes that it "
                "draws; leave the weights out, or `critic.classes` and `critic.buckets`",
                code="critic-needs-unweighted-classes",
                key="loss.weight",
            )
        arguments = {key: value for key, value in self.arguments.items() if key != "ignore_index"}
        return Classification(cast(Any, self.function), reduction=self.reduction, **arguments)

    def hits(self, logits: Tensor, target: Payload) -> Hits | None:
        """Return how many targets are classified right; of soft targets, the likeliest class."""
        return class_hits(logits, as_tuple(target)[0], classes_in(logits, self.class_dim), self.ignored)

    def _torch(self, logits: Tensor, classes: Tensor, reduction: str) -> Tensor:
        arguments = self.moved
        if classes.dim() == logits.dim():  # torch refuses an index to ignore beside probabilities
            arguments = {key: value for key, value in arguments.items() if key != "ignore_index"}
        if "weight" in arguments:
            _refuse_other_number(arguments["weight"], "weight", logits.shape[1:2], logits)
            if classes.dim() < logits.dim():  # torch wants both of one type: weights in fp32 beside an output in bf16
                logits = logits.to(arguments["weight"].dtype)
        try:
            return cast(Tensor, cast(Any, self.function)(logits, classes, reduction=reduction, **arguments))
        except IndexError as error:
            raise UsageError(
                f"`loss` {self.name}: {error} The network's output has {logits.shape[1]} classes, 0 to "
                f"{logits.shape[1] - 1}, and {self.ignored} counts for nothing (`loss` {{ignore_index: ...}}); correct "
                "the targets, or give the network more outputs",
                code="target-out-of-range",
                key="loss",
            ) from error

    def _classes(self, logits: Tensor, target: Payload) -> Tensor:
        """Return the targets as int64 class indices, or as probabilities in a floating type; refuse all others."""
        classes = as_tuple(target)[0]
        dim = classes_in(logits, self.class_dim)
        if classes.shape == logits.shape and self.function is functional.cross_entropy:
            return classes if classes.is_floating_point() else classes.to(logits.dtype)  # one-hot
        if not classes.is_floating_point() and classes.shape == logits.shape[:dim] + logits.shape[dim + 1 :]:
            return classes if classes.dtype == torch.int64 else classes.long()
        raise UsageError(
            f"`loss` {self.name} finds the {logits.shape[dim] if logits.dim() else 0} classes of the "
            f"network's output {tuple(logits.shape)} in dimension {dim}, and got a target {tuple(classes.shape)} of "
            f"{classes.dtype}; give class indices of shape {tuple(logits.shape[:dim] + logits.shape[dim + 1 :])}"
            f"{' or probabilities shaped like the output' if self.function is functional.cross_entropy else ''}, or "
            "say where the classes are by `loss` {kind: " + self.name + ", class_dim: ...}",
            code="loss-does-not-fit-targets",
            key="loss",
        )

    def _classes_second(self, logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and targets as torch takes them, with the classes in dimension 1."""
        dim = classes_in(logits, self.class_dim)
        soft = classes.dim() == logits.dim()
        return logits.movedim(dim, 1), classes.movedim(dim, 1) if soft else classes

    def _weights(self, classes: Tensor) -> Tensor:
        """Return how much each class index counts."""
        counted = classes != self.ignored
        if "weight" not in self.arguments:
            return counted
        weight: Tensor = self.arguments["weight"].to(classes.device)
        return weight[classes.long().clamp(0, len(weight) - 1)] * counted  # an index that is no class: torch refuses it


class Elementwise(Torch):
    """A loss between output and target of one shape, such as the squared error: its mean is over all elements."""

    def __init__(self, function: Callable[..., Tensor], **arguments: Any) -> None:
        super().__init__(function, **arguments)
        if function in _OF_ANY_OUTPUT:
            self.wants = "logits"
        elif function is functional.binary_cross_entropy:
            self.wants = "probabilities"
        elif function is functional.kl_div:
            self.wants = "log-probabilities"

    def compute(self, logits: Tensor, target: Payload) -> Tensor:
        """Return the loss."""
        return self._torch(logits, target, self.reduction)

    def count(self, target: Payload) -> float:
        """Return the number of elements; of the samples where torch's mean is over these."""
        wanted = as_tuple(target)[0]
        return float(len(wanted) if self.reduction == "batchmean" else wanted.numel())

    def per_sample(self, logits: Tensor, target: Payload) -> Tensor:
        """Return the mean (or sum) over the elements of each sample."""
        each = self._torch(logits, target, "none")
        each = each.reshape(len(each), -1)
        return each.sum(dim=1) if self.sums else each.mean(dim=1)

    def hits(self, logits: Tensor, target: Payload) -> Hits | None:
        """Return None: there are no classes."""
        return None

    def _torch(self, logits: Tensor, target: Payload, reduction: str) -> Tensor:
        wanted = as_tuple(target)[0]
        if wanted.shape != logits.shape:  # torch would broadcast, with a warning
            raise UsageError(
                f"`loss` {self.name} compares the network's output {tuple(logits.shape)} with a target "
                f"{tuple(wanted.shape)}; give both one shape, or set `loss` to cross_entropy",
                code="loss-does-not-fit-targets",
                key="loss",
            )
        if not wanted.is_floating_point() and not wanted.is_complex():
            wanted = wanted.to(logits.dtype)
        for name, value in self.moved.items():
            if isinstance(value, Tensor):
                _refuse_other_number(value, name, logits.shape, logits)
        if self.function is functional.huber_loss:  # its backward takes both of one type, unlike that of the others
            kind = torch.promote_types(logits.dtype, wanted.dtype)
            logits, wanted = logits.to(kind), wanted.to(kind)
        return cast(Tensor, cast(Any, self.function)(logits, wanted, reduction=reduction, **self.moved))


class Ctc(Torch):
    """Connectionist temporal classification: logits (B, T, C), target (labels, frames (B,), lengths (B,)).

    `nn.CTCLoss` itself takes log-probabilities (T, B, C).
    """

    def __init__(self, function: Callable[..., Tensor], *, log_probabilities: bool = False, **arguments: Any) -> None:
        super().__init__(function, **arguments)
        self.wants = "log-probabilities" if log_probabilities else "logits"

    def compute(self, logits: Tensor, target: Payload) -> Tensor:
        """Return the loss, as `functional.ctc_loss` reduces it."""
        return self._torch(logits, target, self.reduction)

    def count(self, target: Payload) -> float:
        """Return the number of samples."""
        return float(as_tuple(target)[-1].numel())

    def per_sample(self, logits: Tensor, target: Payload) -> Tensor:
        """Return the loss of every sample by its number of labels, or its sum."""
        each = self._torch(logits, target, "none")
        lengths = as_tuple(target)[-1].to(each.device).clamp(min=1)
        return each if self.sums else each / lengths

    def hits(self, logits: Tensor, target: Payload) -> Hits | None:
        """Return None: a label belongs to no frame."""
        return None

    def _torch(self, logits: Tensor, target: Payload, reduction: str) -> Tensor:
        if logits.dim() != 3 or len(as_tuple(target)) != 3:
            raise UsageError(
                f"`loss` ctc takes an output (B, T, C) and a target (labels, frames, lengths), not "
                f"{tuple(logits.shape)} and {len(as_tuple(target))} target tensors; give these",
                code="loss-does-not-fit-targets",
                key="loss",
            )
        log_probabilities = logits.log_softmax(-1).transpose(0, 1) if self.wants == "logits" else logits
        return cast(Tensor, cast(Any, self.function)(log_probabilities, *target, reduction=reduction, **self.moved))


def _refuse_other_number(weights: Tensor, name: str, shape: torch.Size, output: Tensor) -> None:
    """Raise UsageError unless weights fit a shape as torch broadcasts them."""
    extents = zip(reversed(weights.shape), reversed(shape), strict=False)
    if weights.dim() <= len(shape) and all(own in (1, wanted) for own, wanted in extents):
        return
    raise UsageError(
        f"`loss.{name}` has {tuple(weights.shape)} weights, which do not fit the network's output "
        f"{tuple(output.shape)}; give one for each class, in their order",
        code="weights-do-not-fit-classes",
        key=f"loss.{name}",
    )


def _as_given(value: Any) -> Any:
    """Return a list of class weights as a tensor, and tensors on the CPU without a graph."""
    if isinstance(value, list | tuple):
        value = torch.tensor(value)
    return value.detach().cpu() if isinstance(value, Tensor) else value
