"""Models that are no chain in Python, through `torch.export`: cut after named modules; skip connections travel along.

names ["down", "mid"]:      inputs -> [.. down] -> (h, skip) -> [.. mid] -> (h, skip) -> [..] -> output
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass
from io import StringIO
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.distributed.pipelining import Pipe, SplitPoint, pipeline

from decoupled_pp.core.device import untouched
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Payload, as_tuple
from decoupled_pp.core.plans import Layers
from decoupled_pp.models.splitting.blocks import Split, picked
from decoupled_pp.models.splitting.modes import calls_of, module_of, moody, own_module, plain_name, refuse_told

Value: TypeAlias = tuple[int, int]
"""(part that makes it, place in its result); part -1 for the inputs."""

_ROWS = 13
"""Samples of the micro-batch that is traced: a multiple of 13 among sizes can hardly be anything but the batch."""

_SHAPED = (
    "view",
    "_unsafe_view",
    "reshape",
    "expand",
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
)
_OPERATORS: dict[str, Callable[..., Any]] = {}
"""Operators of traces that are called for the batch and the device at hand, by name."""

_AT_HAND: ContextVar[tuple[int, torch.device]] = ContextVar("batch and device of the running part")


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
        _AT_HAND.set((given[0].shape[0], given[0].device))
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
            return picked(self._output, self.model(**dict(zip(self._names, inputs, strict=True))))
        return picked(self._output, self.model(*inputs))


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
    `eval()`; so do others that ask in which mode they are (stochastic depth), if they take one tensor and give one.

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
    modes = {id(part): part.training for part in model.modules()}
    with untouched(model, inputs[0].device):
        whole = _Whole(model, output, list(named))
        whole.eval()
        evaluation = calls_of(_stages(_pipe(whole, inputs, ())), whole)
        whole.train()  # what does nothing in evaluation leaves no trace in it
        pipe = _pipe(whole, inputs, cut_after)
        modules = _stages(pipe)
        if len(modules) != len(cut_after) + 1:
            raise UsageError(
                f"cut_after: {len(cut_after)} names give {len(modules)} parts; each must name a module that runs once"
            )
        kept = moody(modules, evaluation, calls_of(modules, whole))
        refuse_told(whole, inputs, kept)
        for module in modules:
            _revive(module, whole, kept)
        parts = _parts(pipe.split_gm.graph, modules)
        layers = Layers([(f"part{index}", layer) for index, layer in enumerate(_chain(parts, len(inputs)))])
        _check(layers, whole, inputs)
    for part in layers.modules():
        part.training = modes.get(id(part), model.training)
    names = {key: plain_name(key.split(".part.model.", 1)[1]) for key in layers.state_dict()}
    return Split(layers, names, {})


def _stages(pipe: Pipe) -> list[nn.Module]:
    """The parts of a trace.

    Raises:
        UsageError: A part computes nothing.
    """
    try:
        return [pipe.get_stage_module(index) for index in range(pipe.num_stages)]
    except AttributeError as error:
        raise UsageError("cut_after: between two of the cuts nothing is computed; leave one out") from error


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


def _revive(part: nn.Module, whole: nn.Module, kept: Container[str]) -> None:
    """Put the model's own modules in place of their traces (`torch.nn`'s and those that are to be kept).

    The rest is made to take any batch.
    """
    for name, module in list(part.named_modules()):
        own = own_module(whole, name, kept)
        if own is not None:
            holder, _, key = name.rpartition(".")
            part.get_submodule(holder).register_module(key, own)
        elif "@" in name:  # traced once more: its tensors are the same all the same
            original = whole.get_submodule(plain_name(name))
            for tensors in (module._parameters, module._buffers):
                tensors.update({key: getattr(original, key) for key, one in tensors.items() if one is not None})
    _forget_buffers(part, whole)
    for module in part.modules():
        if isinstance(graph := getattr(module, "graph", None), fx.Graph):
            for node in graph.nodes:
                _revive_call(node)
        if isinstance(module, fx.GraphModule):
            module.recompile()


def _forget_buffers(part: nn.Module, whole: nn.Module) -> None:
    """A trace would save buffers that the model does not."""
    for name, module in part.named_modules():
        if (original := module_of(whole, name)) is not None:
            module._non_persistent_buffers_set |= original._non_persistent_buffers_set & module._buffers.keys()


def _revive_call(node: fx.Node) -> None:
    """Let an operator follow the batch and the device at hand."""
    if node.op != "call_function":
        return
    kind = str(node.target).split(".")[1:2]
    if (kind and kind[0] in _SHAPED and any(map(_is_batched, node.args))) or "device" in node.kwargs:
        assert callable(node.target)
        _OPERATORS[str(node.target)] = node.target
        node.args, node.target = (str(node.target), *node.args), _at_hand


def _is_batched(argument: object) -> bool:
    return isinstance(argument, list | tuple) and any(isinstance(n, int) and n and n % _ROWS == 0 for n in argument)


def _at_hand(operator_name: str, *args: Any, **kwargs: Any) -> Any:
    """An operator with the sizes and the device of the trace replaced by those of the batch at hand."""
    rows, device = _AT_HAND.get()
    sized = [
        [n // _ROWS * rows if isinstance(n, int) and n and n % _ROWS == 0 else n for n in argument]
        if _is_batched(argument)
        else argument
        for argument in args
    ]
    if "device" in kwargs:
        kwargs = {**kwargs, "device": device}
    return _OPERATORS[operator_name](*sized, **kwargs)


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
    """Raises UsageError unless the layers give the model's output, in both modes, for micro-batches of two sizes."""
    for rows, training in ((_ROWS, False), (_ROWS, True), (_ROWS - 2, False)):
        given = tuple(_rows(tensor, rows) for tensor in inputs)
        layers.train(training)
        whole.train(training)
        seed = torch.seed()  # the generators are the user's again afterwards
        try:
            with torch.no_grad(), _slow_attention():
                found = layers(given if len(given) > 1 else given[0])
                torch.manual_seed(seed)
                expected = whole(*given)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
            raise UsageError(
                f"traced with {_ROWS} samples, the model fails with {rows}: {reason}; "
                "write the size of the batch as tensor.shape[0] or -1 in it"
            ) from error
        if not torch.equal(found, expected):
            mode = "training" if training else "evaluation"
            raise UsageError(f"in parts, the model gives another output for {rows} samples in {mode} than in one piece")


@contextmanager
def _slow_attention() -> Iterator[None]:
    """`nn.MultiheadAttention` as in training: in evaluation it has a fused kernel, which rounds otherwise."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _rows(tensor: Tensor, rows: int) -> Tensor:
    return tensor[torch.arange(rows, device=tensor.device) % tensor.shape[0]]
