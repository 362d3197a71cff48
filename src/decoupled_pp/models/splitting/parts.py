"""Cuts a flat trace into parts, each a function of its own code on any device and for batches of any size."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from decoupled_pp.core.torch_private import is_same_size, pytree
from decoupled_pp.models.splitting.calls import CALL
from decoupled_pp.models.splitting.flat import FlatTrace
from decoupled_pp.models.splitting.kept import Call, invoke

_SIZES = (torch.SymInt, torch.SymBool, torch.SymFloat)


@dataclass
class PartGraph:
    """One part of a trace.

    Attributes:
        graph: Its code: (calls of kept modules, device, values it takes) -> values it makes.
        takes: Nodes of the flat trace.
        makes: Nodes of the flat trace.
        modules: Names of the modules that it calls.
        tensors: Names of the parameters, buffers and constants that its own operators use.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    takes: list[fx.Node] = field(default_factory=list)
    makes: list[fx.Node] = field(default_factory=list)
    modules: set[str] = field(default_factory=set)
    tensors: set[str] = field(default_factory=set)


def cut(trace: FlatTrace, calls: Sequence[Call]) -> list[PartGraph]:
    """Return the parts of a trace, in order; `calls` are those that it numbers."""
    builders = [_Builder(trace, calls, index) for index in range(trace.parts)]
    for node in trace.graph.nodes:
        if node in trace.part:
            builders[trace.part[node]].add(node)
    parts = [builder.part for builder in builders]
    for index, (part, builder) in enumerate(zip(parts, builders, strict=True)):
        needed = {node for later in parts[index + 1 :] for node in later.takes}
        part.makes = [node for node in builder.results_first() if node in needed]
        if index == len(parts) - 1:
            part.makes = [trace.output]
        builder.finish()
    return parts


class _Builder:
    """Writes the code of one part.

    Sizes are no values that travel: a part reads them off a tensor that it has anyway.
    """

    def __init__(self, trace: FlatTrace, calls: Sequence[Call], index: int) -> None:
        self.part = PartGraph()
        self.made: list[fx.Node] = []
        self._trace = trace
        self._calls = calls
        self._index = index
        self._given_calls = self.part.graph.placeholder("calls")
        self._device = self.part.graph.placeholder("device")
        self._last_argument = self._device
        self._here: dict[fx.Node, fx.Node] = {trace.device: self._device}
        self._will_take = _taken(trace, index)

    def add(self, node: fx.Node) -> None:
        """Append an operator."""
        if isinstance(node.meta.get("val"), _SIZES):
            return  # made when an operator asks for it
        if node.target is CALL:
            made = self._call(node)
        else:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self._use)
            args, kwargs = pytree.tree_map(self._on_device, (args, kwargs))
            made = self.part.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        self._keep(node, made)
        self.made.append(node)

    def results_first(self) -> list[fx.Node]:
        """Return all values in their order, but those that the last module returned first: critics look at them."""
        last = self.made[-1:]
        if last and last[0].target is operator.getitem:
            last = [node for node in self.made if node.target is operator.getitem and node.args[0] is last[0].args[0]]
        return [*last, *(node for node in self.made if node not in last)]

    def finish(self) -> None:
        """Append what the part returns."""
        self.part.graph.output(tuple(self._use(node) for node in self.part.makes))

    def _keep(self, node: fx.Node, made: fx.Node) -> fx.Node:
        made.meta.update(node.meta)
        self._here[node] = made
        return made

    def _call(self, node: fx.Node) -> fx.Node:
        tensors, sizes, number = node.args
        name = self._calls[number].name  # type: ignore[index]
        self.part.modules.add(name)
        graph = self.part.graph
        call = graph.call_function(operator.getitem, (self._given_calls, number))
        given = fx.node.map_arg((list(tensors), list(sizes)), self._use)  # type: ignore[arg-type]
        return graph.call_function(invoke, (call, graph.get_attr(name), *given))

    def _on_device(self, value: Any) -> Any:
        return self._device if isinstance(value, torch.device) else value

    def _use(self, node: fx.Node) -> fx.Node:
        """Return what stands here for a value of the trace."""
        if node in self._here:
            return self._here[node]
        if node in self._trace.names:
            name = self._trace.names[node]
            self.part.tensors.add(name)
            return self._keep(node, self.part.graph.get_attr(name))
        if isinstance(node.meta.get("val"), _SIZES):
            return self._keep(node, self._size(node))
        self.part.takes.append(node)
        with self.part.graph.inserting_after(self._last_argument):
            # A name of its own: the code gives other values names of the trace.
            self._last_argument = self.part.graph.placeholder(f"given{len(self.part.takes)}")
        return self._keep(node, self._last_argument)

    def _size(self, node: fx.Node) -> fx.Node:
        size = node.meta["val"]
        for tensor in (*self._will_take, *self._here):
            shape = getattr(tensor.meta.get("val"), "shape", ())
            for place, other in enumerate(shape):
                if isinstance(size, torch.SymInt) and is_same_size(size, other):
                    return self.part.graph.call_function(torch.ops.aten.sym_size.int, (self._use(tensor), place))
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self._use)
        return self.part.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]


def _taken(trace: FlatTrace, index: int) -> list[fx.Node]:
    """Return the tensors that a part takes from earlier ones."""
    taken: dict[fx.Node, None] = {}
    for node, part in trace.part.items():
        if part == index and not isinstance(node.meta.get("val"), _SIZES):
            for argument in node.all_input_nodes:
                is_tensor = isinstance(argument.meta.get("val"), Tensor)
                if is_tensor and argument not in trace.names and trace.part.get(argument, -1) < index:
                    taken[argument] = None
    return list(taken)
