"""Splits models that are no chain in Python, through `torch.export`: cut after named modules.

Only the code around the cuts is traced. Modules that hold no cut stay as they are, and skip connections travel along.
For names ["down", "mid"]:

    inputs -> [.. down] -> (h, skip) -> [.. mid] -> (h, skip) -> [..] -> output
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.device import untouched
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Payload
from decoupled_pp.core.plans import Layers
from decoupled_pp.models.splitting.arguments import check_calls, check_model, check_names, check_sample, fails_on_sample
from decoupled_pp.models.splitting.compare import checked_sizes
from decoupled_pp.models.splitting.parts import PartGraph, cut
from decoupled_pp.models.splitting.split import Split
from decoupled_pp.models.splitting.trace import Trace, Tracer, Whole
from decoupled_pp.models.splitting.traced_layer import Code, Part, TracedLayer, compiled
from decoupled_pp.models.splitting.tying import give_copies


def split_traced(
    model: nn.Module,
    sample: Payload | Mapping[str, Any],
    cut_after: Sequence[str],
    *,
    output: Callable[[Any], Tensor] = lambda result: result,
) -> Split:
    """Cut a model after named modules, whatever its `forward` does between them.

    `torch.export` must be able to trace the code of the modules that hold a cut; all others are called as they are.
    What later parts need of earlier ones (skip connections) travels in the payload, behind the result of the last
    module. A model that asks whether it trains (`self.training`) is traced in both modes.

    Args:
        model: It becomes part of the layers.
        sample: An input micro-batch: the tensor or the tuple of its positional arguments, or a dictionary of keyword
            arguments; each of them may be a nested tuple, list or dictionary of tensors.
        cut_after: Names of modules (dotted), each of which runs once; they end the parts, in the order they run in.
        output: Picks the network's output from the model's result.

    Raises:
        UsageError: It cannot be traced or cut there, or the parts do not give the model's output for micro-batches of
            any size; the text says why.
    """
    check_model(model)
    check_sample(model, sample)
    check_names("cut_after", cut_after)
    check_calls(output, None)
    modes = {id(part): part.training for part in model.modules()}
    whole = Whole(model, sample, output)
    whole.prepare()
    with untouched(whole, whole.inputs[0].device):
        try:
            traces = Tracer(whole, cut_after).trace()
            parts = _layers(whole, traces)
            layers = Layers((f"part{index}", part) for index, part in enumerate(parts))
            parts[0].sizes = checked_sizes(layers, whole, traces)
        except UsageError as error:
            raise _fault_of_sample(whole) or error from error
    names = {key: key.split(".part.model.", 1)[1] for key in layers.state_dict()}
    aliases = _aliases(model, layers, names)
    layers.tied = give_copies([{f"part{index}": part} for index, part in enumerate(parts)], names)
    for part in layers.modules():  # the model's own modules keep their modes, those of the trace get the model's
        part.training = modes.get(id(part), model.training)
    return Split(
        layers, names, {names[copy]: names[first] for copy, first in layers.tied.items()}, aliases, way="traced"
    )


def _fault_of_sample(whole: Whole) -> UsageError | None:
    """Return why the model itself cannot be run on the sample, if so: then it is not the trace that fails."""
    try:
        with torch.no_grad():
            whole.eval()(*whole.inputs)
    except UsageError as error:
        return error
    except Exception as error:
        return fails_on_sample(whole.model, error)
    return None


def _aliases(model: nn.Module, layers: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Return further key of the model for a tensor of the layers -> its key in `names`."""
    own = {id(tensor): names[key] for key, tensor in layers.state_dict(keep_vars=True).items()}
    known = set(names.values())
    state = model.state_dict(keep_vars=True)
    return {key: own[id(tensor)] for key, tensor in state.items() if key not in known and id(tensor) in own}


def _layers(whole: Whole, traces: Mapping[bool, Trace]) -> list[TracedLayer]:
    """Return the layers of a model that was traced in both modes."""
    graphs = {training: cut(trace.flat, trace.calls) for training, trace in traces.items()}
    codes = {training: list(_codes(traces[training], parts)) for training, parts in graphs.items()}
    layers = []
    for index in range(len(graphs[True])):
        part = Part()
        modules = {name for parts in graphs.values() for name in parts[index].modules}
        for name in sorted(modules, key=lambda name: name.count(".")):  # outer ones first: they hold the inner ones
            part.hold_module(name, whole.get_submodule(name))
        for training, parts in graphs.items():
            for name in sorted(parts[index].tensors):
                part.hold_tensor(name, whole, traces[training].flat.constants)
        layers.append(TracedLayer(part, {training: each[index] for training, each in codes.items()}))
    _hold_idle(layers, whole)
    return layers


def _codes(trace: Trace, parts: Sequence[PartGraph]) -> Iterator[Code]:
    """Yield what every part computes, with the places of its arguments in the payload that the one before it gives."""
    incoming = list(trace.flat.inputs)
    for index, part in enumerate(parts):
        needed = {node for later in parts[index + 1 :] for node in later.takes}
        kept = [node for node in incoming if node in needed]
        outgoing = [*part.makes, *kept]
        takes = tuple(incoming.index(node) for node in part.takes)
        gives = [(True, place) for place in range(len(part.makes))] + [(False, incoming.index(node)) for node in kept]
        yield Code(compiled(part.graph), trace.calls, takes, tuple(gives))
        incoming = outgoing


def _hold_idle(layers: Sequence[TracedLayer], whole: Whole) -> None:
    """Give the first layer what no part uses: somebody has to hold it, so that the model's weights stay complete."""
    held = {id(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    for name, tensor in whole.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in held:
            layers[0].part.hold_tensor(name, whole, {})
