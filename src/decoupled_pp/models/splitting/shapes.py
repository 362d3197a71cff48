"""Finds the shapes of what a module returns as formulas of the sizes it is given, by calling it with several sizes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, combinations
from math import prod
from typing import Any, TypeAlias

import numpy
import torch
from torch import Tensor, nn

from decoupled_pp.core.torch_private import pytree, size_symbols, size_value, tensors_without_data
from decoupled_pp.models.splitting.kept import Call

_Results: TypeAlias = tuple[list[Any], Any]  # leaves and their form
_Shapes: TypeAlias = list[tuple[int, ...]]


class SizeFixed(Exception):
    """Raised when results follow a size by no formula, so that it has to be a constant of the trace.

    Attributes:
        symbols: The sizes.
    """

    def __init__(self, symbols: Iterable[Any]) -> None:
        super().__init__("the result of a module follows a size by no formula")
        self.symbols = frozenset(symbols)


class ShapeRules:
    """Tells the shapes of results of the modules of a model.

    Sizes of results are sums of products of the sizes given (rows, rows * length, length + 1, ...). So calls with each
    of them changed by one tell the formula, and one far from there whether it holds. A size for which it does not, such
    as the height of an image before a strided convolution, has to be fixed.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take a copy of the model: what its modules remember of these calls is of no use to anybody."""
        self._model = model
        self._without_data = tensors_without_data()
        self._sizes: dict[Any, tuple[Any, int]] = {}
        self._seen: dict[Any, _Results] = {}

    def start(self, inputs: Sequence[Tensor], sample: Sequence[Tensor], *, training: bool) -> None:
        """Take the symbols of a trace from the model's inputs, and their values from the sample."""
        self._model.train(training)
        self._sizes = {}
        for traced, real in zip(inputs, sample, strict=True):
            for size, value in zip(traced.shape, real.shape, strict=True):
                for symbol in size_symbols(size):
                    self._sizes.setdefault(symbol, (size, value))

    def results(self, call: Call, tensors: Sequence[Tensor], sizes: Sequence[Any]) -> _Results:
        """Return the results of a call in the trace: leaves, whose tensors hold no data, and their form.

        Raises:
            SizeFixed: They follow a size by no formula.
        """
        given = [*sizes, *(size for tensor in tensors for size in tensor.shape)]
        free = sorted({symbol for size in given for symbol in size_symbols(size)}, key=str)
        values = {symbol: self._sizes[symbol][1] for symbol in free}
        leaves, form = self._run(call, tensors, sizes, values)

        def shapes(changed: Mapping[Any, int]) -> _Shapes:
            return _shapes(self._run(call, tensors, sizes, {**values, **changed})[0])

        formula = _Formula(shapes, values)
        alone = [symbol for symbol in free if not formula.holds([symbol])]
        same = next((group for group in _of_one_value(alone, values) if formula.holds_together(group)), None)
        if same:
            for symbol in same[1:]:
                # To ask whether two sizes are equal makes them one symbol in the trace, as an operator would.
                bool(self._sizes[same[0]][0] == self._sizes[symbol][0])
            return self.results(call, tensors, sizes)
        if alone or not formula.holds(free):
            raise SizeFixed(alone or free)
        steps = {symbol: self._sizes[symbol][0] - value for symbol, value in values.items()}
        made = iter(formula.after(steps))
        return [_empty(leaf, next(made)) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form

    def _run(self, call: Call, tensors: Sequence[Tensor], sizes: Sequence[Any], values: Mapping[Any, int]) -> _Results:
        shapes = [[size_value(size, values) for size in tensor.shape] for tensor in tensors]
        numbers = [size_value(size, values) for size in sizes]
        key = (call.name, self._model.training, str(call), str(shapes), str(numbers), str([t.dtype for t in tensors]))
        if key not in self._seen:
            module = self._model.get_submodule(call.name)
            kind = tensors[0].device.type if tensors else "cpu"
            autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

            def run(make: Callable[..., Tensor]) -> _Results:
                given = [make(shape, dtype=t.dtype, device=t.device) for shape, t in zip(shapes, tensors, strict=True)]
                with autocast:
                    return pytree.tree_flatten(call(module, given, numbers))

            # In a thread of its own none of this goes into the trace: its modes are those of the tracing thread.
            with ThreadPoolExecutor(1) as thread, _python_generators_kept():
                self._seen[key] = thread.submit(self._without_data_or_with, run).result()
        return self._seen[key]

    def _without_data_or_with(self, run: Callable[[Callable[..., Tensor]], _Results]) -> _Results:
        try:
            with self._without_data:
                return run(torch.empty)
        except Exception:  # its code looks at values, or calls an operator that has no rule for shapes
            try:
                return run(torch.zeros)
            except Exception:  # such as lengths, of which none may be 0
                return run(torch.ones)


class _Formula:
    """Shapes of results as sums of products of sizes, from calls with each combination of sizes changed by one."""

    def __init__(self, shapes: Callable[[Mapping[Any, int]], _Shapes], values: Mapping[Any, int]) -> None:
        """Take what tells the results' shapes for other sizes, and the sizes of the sample."""
        self._shapes = shapes
        self._values = values
        # Smaller ones, where there are: a table of positions may end at the sample's length.
        self._near = {symbol: value - 1 if value > 3 else value + 1 for symbol, value in values.items()}
        self._far = {symbol: value // 2 if value > 3 else 2 * value + 1 for symbol, value in values.items()}
        self._corners: dict[tuple[Any, ...], _Shapes] = {}

    def holds(self, changed: Sequence[Any]) -> bool:
        """Return whether the formula in these sizes holds far from where it was found."""
        try:
            for subset in _subsets(changed):
                if subset not in self._corners:
                    self._corners[subset] = self._shapes({symbol: self._near[symbol] for symbol in subset})
            there = self._shapes({symbol: self._far[symbol] for symbol in changed})
        except Exception:  # the module takes no other size
            return False
        steps = {symbol: self._far[symbol] - self._values[symbol] for symbol in changed}
        return self.after(steps) == [list(shape) for shape in there]

    def holds_together(self, group: Sequence[Any]) -> bool:
        """Return whether there is a formula in one size, which all of the group are."""
        one = _Formula(
            lambda changed: self._shapes({symbol: value for value in changed.values() for symbol in group}),
            {group[0]: self._values[group[0]]},
        )
        return one.holds(group[:1])

    def after(self, steps: Mapping[Any, Any]) -> list[list[Any]]:
        """Return the shapes when sizes are so much larger than in the sample."""
        result: list[list[Any]] = [[0] * len(shape) for shape in self._corners[()]]
        for subset in _subsets(steps):
            factor = prod(steps[symbol] * (self._near[symbol] - self._values[symbol]) for symbol in subset)
            for index, shape in enumerate(result):
                for place in range(len(shape)):
                    weight = sum(
                        (-1) ** (len(subset) - len(part)) * self._corners[part][index][place]
                        for part in _subsets(subset)
                    )
                    if weight:
                        shape[place] = shape[place] + weight * factor
        return result


def _of_one_value(symbols: Sequence[Any], values: Mapping[Any, int]) -> Iterator[tuple[Any, ...]]:
    """Yield groups of two or more sizes that have one value in the sample, small groups first."""
    for group in _subsets(symbols):
        if len(group) > 1 and len({values[symbol] for symbol in group}) == 1:
            yield group


def _subsets(symbols: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    symbols = list(symbols)
    return chain.from_iterable(combinations(symbols, count) for count in range(len(symbols) + 1))


def _shapes(leaves: Sequence[Any]) -> _Shapes:
    return [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]


def _empty(like: Tensor, sizes: Sequence[Any]) -> Tensor:
    """Return a tensor without content of these sizes, whose dimensions lie in memory in the order of another's."""
    strides: list[Any] = [1] * like.dim()
    step: Any = 1
    for place in sorted(range(like.dim()), key=lambda place: (like.stride(place), -place)):
        strides[place] = step
        step = step * sizes[place]
    return torch.empty_strided(sizes, strides, dtype=like.dtype, device=like.device)


@contextmanager
def _python_generators_kept() -> Iterator[None]:
    before = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
