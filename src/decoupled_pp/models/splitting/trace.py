"""Traces a model with `torch.export`, in both modes, with as many sizes of its inputs free as may be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.nn.parameter import is_lazy

from decoupled_pp.core.errors import UsageError, first_line
from decoupled_pp.core.torch_private import (
    causal_masks_asked_by,
    is_without_data,
    pytree,
    quiet_tracing,
    size_range,
    size_symbols,
    slow_attention,
)
from decoupled_pp.models.splitting.call import picked
from decoupled_pp.models.splitting.calls import CannotKeep, Recorder
from decoupled_pp.models.splitting.flat import FlatTrace
from decoupled_pp.models.splitting.kept import Call, is_causal
from decoupled_pp.models.splitting.shapes import ShapeRules, SizeFixed
from decoupled_pp.models.splitting.stubs import copy_replacing

# Which dimensions of the inputs may vary, tried in this order: an operator around a cut may refuse sizes that vary.
_FREE = (lambda place: True, lambda place: place < 2, lambda place: place < 1, lambda place: False)


class Whole(nn.Module):
    """A model as a function of the tensors in its arguments.

    Attributes:
        model: The model.
        inputs: The tensors of the sample.
        names: Their places in the arguments.
    """

    def __init__(self, model: nn.Module, sample: Any, output: Callable[[Any], Tensor]) -> None:
        """Take a model, its arguments (a tensor, a tuple, or a dictionary), and what picks its output."""
        super().__init__()
        self.model = model
        self._output = output
        args = sample if isinstance(sample, tuple | list) else (sample,)
        arguments = ((), dict(sample)) if isinstance(sample, Mapping) else (tuple(args), {})
        paths, form = pytree.tree_flatten_with_path(arguments)
        leaves = [leaf for _, leaf in paths]
        self.inputs = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        self.names = tuple(f"input{pytree.keystr(path[1:])}" for path, leaf in paths if isinstance(leaf, Tensor))

        def arguments_of(inputs: Sequence[Tensor]) -> Any:
            given = iter(inputs)
            return pytree.tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form)

        self._arguments_of = arguments_of

    def prepare(self) -> None:
        """Make the weights of lazy modules, and let batches of one sample not pass for constants of the trace."""
        for module in self.model.modules():
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False  # it would shorten the output in evaluation, and cannot be traced
        if any(map(is_lazy, (*self.parameters(), *self.buffers()))):
            with torch.no_grad():
                self.eval()(*self.inputs)
        if self.inputs[0].dim() and len(self.inputs[0]) == 1:
            self.inputs = tuple(torch.cat([one, one]) if one.dim() and len(one) == 1 else one for one in self.inputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the model."""
        args, kwargs = self._arguments_of(inputs)
        return picked(self._output, self.model(*args, **kwargs))


@dataclass(frozen=True)
class Trace:
    """The model in one mode.

    Attributes:
        flat: Its operators.
        calls: The calls of kept modules, by their number in the trace.
        shapes: Sizes of the inputs, as formulas.
        ranges: Smallest and largest sizes of the inputs for which it holds.
    """

    flat: FlatTrace
    calls: Sequence[Call]
    shapes: Sequence[Sequence[Any]]
    ranges: Sequence[Sequence[tuple[float, float]]]


class Tracer:
    """Traces a model for cuts after named modules."""

    def __init__(self, whole: Whole, cut_after: Sequence[str]) -> None:
        """Take the model; only the modules that hold a cut are traced through."""
        known = dict(whole.named_modules(remove_duplicate=False))
        for name in cut_after:
            if f"model.{name}" not in known or not name:
                raise bad_cut(
                    f"{name!r} is no module of {type(whole.model).__name__}; name modules as named_modules() does"
                )
        self._whole = whole
        first_names = {module: name for name, module in whole.named_modules()}
        self._ends = frozenset(first_names[known[f"model.{name}"]] for name in cut_after)
        # A module may have several names, and each of them leads through other modules.
        paths = [name for name, module in known.items() if first_names[module] in self._ends]
        above = [path.rsplit(".", count)[0] for path in paths for count in range(1, path.count(".") + 1)]
        self._opened = {"", *(first_names[known[name]] for name in above)}
        self._fixed: set[tuple[int, int]] = set()
        self._rules = ShapeRules(_copy(whole))

    def trace(self) -> dict[bool, Trace]:
        """Return the traces by the training mode.

        Raises:
            UsageError: The model cannot be traced.
        """
        failures: list[UsageError] = []
        for is_free in _FREE:
            dims = [(index, place) for index, tensor in enumerate(self._whole.inputs) for place in range(tensor.dim())]
            self._fixed = {(index, place) for index, place in dims if not is_free(place)}
            try:
                return self._trace_with_rules()
            except _CannotTrace as error:
                failures.append(error.fault)
        raise failures[0]

    def _trace_with_rules(self) -> dict[bool, Trace]:
        """Trace in both modes, until no module asks for another size to be fixed or to be traced through itself."""
        while True:
            try:
                return {training: self._trace(training) for training in (True, False)}
            except SizeFixed as error:
                added = {place for symbol in error.symbols for place in self._places.get(symbol, ())} - self._fixed
                if not added:
                    raise
                self._fixed |= added
            except CannotKeep as error:
                if error.name in self._opened:
                    raise
                self._opened.add(error.name)

    def _trace(self, training: bool) -> Trace:
        recorder = Recorder(frozenset(self._opened), self._ends, self._rules)
        self._whole.train(training)
        scripted = [module for module in self._whole.modules() if isinstance(module, torch.jit.ScriptModule)]
        copied = _copy(self._whole, {module: nn.Module() for module in scripted})  # only their calls matter
        free = tuple(
            tuple(Dim.STATIC if (index, place) in self._fixed else Dim.AUTO for place in range(tensor.dim()))
            for index, tensor in enumerate(self._whole.inputs)
        )

        def start(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._places: dict[Any, set[tuple[int, int]]] = {}
            for index, tensor in enumerate(inputs):
                for place, size in enumerate(tensor.shape):
                    for symbol in size_symbols(size):
                        self._places.setdefault(symbol, set()).add((index, place))
            self._rules.start(inputs, self._whole.inputs, training=training)

        copied.register_forward_pre_hook(start)
        try:
            with _quiet(), slow_attention(), causal_masks_asked_by(is_causal), recorder.watching(copied):
                program = export(copied, self._whole.inputs, dynamic_shapes=(free,), strict=False)
            flat = FlatTrace(program)
        except Exception as error:
            raise self._explained(error, recorder, training) from error
        self._refuse_what_a_trace_would_fix(copied, recorder, flat)
        shapes = [node.meta["val"].shape for node in flat.inputs]
        ranges = [[size_range(size, program.range_constraints) for size in shape] for shape in shapes]
        return Trace(flat, recorder.calls, shapes, ranges)

    def _explained(self, error: Exception, recorder: Recorder, training: bool) -> Exception:
        """Return what to raise for an error in a trace."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UsageError | SizeFixed | CannotKeep):
                return cause
            cause = cause.__cause__ or cause.__context__
        reason = first_line(error)
        if "data-dependent" in reason:
            reason = "it decides by values of tensors, such as a random number that leaves a layer out (layerdrop)"
        return _CannotTrace(self._fault(recorder.failed_in, training, reason))

    def _fault(self, place: str | None, training: bool, reason: str) -> UsageError:
        return UsageError(
            f"{_module(self._whole, place)} cannot be traced in {mode_name(training)}: {reason}; cut elsewhere "
            "(only the code of modules that hold a cut is traced), or pass the layers as a list",
            code="not-traceable",
        )

    def _refuse_what_a_trace_would_fix(self, copied: nn.Module, recorder: Recorder, flat: FlatTrace) -> None:
        if recorder.drew_in is not None:
            raise UsageError(
                f"{_module(self._whole, recorder.drew_in)} draws random numbers from Python or NumPy (such as to leave "
                "layers out), and a trace would keep one draw for ever; draw in a module that holds no cut, set its "
                "probability to 0, or pass the layers as a list",
                code="mode-fixed-by-trace",
            )
        for name, module in copied.named_modules():
            for key, value in vars(module).items():
                if name in self._opened and isinstance(value, Tensor) and is_without_data(value):
                    raise UsageError(
                        f"{_module(self._whole, name)} keeps the tensor {key!r} from one call to the next, which a "
                        "trace would lose; register it as a buffer",
                        code="state-lost-by-trace",
                    )
        for name in (end.removeprefix("model.") for end in self._ends):
            times = flat.ends.count(f"model.{name}")
            if times != 1:
                raise bad_cut(f"{name!r} ends {times} times in a run; name modules that run once")


class _CannotTrace(Exception):
    """Raised when a trace fails, perhaps because of a size that is free."""

    def __init__(self, fault: UsageError) -> None:
        super().__init__(str(fault))
        self.fault = fault


def bad_cut(fault: str) -> UsageError:
    """Return the error for names of modules after which a model cannot be cut."""
    return UsageError(f"cut_after: {fault}", code="bad-cut-point")


def _module(whole: Whole, name: str | None) -> str:
    """Return a module's name in the model as a user reads it."""
    plain = (name or "").removeprefix("model").removeprefix(".")
    return repr(plain) if plain else f"the code of {type(whole.model).__name__}"


def _copy(whole: Whole, replacements: Mapping[Any, Any] = MappingProxyType({})) -> Whole:
    """Return a copy that shares all tensors: modules remember things while they are traced."""
    shared = [*whole.parameters(), *whole.buffers(), *whole.inputs]
    for module in whole.modules():  # plain attributes may have a gradient function, and such tensors cannot be copied
        shared += [value for value in vars(module).values() if isinstance(value, Tensor)]
    try:
        return copy_replacing(whole, {**{tensor: tensor for tensor in shared}, **replacements})  # type: ignore[return-value]
    except Exception as error:
        raise UsageError(
            f"{type(whole.model).__name__} cannot be copied, and tracing needs a copy: {first_line(error)}; pass its "
            "layers as a list",
            code="not-traceable",
        ) from error


def mode_name(training: bool) -> str:
    """Return how the user knows a mode."""
    return "training" if training else "evaluation"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence `torch.export`, which prints what it does and warns of its own internals."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings(), quiet_tracing():
        warnings.simplefilter("ignore")
        yield
