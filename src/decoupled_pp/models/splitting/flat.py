"""Brings the graph of a `torch.export` trace into one flat list of operators, with the places where it is cut."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from decoupled_pp.models.splitting.calls import END

# Checks of what the trace assumes: dtypes that `model.to(dtype)` may change, sizes of at least two.
_CHECKS = ("aten._assert", "aten.sym_constrain")
_COPY = torch.ops.aten.copy_.default


class CannotCut(Exception):
    """Raised when a trace holds what cannot be cut into parts; the text says what."""


def enter_region(kind: str, device: torch.device, *settings: Any) -> AbstractContextManager[Any]:
    """Enter `autocast`, on the device that a part runs on, or `grad`: `no_grad` or `enable_grad`."""
    context = torch.autocast(device.type, *settings) if kind == "autocast" else torch.set_grad_enabled(*settings)
    context.__enter__()
    return context


def exit_region(context: AbstractContextManager[Any]) -> None:
    """Leave what `enter_region` has entered."""
    context.__exit__(None, None, None)


class FlatTrace:
    """A trace as one list of operators.

    Attributes:
        graph: The operators; `autocast` and `no_grad` regions are calls that begin and end them.
        device: Stands for the device that the trace runs on.
        inputs: The model's inputs.
        names: Name of every parameter, buffer or constant of the model that operators use.
        constants: The tensors among them that are no parameters or buffers.
        output: The model's output.
        ends: Names of the marked modules, as often as they ended, in order.
        part: Number of the part that an operator belongs to.
        parts: Number of parts.
    """

    def __init__(self, program: ExportedProgram) -> None:
        """Read the trace."""
        self.graph = fx.Graph()
        self.device = self.graph.placeholder("device")
        self.inputs: list[fx.Node] = []
        self.names: dict[fx.Node, str] = {}
        self.constants: dict[str, Tensor] = {}
        self.ends: list[str] = []
        self.part: dict[fx.Node, int] = {}
        self._now = 0
        self._regions: list[tuple[Any, ...]] = []  # those that are open, outer ones first
        self._entered: list[fx.Node] = []
        given = [
            self._input(program, spec.kind, spec.target, spec.arg.name) for spec in program.graph_signature.input_specs
        ]
        for node, origin in zip(given, program.graph.find_nodes(op="placeholder"), strict=True):
            node.meta.update(origin.meta)
        (self.output,) = self._inline(program.graph, given)

    @property
    def parts(self) -> int:
        """Number of parts."""
        return self._now + 1

    def _input(self, program: ExportedProgram, kind: InputKind, target: str | None, name: str) -> fx.Node:
        node = self.graph.placeholder(name)
        if kind is InputKind.USER_INPUT:
            self.inputs.append(node)
            return node
        if kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) or target is None:
            raise CannotCut(f"a {kind.name.lower()}")
        self.names[node] = target
        if kind is InputKind.CONSTANT_TENSOR:
            self.constants[target] = program.constants[target]
        return node

    def _inline(self, graph: fx.Graph, given: Sequence[Any]) -> list[Any]:
        """Append the operators of a graph, and return what stands for its results."""
        known: dict[fx.Node, Any] = dict(zip(graph.find_nodes(op="placeholder"), given, strict=True))
        for node in graph.nodes:
            if node.op == "call_function":
                known[node] = self._append(node, known)
            elif node.op == "get_attr":
                known[node] = getattr(graph.owning_module, str(node.target))
        results: Any = graph.output_node().args[0]
        return [known[result] for result in results]

    def _append(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        given: Any = fx.node.map_arg((node.args, dict(node.kwargs)), lambda argument: known[argument])
        args, kwargs = given
        name = str(node.target)
        if name.startswith(_CHECKS):
            return None
        if node.target is END:
            return self._cut(args[0])
        if node.target is operator.getitem and isinstance(args[0], list):  # results of a region that is inlined
            return args[0][args[1]]
        if name == "wrap_with_set_grad_enabled":
            with self._region("grad", args[0]):
                return self._inline(args[1].graph, args[2:])
        if name == "wrap_with_autocast":
            with self._region("autocast", *args[1:4]):
                return self._inline(args[4].graph, args[5:])
        if any(isinstance(argument, torch.nn.Module) for argument in args):
            raise CannotCut(f"torch's {name}")
        made = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        made.meta.update(node.meta)
        return self._place(made)

    def _place(self, node: fx.Node) -> fx.Node:
        self.part[node] = self._now
        # The new value of a buffer is written at the end of the trace; that belongs where the value is made.
        if node.target is _COPY and node.args[0] in self.names and node.args[1] in self.part:
            self.part[node] = self.part[node.args[1]]  # type: ignore[index]
        return node

    def _cut(self, name: str) -> None:
        self.ends.append(name)
        for entered in reversed(self._entered):
            self._place(self.graph.call_function(exit_region, (entered,)))
        self._now += 1
        self._entered = [self._enter(*region) for region in self._regions]

    @contextmanager
    def _region(self, *region: Any) -> Iterator[None]:
        self._regions.append(region)
        self._entered.append(self._enter(*region))
        yield
        self._regions.pop()
        self._place(self.graph.call_function(exit_region, (self._entered.pop(),)))

    def _enter(self, kind: str, *settings: Any) -> fx.Node:
        return self._place(self.graph.call_function(enter_region, (kind, self.device, *settings)))
