"""Compares traced layers with the model they come from, and finds out which sizes of inputs they take."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

import numpy
import torch
from torch import Tensor, nn

from decoupled_pp.core.device import untouched
from decoupled_pp.core.errors import UsageError, first_line
from decoupled_pp.core.torch_private import is_same_size, slow_attention
from decoupled_pp.models.splitting.trace import Trace, Whole, mode_name
from decoupled_pp.models.splitting.traced_layer import InputSizes

_Place = tuple[int, int]  # (input, dimension)


def checked_sizes(layers: nn.Module, whole: Whole, traces: Mapping[bool, Trace]) -> list[InputSizes]:
    """Compare the layers with the model, bit for bit, in both modes and with micro-batches of several sizes.

    Returns:
        The sizes of inputs for which the layers give the model's output.

    Raises:
        UsageError: They do not, or they fix the size of the batch although the model does not.
    """
    inputs = whole.inputs
    for training in (False, True):
        fault = _difference(layers, whole, inputs, training=training)
        if fault:
            raise UsageError(
                f"split into layers, {type(whole.model).__name__} {fault} in {mode_name(training)}; "
                "pass its layers as a list",
                code="split-changes-output",
            )
    ranges = [_meet(*both) for both in zip(traces[True].ranges, traces[False].ranges, strict=True)]
    for group in _groups(traces[False].shapes):
        if _follows(layers, whole, group) is False:
            for index, place in group:
                ranges[index][place] = (inputs[index].shape[place],) * 2
    least, most = ranges[0][0] if ranges[0] else (0, 0)
    rows = [(index, 0) for index, tensor in enumerate(inputs) if tensor.dim() and tensor.shape[0] == inputs[0].shape[0]]
    if least == most and rows and _follows(layers, whole, rows) is False:
        raise UsageError(
            f"the code of {type(whole.model).__name__} around the cuts takes {least:g} samples only, as it was traced: "
            "write the size of the batch as tensor.shape[0] or -1 in it, not as len(tensor), int() or a number that "
            "is computed from it",
            code="batch-size-fixed-by-trace",
        )
    return [InputSizes(name, tuple(sizes)) for name, sizes in zip(whole.names, ranges, strict=True)]


def _meet(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True)]


def _groups(shapes: Sequence[Sequence[int | torch.SymInt]]) -> list[list[_Place]]:
    """Return the places of free sizes of the inputs, those that are one size together."""
    groups: list[list[_Place]] = []
    for index, shape in enumerate(shapes):
        for place, size in enumerate(shape):
            if isinstance(size, int):
                continue
            for group in groups:
                first, dimension = group[0]
                if is_same_size(size, shapes[first][dimension]):
                    group.append((index, place))
                    break
            else:
                groups.append([(index, place)])
    return groups


def _follows(layers: nn.Module, whole: Whole, group: Iterable[_Place]) -> bool | None:
    """Return whether the layers follow the model when some sizes of its inputs are others; None if it fails itself."""
    try:
        other = list(whole.inputs)
        for index, place in group:
            other[index] = _resized(other[index], place)
        with torch.no_grad(), untouched(whole, other[0].device):
            whole.eval()
            whole(*other)
    except Exception:
        return None
    try:
        return not _difference(layers, whole, other, training=False)
    except UsageError:
        return False


def _resized(tensor: Tensor, place: int) -> Tensor:
    """Return a tensor with one row less in a dimension, or one more if there are two or less."""
    rows = tensor.shape[place]
    rows = rows - 1 if rows > 2 else rows + 1
    return tensor.index_select(place, torch.arange(rows, device=tensor.device) % tensor.shape[place])


def _difference(layers: nn.Module, whole: Whole, inputs: Sequence[Tensor], *, training: bool) -> str:
    """Return how the layers differ from the model; nothing if they do not."""
    device = inputs[0].device
    generators = random.getstate(), numpy.random.get_state()
    results = []
    layers.train(training)
    whole.train(training)  # last: a model's own `train` may keep parts in evaluation
    for run in (layers, whole):
        # Dropout draws the same numbers again, and statistics start from the same values.
        random.setstate(generators[0])
        numpy.random.set_state(generators[1])
        with torch.no_grad(), slow_attention(), untouched(whole, device):
            try:
                given = tuple(inputs) if run is layers and len(inputs) > 1 else inputs
                results.append(run(given if len(inputs) > 1 else inputs[0]) if run is layers else run(*inputs))
            except Exception as error:
                if run is whole:
                    raise UsageError(
                        f"{type(whole.model).__name__} fails on the sample: {first_line(error)}; give one it takes",
                        code="model-fails-on-sample",
                    ) from error
                return f"fails ({first_line(error)})"
    random.setstate(generators[0])
    numpy.random.set_state(generators[1])
    found, expected = results
    same = found.shape == expected.shape and found.dtype == expected.dtype
    same = same and torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)
    return "" if same else "gives another output than in one piece"
