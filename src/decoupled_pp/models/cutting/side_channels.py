"""Finds layers that hand something on beside the payload, by a global or an attribute: it would end at a cut."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from decoupled_pp.core.device import on_meta, seeded, untouched
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.gradients import WithoutGradients
from decoupled_pp.core.module_state import KeptState
from decoupled_pp.core.packets import Payload, as_tuple, map_payload
from decoupled_pp.core.structures import is_plain, memory_of
from decoupled_pp.models.cutting.layers import copy_for, describe_layer

_NOT_COMPUTED_WITH = {torch.uint16, torch.uint32, torch.uint64}
"""Whole numbers that torch stores, and hardly computes with."""


def refuse_side_channels(
    module: nn.Sequential, boundaries: Sequence[int], hiddens: Sequence[Payload], output: Tensor
) -> None:
    """Raise UsageError if the layers of a stage need more of earlier layers than their input.

    Every stage is run alone on its part of a traced sample, after a pass of the whole network over other values: what
    then differs from the trace came from there.

    Args:
        module: The network.
        boundaries: Its cut, as in `Plan`.
        hiddens: The inputs of all layers, from `trace`.
        output: The network's output, from `trace`.
    """
    if len(boundaries) < 3 or on_meta(module):
        return
    after = [*hiddens[1:], output]
    with untouched(module, output.device):
        module.eval()
        kept = KeptState(module)
        layers = list(module.children())
        _run(layers, _other(hiddens[0]), noise=True)
        kept.restore()
        # Last stage first: no stage finds what a later one has left.
        for first, end in reversed(list(pairwise(boundaries[1:]))):
            alone = _run(layers[first:end], hiddens[first])
            kept.restore()
            if not _same(alone, after[end - 1]) and _is_repeatable(layers, hiddens[0], output, kept):
                raise _refusal(module, range(first, end), hiddens, after, kept)


def _run(layers: Sequence[nn.Module], payload: Payload, *, noise: bool = False) -> Payload | None:
    """Return what the layers make of a payload; with noise on every activation, if that is asked for; None: nothing."""
    try:
        for number, layer in enumerate(layers):
            given = copy_for(layer, payload)
            if noise:
                with seeded(number):
                    given = map_payload(_noisy, given)
            payload = WithoutGradients()(layer, given)
    except Exception:  # what a user's layer may raise, on values that it has not been made for
        return None
    return payload


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


def _is_repeatable(layers: Sequence[nn.Module], sample: Payload, output: Tensor, kept: KeptState) -> bool:
    """Return whether the whole network gives its output again: one that draws random numbers proves nothing."""
    again = _run(layers, sample)
    kept.restore()
    return _same(again, output)


def _refusal(
    module: nn.Sequential, stage: range, hiddens: Sequence[Payload], after: Sequence[Payload], kept: KeptState
) -> UsageError:
    """Return the error, with the names of the layers between which the channel runs."""
    named = list(module.named_children())
    layers = [layer for _, layer in named]

    def gives_its_output(index: int, *, after_layer: int | None = None) -> bool:
        _run(layers, _other(hiddens[0]), noise=True)
        kept.restore()
        if after_layer is not None:
            _run([layers[after_layer]], hiddens[after_layer])
        return _same(_run([layers[index]], hiddens[index]), after[index])

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
