"""The losses that training knows by name, and finds any other by reference; each says how much a micro-batch counts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, cast

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from decoupled_pp.core.arguments import expect_arguments
from decoupled_pp.core.criterion import Criterion
from decoupled_pp.core.errors import UsageError, shown
from decoupled_pp.core.factory import call_factory, import_factory
from decoupled_pp.core.packets import Loss, Payload
from decoupled_pp.pipeline.torch_losses import NAMES, Classification, Ctc, Elementwise, Torch
from decoupled_pp.settings.load import usage_error
from decoupled_pp.settings.losses import FactoryLoss, LossSection, LossSettings

cross_entropy = Classification(functional.cross_entropy)
"""Mean cross-entropy over the class indices that are not IGNORED, or over probabilities shaped like the logits."""

mse = Elementwise(functional.mse_loss)
"""Mean squared error of the network's output against a target of its shape."""

_KINDS = {functional.cross_entropy: Classification, functional.nll_loss: Classification, functional.ctc_loss: Ctc}
_NAMED = {name: partial(_KINDS.get(function, Elementwise), function) for function, name in NAMES.items()}
"""`loss.kind` -> the loss; its arguments are those of torch's function, and `class_dim`."""

# Torch's own modules and functions have the classes in dimension 1, whatever the output looks like.
_OF_FUNCTION: dict[Any, Callable[..., Torch]] = {
    functional.cross_entropy: partial(Classification, functional.cross_entropy, class_dim=1),
    functional.nll_loss: partial(Classification, functional.nll_loss, class_dim=1),
    functional.ctc_loss: partial(Ctc, functional.ctc_loss, log_probabilities=True),
}
_OF_FUNCTION.update(
    (function, partial(Elementwise, function))
    for function in (
        functional.mse_loss,
        functional.l1_loss,
        functional.smooth_l1_loss,
        functional.huber_loss,
        functional.binary_cross_entropy,
        functional.binary_cross_entropy_with_logits,
        functional.soft_margin_loss,
        functional.poisson_nll_loss,
        functional.kl_div,
    )
)

_OF_MODULE: dict[type[nn.Module], tuple[Any, tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (functional.cross_entropy, ("weight", "ignore_index", "label_smoothing")),
    nn.NLLLoss: (functional.nll_loss, ("weight", "ignore_index")),
    nn.MSELoss: (functional.mse_loss, ()),
    nn.L1Loss: (functional.l1_loss, ()),
    nn.SmoothL1Loss: (functional.smooth_l1_loss, ("beta",)),
    nn.HuberLoss: (functional.huber_loss, ("delta",)),
    nn.BCELoss: (functional.binary_cross_entropy, ("weight",)),
    nn.BCEWithLogitsLoss: (functional.binary_cross_entropy_with_logits, ("weight", "pos_weight")),
    nn.SoftMarginLoss: (functional.soft_margin_loss, ()),
    nn.PoissonNLLLoss: (functional.poisson_nll_loss, ("log_input", "full", "eps")),
    nn.KLDivLoss: (functional.kl_div, ("log_target",)),
    nn.CTCLoss: (functional.ctc_loss, ("blank", "zero_infinity")),
}
"""Loss module of torch -> its function, and the attributes that are arguments of it."""


LossChoice: TypeAlias = "str | dict[str, Any] | LossSection | Loss"
"""A loss by its kind, as a settings section, by `package.module:function`, or as any callable."""


def find_loss(choice: LossChoice, key: str = "loss") -> Criterion:
    """Return the criterion that a choice means; UsageError if it is unknown or no loss. `key` is its setting."""
    if isinstance(choice, Criterion):
        return choice
    if isinstance(choice, str | dict):
        choice = _section(choice, key)
    if isinstance(choice, FactoryLoss):
        return _of_callable(_made(choice, key), key)
    if isinstance(choice, LossSection):
        arguments = choice.model_dump(exclude={"kind"}, exclude_none=True)
        found: Criterion = _NAMED[choice.kind](**arguments)
        return found
    return _of_callable(choice, key)


def _section(choice: str | dict[str, Any], key: str) -> LossSection:
    if isinstance(choice, dict):  # a script may give class weights as a tensor
        choice = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in choice.items()}
    try:
        return cast(LossSection, TypeAdapter(LossSettings).validate_python(choice))
    except ValidationError as error:
        raise usage_error(error, key) from None


def _made(section: FactoryLoss, key: str) -> Any:
    """Return what a factory names, with its arguments: a class is built with them, a function called."""
    named: Any = import_factory(section.factory, key)
    if isinstance(named, type):
        return call_factory(section.factory, key, **section.arguments)
    return partial(named, **section.arguments) if section.arguments else named


def _of_callable(choice: Any, key: str) -> Criterion:
    if isinstance(choice, type) and issubclass(choice, nn.Module):
        choice = _instance(choice, key)
    if not callable(choice):
        raise UsageError(
            f"`{key}` is {shown(choice)}; give a name, a section with a `kind`, or a function of the network's output "
            "and the target",
            code="not-callable",
            key=key,
        )
    given: Any = choice
    arguments: dict[str, Any] = {}
    if isinstance(given, partial) and not given.args:
        arguments = given.keywords
        given = given.func
    if given in _OF_FUNCTION:
        return _OF_FUNCTION[given](**arguments)
    kind = next((kind for kind in _OF_MODULE if isinstance(given, kind)), None)
    if kind is None or type(given).forward is not kind.forward:
        wanted = "a function of these two, such as lambda output, target: loss(output, *target)"
        expect_arguments(f"`{key}` is called with output and target", choice, 2, wanted, key=key)
    if kind is None:
        return Criterion(choice)
    function, names = _OF_MODULE[kind]
    held = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    known: Criterion = _OF_FUNCTION[function](reduction=given.reduction, **held)
    return known if type(given).forward is kind.forward else _Derived(given, known)


class _Derived(Criterion):
    """A module of the user's, derived from one of torch's: it computes, and counts as torch's does unless it says."""

    def __init__(self, function: Any, known: Criterion) -> None:
        super().__init__(function)
        self._known = known
        self.wants = known.wants
        self.ignored = known.ignored

    def count(self, target: Payload) -> float:
        """Return how many targets the mean is over."""
        return super().count(target) if hasattr(self.function, "count") else self._known.count(target)


def _instance(kind: type[nn.Module], key: str) -> nn.Module:
    """Return the loss of a class that was given in place of its instance."""
    try:
        inspect.signature(kind).bind()
    except TypeError:
        raise UsageError(
            f"`{key}` is the class {kind.__name__}; give an instance of it, with its arguments",
            code="unknown-loss",
            key=key,
        ) from None
    return kind()
