"""Finds losses by name or reference, and scores exits by held-out loss and accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.factory import import_factory
from decoupled_pp.core.objective import IGNORED
from decoupled_pp.core.packets import Loss, Payload, as_tuple, is_classification
from decoupled_pp.core.suggestions import did_you_mean


def cross_entropy(logits: Tensor, target: Payload) -> Tensor:
    """Return the mean cross-entropy over the class indices in `target` that are not IGNORED."""
    classes = as_tuple(target)[0]
    # Logits are (..., C), classes last, as language models make them; torch's own form has classes in dimension 1.
    if classes.shape == logits.shape[:-1]:
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), classes.reshape(-1))
    return functional.cross_entropy(logits, classes)


def mse(logits: Tensor, target: Payload) -> Tensor:
    """Return the mean squared error of the network's output against a target of the same shape."""
    wanted = as_tuple(target)[0]
    if wanted.shape != logits.shape:  # torch would broadcast, with a warning
        raise UsageError(
            f"`loss` mse compares the network's output {tuple(logits.shape)} with a target {tuple(wanted.shape)}; give "
            "both one shape, or set `loss` to cross_entropy",
            code="loss-does-not-fit-targets",
            key="loss",
        )
    return functional.mse_loss(logits, wanted)


def per_sample(loss: Loss) -> Callable[[Tensor, Payload], Tensor]:
    """Return a loss in its form per sample, (logits, target) -> (B,); UsageError if it has none."""
    if loss is cross_entropy:
        return _cross_entropies
    if loss is mse:
        return lambda logits, target: (logits - as_tuple(target)[0]).square().flatten(1).mean(dim=1)
    raise UsageError(
        "this `critic_target` needs the loss of every sample: set `loss` to cross_entropy or mse",
        code="loss-without-samples",
        key="loss",
    )


def _cross_entropies(logits: Tensor, target: Payload) -> Tensor:
    """Return the mean over the positions of each sample that count; 0 where none does."""
    classes = as_tuple(target)[0]
    last = classes.shape == logits.shape[:-1]
    each = functional.cross_entropy(logits.movedim(-1, 1) if last else logits, classes, reduction="none")
    counted = (classes != IGNORED).reshape(len(each), -1).sum(dim=1)
    return each.reshape(len(each), -1).sum(dim=1) / counted.clamp(min=1)


_NAMED: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mse}


def find_loss(choice: str | Loss) -> Loss:
    """Return a loss by name, by `package.module:function`, or the user's own callable; UsageError if unknown."""
    if not isinstance(choice, str):
        return choice
    if choice in _NAMED:
        return _NAMED[choice]
    if ":" in choice:
        return cast(Loss, import_factory(choice, "loss"))
    remedy = f"{did_you_mean(choice, _NAMED)}; one of {', '.join(_NAMED)}, or package.module:function"
    raise UsageError(f"`loss`: {choice!r} is not known{remedy}", code="unknown-loss", key="loss")


class ExitScore:
    """Held-out loss and accuracy of one exit, summed on the device and read once at the end."""

    def __init__(self) -> None:
        self._loss: Tensor | float = 0.0
        self._weight: Tensor | float = 0.0
        self._correct: Tensor | float = 0.0
        self._classes = True

    def add(self, loss: Tensor, logits: Tensor, target: Payload) -> None:
        """Add one micro-batch; its weight is its number of targets that count (else of samples)."""
        classes = as_tuple(target)[0]
        # fp64, because fp32 sums of many micro-batches would depend on their number and order in the digits shown.
        if is_classification(logits, target):
            counted = classes != IGNORED
            weight = counted.sum().double()
            self._correct = self._correct + ((logits.argmax(-1) == classes) & counted).sum().double()
        else:
            self._classes = False
            weight = logits.new_full((), float(logits.shape[0]), dtype=torch.float64)
        # A micro-batch without any counted target has loss NaN (0 / 0) and weight 0, and NaN * 0 is NaN.
        self._loss = self._loss + torch.where(weight > 0, loss.double() * weight, 0.0)
        self._weight = self._weight + weight

    def sums(self) -> list[float | None]:
        """Return the sums (loss, weight, correct or None), to be joined with others' by `of_sums`."""
        return [float(self._loss), float(self._weight), float(self._correct) if self._classes else None]

    @staticmethod
    def of_sums(parts: list[list[Any]]) -> tuple[float, float | None]:
        """Return the `result` of several scores, each given by its `sums`."""
        whole = ExitScore()
        whole._loss = sum(part[0] for part in parts)
        whole._weight = sum(part[1] for part in parts)
        whole._classes = all(part[2] is not None for part in parts)
        whole._correct = sum(part[2] or 0.0 for part in parts)
        return whole.result()

    def result(self) -> tuple[float, float | None]:
        """Return the mean loss and, for class targets, the share classified right (None otherwise)."""
        weight = float(self._weight)
        if not weight:
            return float("nan"), None
        accuracy = float(self._correct) / weight if self._classes else None
        return float(self._loss) / weight, accuracy
