"""Splits models that are no chain in Python, through `torch.export`: cut after named modules.

Skip connections travel along. For names ["down", "mid"]:

    inputs -> [.. down] -> (h, skip) -> [.. mid] -> (h, skip) -> [..] -> output
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.distributed.pipelining import Pipe, SplitPoint, pipeline

from decoupled_pp.core.device import untouched
from decoupled_pp.core.errors import UsageError, first_line
from decoupled_pp.core.packets import Payload, as_tuple
from decoupled_pp.core.plans import Layers
from decoupled_pp.models.splitting.blocks import Split, picked
from decoupled_pp.models.splitting.modes import functional_calls, mode_dependent, plain_name, refuse_extra_arguments
from decoupled_pp.models.splitting.revive import TRACED_BATCH, revive, running_batch
from decoupled_pp.models.splitting.stubs import copy_replacing

_Value: TypeAlias = tuple[int, int]  # (part that makes it, place in its result); part -1 for the inputs


@dataclass(frozen=True)
class _Part:
    """One part of the trace."""

    module: nn.Module
    takes: tuple[_Value, ...]  # its arguments
    makes: int  # number of tensors in its result


class TracedLayer(nn.Module):
    """Runs one part: picks its arguments from the payload, and passes on what later parts need."""

    def __init__(self, part: nn.Module, takes: Sequence[int], gives: Sequence[tuple[bool, int]], *, last: bool) -> None:
        super().__init__()
        self.part = part
        self._takes = tuple(takes)  # places in the payload
        self._gives = tuple(gives)  # for every outgoing tensor: True if the part has made it, and its place
        self._last = last

    def forward(self, payload: Payload) -> Payload:
        """Payload -> payload, or the output."""
        given = as_tuple(payload)
        running_batch.set((given[0].shape[0], given[0].device))  # operators of the graph ask for it
        made = as_tuple(self.part(*(given[place] for place in self._takes)))
        outgoing = tuple(made[place] if own else given[place] for own, place in self._gives)
        return outgoing[0] if self._last or len(outgoing) == 1 else outgoing


class _Whole(nn.Module):
    """The model with its output picked out."""

    def __init__(self, model: nn.Module, output: Callable[[Any], Tensor], names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._output = output
        self._names = tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        named = dict(zip(self._names, inputs, strict=False))
        return picked(self._output, self.model(*inputs[len(named) :], **named))


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
    `eval()`; so do others that ask in which mode they are (stochastic depth), if they take one tensor and return one.

    Args:
        model: It becomes part of the layers.
        sample: An input micro-batch: the tensors of its positional arguments, or a dictionary of keyword arguments.
        cut_after: Names of modules (dotted), each of which runs once; they end the parts, in the order they run in.
        output: Picks the network's output from the model's result.

    Raises:
        UsageError: It cannot be traced or cut there, or the parts do not give the model's output for micro-batches of
            any size; the text says why.
    """
    named = sample if isinstance(sample, Mapping) else {}
    inputs = tuple(named.values()) or as_tuple(sample)  # type: ignore[arg-type]
    inputs = tuple(_rows(tensor, TRACED_BATCH) for tensor in inputs)
    known = dict(model.named_modules())
    for name in cut_after:  # torch's own error would not say which name is wrong
        if name not in known:
            raise _bad_cut(f"{name!r} is no module of {type(model).__name__}; name modules as named_modules() does")
    modes = {id(part): part.training for part in model.modules()}
    with untouched(model, inputs[0].device):
        whole = _Whole(model, output, list(named))
        modules, graph = _cut(whole, inputs, cut_after)
        parts = _parts(graph, modules)
        layers = Layers([(f"part{index}", layer) for index, layer in enumerate(_chain(parts, len(inputs)))])
        _check(layers, whole, inputs)
    for part in layers.modules():  # the model's own modules keep their modes, those of the trace get the model's
        part.training = modes.get(id(part), model.training)
    names = {key: plain_name(key.split(".part.model.", 1)[1]) for key in layers.state_dict()}
    return Split(layers, names, {})


def _bad_cut(fault: str) -> UsageError:
    return UsageError(f"cut_after: {fault}", code="bad-cut-point")


def _cut(whole: _Whole, inputs: tuple[Tensor, ...], cut_after: Sequence[str]) -> tuple[list[nn.Module], fx.Graph]:
    """Trace the model and return its parts, with the model's own modules in them, and the graph of their calls."""
    # The model is traced in both modes, and the difference tells which modules depend on the mode.
    whole.eval()
    evaluation = functional_calls(_stage_modules(_trace(whole, inputs, ())), whole)
    whole.train()  # the trace that is kept: dropout and the like leave nothing in a trace of evaluation
    pipe = _trace(whole, inputs, cut_after)
    modules = _stage_modules(pipe)
    if len(modules) != len(cut_after) + 1:
        raise _bad_cut(f"{len(cut_after)} names give {len(modules)} parts; each must name a module that runs once")
    kept = mode_dependent(modules, evaluation, functional_calls(modules, whole))
    refuse_extra_arguments(whole, inputs, kept)
    for module in modules:
        revive(module, whole, kept)
    return modules, pipe.split_gm.graph


def _trace(whole: _Whole, inputs: tuple[Tensor, ...], cut_after: Sequence[str]) -> Pipe:
    """Trace a copy that shares all tensors: `pipeline` annotates the modules that it is given."""
    copied = copy_replacing(whole, {tensor: tensor for tensor in (*whole.parameters(), *whole.buffers())})
    try:
        # torch.export prints what it does and warns of its own internals.
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pipeline(copied, inputs, split_spec={f"model.{name}": SplitPoint.END for name in cut_after})
    except Exception as error:
        if isinstance(error.__cause__, UsageError):  # ours, raised by `picked` while torch.export ran it
            raise error.__cause__ from None
        raise UsageError(
            f"torch.export cannot trace {type(whole.model).__name__}: {first_line(error.__cause__ or error)}; pass its "
            "layers as a list",
            code="not-traceable",
        ) from error


def _stage_modules(pipe: Pipe) -> list[nn.Module]:
    try:
        return [pipe.get_stage_module(index) for index in range(pipe.num_stages)]
    except AttributeError as error:
        raise _bad_cut("between two of the cuts nothing is computed; leave one out") from error


def _parts(graph: fx.Graph, modules: Sequence[nn.Module]) -> list[_Part]:
    """Return what every part takes and makes, from the graph of their calls."""
    values: dict[fx.Node, _Value] = {}
    parts: list[_Part] = []
    inputs = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = (-1, inputs)
            inputs += 1
        elif node.op == "call_module":
            values[node] = (len(parts), 0)
            # A part that returns several tensors is followed by one getitem for each; one that returns one, by none.
            unpacked = [user for user in node.users if user.target is operator.getitem]
            takes = tuple(values[argument] for argument in node.args)
            parts.append(_Part(modules[len(parts)], takes, len(unpacked) or 1))
        elif node.target is operator.getitem:
            maker, _ = values[node.args[0]]
            values[node] = (maker, node.args[1])
    return parts


def _chain(parts: Sequence[_Part], inputs: int) -> Iterator[TracedLayer]:
    """Yield every part with the places of its arguments in the payload, and the payload for those behind it."""
    incoming: list[_Value] = [(-1, place) for place in range(inputs)]
    for index, part in enumerate(parts):
        needed = {value for later in parts[index + 1 :] for value in later.takes}
        outgoing = [(index, place) for place in range(part.makes)]
        is_last = index == len(parts) - 1
        if not is_last:
            outgoing = [value for value in (*outgoing, *incoming) if value in needed]
        gives = []
        for maker, place in outgoing:
            own = maker == index
            gives.append((own, place if own else incoming.index((maker, place))))
        yield TracedLayer(part.module, [incoming.index(value) for value in part.takes], gives, last=is_last)
        incoming = outgoing


def _check(layers: nn.Module, whole: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Check that the layers give the model's output, bit for bit, in both modes and for micro-batches of two sizes."""
    for rows, training in ((TRACED_BATCH, False), (TRACED_BATCH, True), (TRACED_BATCH - 2, False)):
        given = tuple(_rows(tensor, rows) for tensor in inputs)
        layers.train(training)
        whole.train(training)
        seed = torch.seed()  # the caller restores the generators
        try:
            with torch.no_grad(), _slow_attention():
                found = layers(given if len(given) > 1 else given[0])
                torch.manual_seed(seed)  # dropout draws the same numbers again
                expected = whole(*given)
        except Exception as error:
            raise UsageError(
                f"traced with {TRACED_BATCH} samples, the model fails with {rows}: {first_line(error)}; write the size "
                "of the batch as tensor.shape[0] or -1 in it",
                code="batch-size-fixed-by-trace",
            ) from error
        if not torch.equal(found, expected):
            mode = "training" if training else "evaluation"
            raise UsageError(
                f"split into layers, the model gives another output for {rows} samples in {mode} than in one piece; "
                "pass its layers as a list",
                code="split-changes-output",
            )


@contextmanager
def _slow_attention() -> Iterator[None]:
    """Run `nn.MultiheadAttention` as in training: in evaluation it has a fused kernel, which rounds otherwise."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _rows(tensor: Tensor, rows: int) -> Tensor:
    """Return `rows` rows of a tensor, cycling through its own."""
    return tensor[torch.arange(rows, device=tensor.device) % tensor.shape[0]]
