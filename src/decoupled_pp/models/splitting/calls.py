"""Keeps modules whole in a trace: `torch.export` sees each call of one as a single operator.

They stay the user's own, whatever their code does, and follow `train()` and `eval()`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn

from decoupled_pp.core.torch_private import own_buffers, pytree
from decoupled_pp.models.splitting.kept import Call, Flag
from decoupled_pp.models.splitting.shapes import ShapeRules

_LIBRARY = torch.library.Library("decoupled_pp", "DEF")
_LIBRARY.define("call(Tensor[] tensors, SymInt[] sizes, int number) -> Tensor[]")
_LIBRARY.define("end(str module) -> ()")
CALL = torch.ops.decoupled_pp.call.default
END = torch.ops.decoupled_pp.end.default
for _operator in (CALL, END):
    fx.has_side_effect(_operator)  # or the trace would leave out a call whose result is not used

_GIVEN = (Tensor, Flag, torch.SymInt)  # what is given anew in every call
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


class CannotKeep(Exception):
    """Raised when a module takes or returns objects that may hide tensors.

    Attributes:
        name: The module's.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass
class Recorder:
    """Watches the modules of a model while it is traced.

    Attributes:
        opened: Names of modules that are traced through; all others are kept whole.
        ends: Names of modules whose end is marked in the trace.
        rules: Tell the shapes of what kept modules return.
        calls: The calls of kept modules, by their number in the trace.
        failed_in: The innermost opened module that raised.
        drew_in: The innermost opened module that has drawn from Python's or NumPy's random generator.
    """

    opened: frozenset[str]
    ends: frozenset[str]
    rules: ShapeRules
    calls: list[Call] = field(default_factory=list)
    failed_in: str | None = None
    drew_in: str | None = None
    _results: list[tuple[list[Any], Any]] = field(default_factory=list)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch the modules of a copy of the model, whose classes are changed for good."""
        for name, module in model.named_modules():
            module.__class__ = self._watched(type(module), name)
        _recorders.append(self)
        try:
            yield
        finally:
            _recorders.remove(self)

    def shapes(self, tensors: Sequence[Tensor], sizes: Sequence[Any], number: int) -> list[Tensor]:
        """Return tensors without content, shaped as the results of a call."""
        call = self.calls[number]
        leaves, form = self.rules.results(call, tensors, sizes)
        if not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
            raise CannotKeep(call.name)
        self._results.append((leaves, form))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def _watched(self, kind: type[nn.Module], name: str) -> type[nn.Module]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if name in self.opened:
                result = self._open(name, module, lambda: kind.__call__(module, *args, **kwargs))
            else:
                result = self._keep(name, args, kwargs)
            if name in self.ends:
                END(name)
            return result

        metaclass: Any = type(kind)
        watched: type[nn.Module] = metaclass(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
        return watched

    def _open(self, name: str, module: nn.Module, run: Callable[[], Any]) -> Any:
        before = _python_generators()
        buffers = dict(own_buffers(module))
        try:
            result = run()
        except Exception:
            self.failed_in = name if self.failed_in is None else self.failed_in
            raise
        if self.drew_in is None and _python_generators() != before:
            self.drew_in = name
        for key, buffer in buffers.items():
            assigned = own_buffers(module)[key]
            if buffer is not None and assigned is not None and assigned is not buffer:
                own_buffers(module)[key] = buffer.copy_(assigned)  # a trace would lose the assignment
        return result

    def _keep(self, name: str, args: Any, kwargs: Any) -> Any:
        leaves, form = pytree.tree_flatten((args, dict(kwargs)))
        tensors = [getattr(leaf, "value", leaf) for leaf in leaves if isinstance(leaf, Tensor | Flag)]
        sizes = [leaf for leaf in leaves if isinstance(leaf, torch.SymInt)]
        if not all(isinstance(leaf, (*_GIVEN, *_PLAIN)) for leaf in leaves):
            raise CannotKeep(name)
        number = len(self.calls)
        self.calls.append(Call(name, tuple(map(_placed, leaves)), form))
        made = iter(CALL(tensors, sizes, number))
        results, result_form = self._results[number]
        return pytree.tree_unflatten(
            [next(made) if isinstance(leaf, Tensor) else leaf for leaf in results], result_form
        )


_recorders: list[Recorder] = []  # the operators know no recorder: theirs is the one that watches now


def _shapes_of_call(tensors: Sequence[Tensor], sizes: Sequence[Any], number: int) -> list[Tensor]:
    return _recorders[-1].shapes(tensors, sizes, number)


torch.library.register_fake(CALL, _shapes_of_call, lib=_LIBRARY)
torch.library.register_fake(END, lambda module: None, lib=_LIBRARY)


def _placed(leaf: Any) -> Any:
    return next((kind for kind in _GIVEN if isinstance(leaf, kind)), leaf)


def _python_generators() -> tuple[Any, ...]:
    return random.getstate(), str(numpy.random.get_state(legacy=False))
