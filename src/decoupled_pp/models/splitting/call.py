"""Says how a model is called on a micro-batch, and which tensor of its result is the network's output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.torch_private import pytree

_OUTPUTS = ("logits", "out", "sample", "prediction", "image_embeds", "text_embeds", "last_hidden_state")
_TARGETS = ("targets", "target", "labels", "label", "y")


@dataclass(frozen=True)
class LikeInput:
    """Stands for a tensor argument of which only the shape matters: that of an input."""

    index: int
    dtype: torch.dtype


@dataclass(frozen=True)
class ForwardCall:
    """Says how a model is called.

    Attributes:
        names: Names of the micro-batch's tensors, as a user reads them.
        dtypes: Their dtypes.
        leaves: Leaves of (args, kwargs); `Tensor` for each of the micro-batch's tensors.
        form: How the leaves make (args, kwargs).
        options: Further keyword arguments.
        output: Picks the network's output from the result.
    """

    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    leaves: tuple[Any, ...]
    form: pytree.TreeSpec
    options: Mapping[str, Any]
    output: Callable[[Any], Tensor]

    def __deepcopy__(self, memo: object) -> ForwardCall:
        """Return itself: nothing in it changes, and copies of layers are made often."""
        return self

    def run(self, model: nn.Module, inputs: Sequence[Tensor]) -> Any:
        """Return the model's result for a micro-batch."""
        if len(inputs) != len(self.names):
            raise UsageError(
                f"the network was split for {', '.join(self.names)} and is given {len(inputs)} tensors; split it "
                "with a sample that has all of them",
                code="split-for-other-inputs",
            )
        given = iter(inputs)
        leaves = [next(given) if leaf is Tensor else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.form)
        options = {name: _made_like(value, inputs) for name, value in self.options.items()}
        return model(*args, **kwargs, **options)

    def picked(self, result: Any) -> Tensor:
        """Return the network's output of a model's result."""
        return picked(self.output, result)


def picked(output: Callable[[Any], Tensor], result: Any) -> Tensor:
    """Return what `output` picks from a model's result: no scalar, which would be the model's own loss."""
    found = output(result)
    if not isinstance(found, Tensor):
        raise UsageError(
            f"output: picks {type(found).__name__} of the model's result, not a tensor; give a function that picks one",
            code="output-not-a-tensor",
        )
    if found.dim() == 0:
        raise UsageError(
            "output: picks a scalar of the model's result, such as its own loss; pick the logits and give the loss to "
            "the trainer: every stage computes its own",
            code="output-not-a-tensor",
        )
    return found


def forward_call(
    model: nn.Module, sample: Any, options: Mapping[str, Any], output: Callable[[Any], Tensor]
) -> tuple[ForwardCall, tuple[Tensor, ...]]:
    """Return how a model is called, and the tensors of the sample.

    Args:
        model: The model.
        sample: A tensor or a tuple, the positional arguments, or a dictionary of keyword arguments; each may be a
            nested tuple, list or dictionary of tensors.
        options: Further keyword arguments.
        output: Picks the network's output from the result.
    """
    args = tuple(sample) if isinstance(sample, tuple | list) else (sample,)
    arguments = ((), dict(sample)) if isinstance(sample, Mapping) else (args, {})
    paths, form = pytree.tree_flatten_with_path(arguments)
    tensors = [(path, leaf) for path, leaf in paths if isinstance(leaf, Tensor)]
    positional = list(inspect.signature(model.forward).parameters)
    call = ForwardCall(
        names=tuple(_name(path, positional) for path, _ in tensors),
        dtypes=tuple(tensor.dtype for _, tensor in tensors),
        leaves=tuple(Tensor if isinstance(leaf, Tensor) else leaf for _, leaf in paths),
        form=form,
        options=dict(options),
        output=output,
    )
    return call, tuple(tensor for _, tensor in tensors)


def network_output(result: Any) -> Tensor:
    """Return the network's output of a model's result: `logits` or its like, or else the first tensor with a shape."""
    if isinstance(result, Tensor):
        return result
    for name in _OUTPUTS:
        found = result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)
        if isinstance(found, Tensor):
            return found
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors:
        raise UsageError(
            f"the model returned {type(result).__name__} with no tensor in it that could be its output; say which with "
            "the argument output",
            code="output-not-a-tensor",
        )
    return tensors[0]


@torch.no_grad()
def of_any_size(call: ForwardCall, model: nn.Module, inputs: Sequence[Tensor]) -> ForwardCall:
    """Return a call that serves micro-batches of other sizes, and gives the logits of all tokens."""
    expected = call.picked(call.run(model, inputs))
    return _with_targets(_with_sized_options(call, model, inputs, expected), model, inputs, expected)


def _with_sized_options(call: ForwardCall, model: nn.Module, inputs: Sequence[Tensor], expected: Tensor) -> ForwardCall:
    """Make tensor options follow the size of the micro-batch, if their values do not matter."""
    options = dict(call.options)
    for name, value in call.options.items():
        alike = [index for index, one in enumerate(inputs) if isinstance(value, Tensor) and value.shape == one.shape]
        if alike:
            options[name] = LikeInput(alike[0], value.dtype)
    if all(options[name] is value for name, value in call.options.items()):
        return call
    changed = replace(call, options=options)
    return changed if torch.equal(changed.picked(changed.run(model, inputs)), expected) else call


def _with_targets(call: ForwardCall, model: nn.Module, inputs: Sequence[Tensor], expected: Tensor) -> ForwardCall:
    """Give targets to a model that without them computes the logits of the last token only (nanoGPT).

    Their values do not matter: its own loss is not used.
    """
    tokens = inputs[0]
    is_last_only = expected.dim() == 3 and expected.shape[1] == 1 and tokens.dim() == 2 and tokens.shape[1] > 1
    if not is_last_only or tokens.is_floating_point():
        return call
    parameters = inspect.signature(model.forward).parameters
    for name in _TARGETS:
        if name in call.options or name in call.names or name not in parameters:
            continue
        changed = replace(call, options={**call.options, name: LikeInput(0, torch.int64)})
        found = changed.picked(changed.run(model, inputs))
        if found.shape == (*tokens.shape, expected.shape[2]) and torch.allclose(found[:, -1:], expected, atol=1e-4):
            return changed
    return call


def _made_like(value: Any, inputs: Sequence[Tensor]) -> Any:
    if isinstance(value, LikeInput):
        return torch.zeros_like(inputs[value.index], dtype=value.dtype)
    return value


def _name(path: Sequence[Any], positional: Sequence[str]) -> str:
    """Return an input's name: that of its argument, and its place inside it."""
    place = path[1]
    if hasattr(place, "key"):
        name = str(place.key)
    else:
        name = positional[place.idx] if place.idx < len(positional) else f"input {place.idx}"
    return name + str(pytree.keystr(tuple(path[2:])))
