"""Brings the graph of a `torch.export` trace into one flat list of operators, with the places where it is cut."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


def enter_autocast(device: torch.device, *settings: Any) -> torch.autocast:
    """Enter `torch.autocast` on the device that a part runs on."""
    context = torch.autocast(device.type, *settings)
    context.__enter__()
    return context


def exit_autocast(context: torch.autocast) -> None:
    """Leave what `enter_autocast` has entered."""
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
        self._cuttable = True
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
            self.ends.append(args[0])
            self._now += 1
            if not self._cuttable:
                raise CannotCut(f"no_grad or autocast around {args[0]!r}")
            return None
        if node.target is operator.getitem and isinstance(args[0], list):  # results of a region that is inlined
            return args[0][args[1]]
        if name == "wrap_with_set_grad_enabled":
            with self._region(*self._grad(args[0])):
                return self._inline(args[1].graph, args[2:])
        if name == "wrap_with_autocast":
            with self._region(*self._autocast(*args[1:4])):
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

    @contextmanager
    def _region(self, begin: fx.Node, end: Callable[[fx.Node], fx.Node]) -> Iterator[None]:
        outer = self._cuttable
        self._cuttable = False
        self._place(begin)
        try:
            yield
        finally:
            self._place(end(begin))
            self._cuttable = outer

    def _grad(self, enabled: bool) -> tuple[fx.Node, Callable[[fx.Node], fx.Node]]:
        before = self._place(self.graph.call_function(torch.is_grad_enabled))
        begin = self.graph.call_function(torch.set_grad_enabled, (enabled,))
        return begin, lambda _: self.graph.call_function(torch.set_grad_enabled, (before,))

    def _autocast(self, *settings: Any) -> tuple[fx.Node, Callable[[fx.Node], fx.Node]]:
        begin = self.graph.call_function(enter_autocast, (self.device, *settings))
        return begin, lambda begin: self.graph.call_function(exit_autocast, (begin,))
