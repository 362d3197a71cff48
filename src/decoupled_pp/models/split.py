"""Splits any model into layers: tries the ways in order."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.torch_private import child_modules
from decoupled_pp.models.cutting.layers import is_plain_sequential
from decoupled_pp.models.huggingface import split_transformers
from decoupled_pp.models.splitting import Split, cut_after, flatten, split_blocks, untie
from decoupled_pp.models.splitting.arguments import check_calls, check_model_or_list, check_sample, checked_stages
from decoupled_pp.models.splitting.call import network_output
from decoupled_pp.models.splitting.places import proposals
from decoupled_pp.models.splitting.traced import split_traced


def split(
    model: nn.Module | Sequence[nn.Module],
    sample: Any,
    stages: int | Sequence[str] = 2,
    *,
    output: Callable[[Any], Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Split:
    """Split a model into layers in the first way that gives its own output, bit for bit.

    The ways: its own layers, if it is a list or an `nn.Sequential`; at its blocks, if it is one of `transformers`
    (`split_transformers`) or of anybody else (`split_blocks`); by tracing (`split_traced`), after modules that part its
    work evenly.

    Args:
        model: It becomes part of the layers.
        sample: An input micro-batch: a tensor or tuple (positional arguments), or a dictionary by argument name; one
            that shows all that may occur (padding, too).
        stages: How many there will be, at least; or names of modules to cut after, in order.
        output: Picks the network's output from its result; by default `logits` or its like, or the first tensor.
        options: Further arguments of its `forward`.

    Returns:
        The layers; `way` says how it was split, `failed` why the ways before it fail, and `str()` both in one line.

    Raises:
        UsageError: An argument is of another kind, or no way works; the text has the reason of each.
    """
    check_model_or_list(model)
    check_sample(model, sample)
    check_calls(output, options)
    wanted = _Wanted(model, sample, checked_stages(stages), output, dict(options or {}))
    failed: dict[str, str] = {}
    for way, attempt in _WAYS.items():
        try:
            found = attempt(wanted)
            wanted.check(found)
            return replace(found, way=way, failed=failed)
        except UsageError as error:
            failed[way] = str(error)
    reasons = "; ".join(f"{way}: {reason}" for way, reason in failed.items())
    raise UsageError(
        f"{type(model).__name__} is split in none of the ways ({reasons}); mend what one of them names, or write the "
        "model as a list of layers",
        code="cannot-be-split",
    )


@dataclass(frozen=True)
class _Wanted:
    """Holds what a call of `split` asks for."""

    model: nn.Module | Sequence[nn.Module]
    sample: Any
    stages: int | Sequence[str]
    output: Callable[[Any], Tensor] | None
    options: dict[str, Any]

    @property
    def whole(self) -> nn.Module:
        """The model, which must be a module and no list."""
        if not isinstance(self.model, nn.Module):
            raise _not_this_way("it is a list")
        return self.model

    def check(self, found: Split) -> None:
        """Mark the places that were asked for; raise UsageError if the layers cannot be cut there, or are too few."""
        if isinstance(self.stages, int):
            if len(found.layers) < self.stages:
                raise _not_this_way(f"it has {len(found.layers)} layers, too few for {self.stages} stages")
        elif found.way != "traced" and found.layers.places is None:
            found.layers.places = tuple(_place(found, name) for name in self.stages)


def _as_list(wanted: _Wanted) -> Split:
    """Take the layers of an `nn.Sequential` or a list."""
    model = nn.Sequential(*wanted.model) if isinstance(wanted.model, list | tuple) else wanted.model
    if not isinstance(model, nn.Sequential) or not is_plain_sequential(model):
        raise _not_this_way("it is no list and no nn.Sequential")
    if wanted.options or wanted.output:
        raise _not_this_way("layers take no options and have one output")
    layers = untie(flatten(model))
    if not isinstance(wanted.stages, int):
        layers = cut_after(layers, wanted.stages)
    names = {key: key for key in layers.state_dict()}
    return Split(layers, names, dict(layers.tied), way="list")


def _as_transformers(wanted: _Wanted) -> Split:
    """Split a model of transformers at its blocks."""
    library = sys.modules.get("transformers.modeling_utils")  # a model of it has imported it
    kind = None if library is None else library.PreTrainedModel
    base = next((part for part in wanted.whole.modules() if kind and isinstance(part, kind)), None)
    if base is None or wanted.options or wanted.output:
        raise _not_this_way("it is no model of transformers" if base is None else "options and output are given")
    sample = wanted.sample
    if isinstance(sample, Tensor):
        sample = {base.main_input_name: sample}
    elif not isinstance(sample, Mapping):
        names = list(inspect.signature(wanted.whole.forward).parameters)
        sample = dict(zip(names, sample, strict=False))
    return split_transformers(wanted.whole, sample)


def _at_blocks(wanted: _Wanted) -> Split:
    """Split at the repeated blocks."""
    output = wanted.output or network_output
    return split_blocks(wanted.whole, wanted.sample, options=wanted.options, output=output)


def _by_tracing(wanted: _Wanted) -> Split:
    """Trace, and cut after the modules that are named, or that part the work evenly."""
    output = wanted.output or network_output
    if wanted.options:
        raise _not_this_way("options are not traced; put them into the sample")
    if not isinstance(wanted.stages, int):
        return split_traced(wanted.whole, wanted.sample, wanted.stages, output=output)
    faults: list[UsageError] = []
    one_part: list[list[str]] = [[]]
    for names in proposals(wanted.whole, wanted.sample, wanted.stages) if wanted.stages > 1 else one_part:
        try:
            return split_traced(wanted.whole, wanted.sample, names, output=output)
        except UsageError as error:
            faults.append(error)
    raise faults[0] if faults else _not_this_way(f"it has no {wanted.stages} parts that run one after another")


_WAYS: dict[str, Callable[[_Wanted], Split]] = {
    "list": _as_list,
    "transformers": _as_transformers,
    "blocks": _at_blocks,
    "traced": _by_tracing,
}


def _place(found: Split, name: str) -> int:
    """Return the boundary behind the module with this name in the model."""
    for index, layer in enumerate(child_modules(found.layers)):
        own = {found.names[key] for key in found.names if key.startswith(f"{layer}.")}
        if layer.startswith("block") and own and all(key.startswith(f"{name}.") for key in own):
            return index + 1
    raise _not_this_way(f"{name!r} is none of its blocks")


def _not_this_way(reason: str) -> UsageError:
    return UsageError(reason, code="not-this-way")
