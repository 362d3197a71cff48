"""Finds layers that hand something on beside the payload, by a global or an attribute: it would end at a cut."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy
import torch
from torch import Tensor, nn

from decoupled_pp.core.copies import copy_of
from decoupled_pp.core.device import on_meta, seeded, untouched
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.gradients import WithoutGradients
from decoupled_pp.core.module_state import KeptState
from decoupled_pp.core.packets import Payload, as_tuple, map_payload
from decoupled_pp.core.structures import is_plain, memory_of
from decoupled_pp.models.cutting.layers import copy_for, describe_layer

_AGAIN = 2
"""Passes that have to agree before a difference counts: a layer may skip itself at random by a generator of its own."""

_NOT_COMPUTED_WITH = {torch.uint16, torch.uint32, torch.uint64}
"""Whole numbers that torch stores, and hardly computes with."""


def refuse_side_channels(
    module: nn.Sequential, boundaries: Sequence[int], hiddens: Sequence[Payload], output: Tensor
) -> None:
    """Raise UsageError if the layers of a stage need more of earlier layers than their input.

    Every stage is run alone on its part of a traced sample, after a pass of the whole network over other values: what
    then differs from the trace came from there. So in evaluation, and in training mode with the random numbers of the
    trace.

    Args:
        module: The network.
        boundaries: Its cut, as in `Plan`.
        hiddens: The inputs of all layers, from `trace`.
        output: The network's output, from `trace`.
    """
    if len(boundaries) < 3 or on_meta(module):
        return
    device = output.device
    with untouched(module, device):
        _refuse_in_this_mode(module.eval(), boundaries, [*hiddens, output])
    # In training layers may also count what is not restored: on a copy that is nobody's affair.
    copied = copy_of(module, own_weights=False)
    with untouched(copied, device):
        if not any(part.training for part in copied.modules()):
            copied.train()
        values = _trace(list(copied.children()), hiddens[0])
        if values is not None:
            _refuse_in_this_mode(copied, boundaries, values)


def _refuse_in_this_mode(module: nn.Sequential, boundaries: Sequence[int], values: Sequence[Payload]) -> None:
    """Look for channels in the modules' present mode; `values` are the inputs of all layers, and the last output."""
    kept = KeptState(module)
    layers = list(module.children())
    _trace(layers, _other(values[0]), noise=True)
    kept.restore()
    # Last stage first: no stage finds what a later one has left.
    for first, end in reversed(list(pairwise(boundaries[1:]))):
        alone = _run(layers, range(first, end), values)
        kept.restore()
        if not _same(alone, values[end]) and _is_repeatable(layers, values, kept):
            raise _refusal(module, range(first, end), values, kept)


def _run(layers: Sequence[nn.Module], chosen: range, values: Sequence[Payload]) -> Payload | None:
    """Return what some of the layers make of their input in a trace; None: nothing."""
    made = _trace(layers, values[chosen[0]], chosen)
    return None if made is None else made[-1]


def _trace(
    layers: Sequence[nn.Module], payload: Payload, chosen: range | None = None, *, noise: bool = False
) -> list[Payload] | None:
    """Return the inputs of layers, and the last one's output; None if they fail.

    Each layer draws the same random numbers in every run. With noise on every activation, if that is asked for.
    """
    values = [payload]
    try:
        for number in range(len(layers)) if chosen is None else chosen:
            given = copy_for(layers[number], values[-1])
            with _drawing_again(number):
                if noise:
                    given = map_payload(_noisy, given)
                values.append(WithoutGradients()(layers[number], given))
    except Exception:  # what a user's layer may raise, on values that it has not been made for
        return None
    return values


@contextmanager
def _drawing_again(number: int) -> Iterator[None]:
    """Seed all generators that layers usually draw from, and put them back at the end."""
    states = random.getstate(), numpy.random.get_state()
    random.seed(number)
    numpy.random.seed(number)
    try:
        with seeded(number):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def _noisy(tensor: Tensor) -> Tensor:
    return tensor + torch.randn_like(tensor) if _computes(tensor) else tensor


def _other(payload: Payload) -> Payload:
    """Return other values of the same kind; whole numbers stay in their range."""
    return map_payload(_other_whole, payload)


def _other_whole(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() or not is_plain(tensor) or tensor.dtype in _NOT_COMPUTED_WITH:
        return tensor
    turned = tensor.flip(0) if tensor.dim() else tensor
    return (tensor == 0).to(tensor.dtype) if torch.equal(turned, tensor) else turned


def _same(one: Payload | None, other: Payload) -> bool:
    if one is None or len(as_tuple(one)) != len(as_tuple(other)):
        return False
    pairs = zip(as_tuple(one), as_tuple(other), strict=True)
    return all(a.shape == b.shape and _is_close(a, b) for a, b in pairs)


def _is_close(one: Tensor, other: Tensor) -> bool:
    pairs = zip(memory_of(one).values(), memory_of(other).values(), strict=True)
    for own, its in pairs:
        # The noise differs in the first digit; sums may differ in their last ones.
        digits = {"rtol": 1e-3, "atol": 1e-4} if _computes(own) else {"rtol": 0.0, "atol": 0.0}
        if own.shape != its.shape or not torch.allclose(own.to(_EXACT), its.to(_EXACT), equal_nan=True, **digits):
            return False
    return True


def _computes(tensor: Tensor) -> bool:
    """Return whether a tensor is of numbers that torch adds and rounds."""
    return tensor.layout is torch.strided and (tensor.is_complex() or tensor.dtype in _ROUNDED)


_EXACT = torch.complex128
_ROUNDED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _is_repeatable(layers: Sequence[nn.Module], values: Sequence[Payload], kept: KeptState) -> bool:
    """Return whether the whole network gives its output again: one that draws numbers of its own proves nothing."""
    for _ in range(_AGAIN):
        again = _trace(layers, values[0])
        kept.restore()
        if again is None or not _same(again[-1], values[-1]):
            return False
    return True


def _refusal(module: nn.Sequential, stage: range, values: Sequence[Payload], kept: KeptState) -> UsageError:
    """Return the error, with the names of the layers between which the channel runs."""
    named = list(module.named_children())
    layers = [layer for _, layer in named]

    def gives_its_output(index: int, *, after_layer: int | None = None) -> bool:
        _trace(layers, _other(values[0]), noise=True)
        kept.restore()
        if after_layer is not None:
            _run(layers, range(after_layer, after_layer + 1), values)
        return _same(_run(layers, range(index, index + 1), values), values[index + 1])

    reader = next((index for index in stage if not gives_its_output(index)), stage[-1])
    earlier = reversed(range(stage[0]))
    writer = next((index for index in earlier if gives_its_output(reader, after_layer=index)), None)
    kept.restore()
    source = "something"
    if writer is not None:
        source = f"what {describe_layer(*named[writer])} leaves in a global or an attribute"
    return UsageError(
        f"{describe_layer(*named[reader])} needs {source} beside its input, and only what a layer returns passes a "
        "cut; return it beside the output (a tuple of tensors), or put both layers in one stage (`cut` as a list)",
        code="layers-share-more-than-payload",
        key="cut",
    )
