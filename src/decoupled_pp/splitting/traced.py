"""Models that are no chain in Python, through `torch.export`: cut after named modules; skip connections travel along.

names ["down", "mid"]:      inputs -> [.. down] -> (h, skip) -> [.. mid] -> (h, skip) -> [..] -> output
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.distributed.pipelining import Pipe, SplitPoint, pipeline

from decoupled_pp.contracts import Layers, Payload, UsageError, as_tuple
from decoupled_pp.device import untouched
from decoupled_pp.splitting.blocks import Split

Value: TypeAlias = tuple[int, int]
"""(part that makes it, place in its result); part -1 for the inputs."""

_ROWS = 3
"""Samples of the micro-batch that is traced: a first size of 3 in a `view` can hardly be anything but the batch."""

_FIXED_MODE = ("dropout", "batch_norm", "instance_norm", "rrelu")
_SHAPED = {torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten.expand.default}


@dataclass(frozen=True)
class _Part:
    """What a part takes and makes, as values of the whole."""

    module: nn.Module
    takes: tuple[Value, ...]
    makes: int


class Traced(nn.Module):
    """One part: picks what it takes from the payload, passes on what later parts need."""

    def __init__(self, part: nn.Module, takes: Sequence[int], gives: Sequence[tuple[bool, int]], *, last: bool) -> None:
        """Wrap a part.

        Args:
            part: Its graph.
            takes: Places in the payload that are its arguments.
            gives: For every tensor of the outgoing payload whether the part has made it, and its place.
            last: The part's only result is the network's output.
        """
        super().__init__()
        self.part = part
        self._takes, self._gives, self._last = tuple(takes), tuple(gives), last

    def forward(self, payload: Payload) -> Payload:
        """Payload -> payload, or the output."""
        given = as_tuple(payload)
        result = self.part(*(given[place] for place in self._takes))
        made = (result,) if isinstance(result, Tensor) else tuple(result)
        outgoing = tuple(made[place] if own else given[place] for own, place in self._gives)
        return outgoing[0] if self._last or len(outgoing) == 1 else outgoing


class _Whole(nn.Module):
    """The model with its output picked out."""

    def __init__(self, model: nn.Module, output: Callable[[Any], Tensor], names: Sequence[str]) -> None:
        super().__init__()
        self.model, self._output, self._names = model, output, tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        if self._names:
            return self._output(self.model(**dict(zip(self._names, inputs, strict=True))))
        return self._output(self.model(*inputs))


def split_traced(
    model: nn.Module,
    sample: Payload | Mapping[str, Tensor],
    cut_after: Sequence[str],
    *,
    output: Callable[[Any], Tensor] = lambda result: result,
) -> Split:
    """Cut a model after named modules, whatever its `forward` does between them.

    `torch.export` must be able to trace it. What later parts need of earlier ones (skip connections) travels in the
    payload, behind the result of the last module. Modules of `torch.nn` stay as they are and follow `train()` and
    `eval()`.

    Args:
        model: It becomes part of the layers.
        sample: An input micro-batch: the tensors of its positional arguments, or a dictionary of keyword arguments.
        cut_after: Names of modules (dotted), each of which runs once; they end the parts, in the order they run in.
        output: The tensor of the model's result that is the network's output.

    Raises:
        UsageError: It cannot be traced or cut there, or the parts do not give the model's output for micro-batches of
            any size; why is said.
    """
    named = sample if isinstance(sample, Mapping) else {}
    inputs = tuple(named.values()) or as_tuple(sample)  # type: ignore[arg-type]
    inputs = tuple(_rows(tensor, _ROWS) for tensor in inputs)
    known = dict(model.named_modules())
    for name in cut_after:
        if name not in known:
            raise UsageError(f"cut_after: {name!r} is no module of {type(model).__name__}")
    with untouched(model, inputs[0].device), torch.no_grad():
        model.eval()
        whole = _Whole(model, output, list(named))
        pipe = _pipe(whole, inputs, cut_after)
        modules = [pipe.get_stage_module(index) for index in range(pipe.num_stages)]
        if len(modules) != len(cut_after) + 1:
            raise UsageError(
                f"cut_after: {len(cut_after)} names give {len(modules)} parts; each must name a module that runs once"
            )
        for module in modules:
            _revive(module, whole)
        parts = _parts(pipe.split_gm.graph, modules)
        layers = Layers([(f"part{index}", layer) for index, layer in enumerate(_chain(parts, len(inputs)))])
        layers.training = model.training
        _check(layers, whole, inputs)
    prefixes = {key: key.split(".part.model.", 1)[1] for key in layers.state_dict()}
    return Split(layers, prefixes, {})


def _pipe(whole: _Whole, inputs: tuple[Tensor, ...], cut_after: Sequence[str]) -> Pipe:
    """Trace a copy that shares all tensors: annotating changes modules."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*whole.parameters(), *whole.buffers())}
    copied = copy.deepcopy(whole, memo)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export's own
            return pipeline(copied, inputs, split_spec={f"model.{name}": SplitPoint.END for name in cut_after})
    except Exception as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).split("\n", 1)[0]
        raise UsageError(f"torch.export cannot trace {type(whole.model).__name__}: {reason}") from error


def _revive(part: nn.Module, whole: nn.Module) -> None:
    """Put the model's own modules of `torch.nn` in place of their traces, and make the rest take any batch.

    Raises:
        UsageError: Something outside such modules behaves one way in training and another in evaluation.
    """
    for name, _ in list(part.named_modules()):
        own = _own(whole, name)
        if own is not None:
            holder, _, key = name.rpartition(".")
            part.get_submodule(holder).register_module(key, own)
    for name, module in part.named_modules():
        graph = getattr(module, "graph", None)
        for node in graph.nodes if isinstance(graph, fx.Graph) else ():
            if node.op != "call_function":
                continue
            if any(word in str(node.target) for word in _FIXED_MODE):
                raise UsageError(
                    f"{name.removeprefix('model.') or 'the model'} calls {node.target} itself, and a trace would keep "
                    "it in one mode for ever; use a module of torch.nn for it"
                )
            if node.target in _SHAPED and list(node.args[1])[:1] == [_ROWS]:
                node.target = _like_batch
        if isinstance(module, fx.GraphModule):
            module.recompile()


def _like_batch(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A reshape whose first size is the batch."""
    return tensor.reshape(tensor.shape[0], *shape[1:])


def _own(whole: nn.Module, name: str) -> nn.Module | None:
    """The model's own module under a name of its trace, if it is one of torch's without parts."""
    try:
        module = whole.get_submodule(name)
    except AttributeError:
        return None
    plain = type(module).__module__.startswith("torch.nn.") and not list(module.children())
    return module if name and plain else None


def _parts(graph: fx.Graph, modules: Sequence[nn.Module]) -> list[_Part]:
    """What every part takes and makes, from the graph of their calls."""
    values: dict[fx.Node, Value] = {}
    parts: list[_Part] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = (-1, sum(part == -1 for part, _ in values.values()))
        elif node.op == "call_module":
            values[node] = (len(parts), 0)
            makes = len([user for user in node.users if user.target is operator.getitem]) or 1
            takes = tuple(values[argument] for argument in node.args)
            parts.append(_Part(modules[len(parts)], takes, makes))
        elif node.target is operator.getitem:
            values[node] = (values[node.args[0]][0], node.args[1])
    return parts


def _chain(parts: Sequence[_Part], inputs: int) -> Iterator[Traced]:
    """Each part with the places of its arguments in the payload, and the payload for those behind it."""
    incoming: list[Value] = [(-1, place) for place in range(inputs)]
    for index, part in enumerate(parts):
        needed = {value for later in parts[index + 1 :] for value in later.takes}
        own = [(index, place) for place in range(part.makes)]
        last = index == len(parts) - 1
        outgoing = own if last else [value for value in (*own, *incoming) if value in needed]
        gives = [(value[0] == index, value[1] if value[0] == index else incoming.index(value)) for value in outgoing]
        yield Traced(part.module, [incoming.index(value) for value in part.takes], gives, last=last)
        incoming = outgoing


def _check(layers: nn.Module, whole: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raises UsageError unless the layers give the model's output for micro-batches of two sizes."""
    layers.eval()
    for rows in (_ROWS, _ROWS + 2):
        given = tuple(_rows(tensor, rows) for tensor in inputs)
        try:
            found = layers(given if len(given) > 1 else given[0])
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
            raise UsageError(
                f"traced with {_ROWS} samples, the model fails with {rows}: {reason}; "
                "write the size of the batch as tensor.shape[0] or -1 in it"
            ) from error
        if not torch.equal(found, whole(*given)):
            raise UsageError(f"in parts, the model gives another output for {rows} samples than in one piece")


def _rows(tensor: Tensor, rows: int) -> Tensor:
    return tensor[torch.arange(rows, device=tensor.device) % tensor.shape[0]]
