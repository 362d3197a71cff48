"""The layers that a model is split into: what comes before its blocks, each block, and what comes after them.

    inputs -> entry -> (hidden, sides.., carried.., inputs..) -> block -> ..
        -> block -> (hidden, carried.., inputs..) -> exit -> output

Entry and exit run the model's own `forward` in copies of it in which stubs stand for all that is elsewhere. *Carried*
are results of parts before the blocks that the exit needs (a condition, a residual). An input whose values the exit
does not need travels as its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.device import on_meta, random_position
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Payload, as_tuple
from decoupled_pp.core.torch_private import pytree
from decoupled_pp.models.splitting.call import ForwardCall
from decoupled_pp.models.splitting.observe import flat
from decoupled_pp.models.splitting.ragged import padded, ragged
from decoupled_pp.models.splitting.stubs import AllBlocksCalled, MissingPartStub, PassThroughStub, RecordingStub
from decoupled_pp.models.splitting.wiring import TENSOR, Side, Wiring


@dataclass(frozen=True)
class Travel:
    """Says what travels beside the hidden state and the sides.

    Attributes:
        inputs: For every input whether its values travel, or only its shape.
        carried: Results that travel to the exit, in the order of their calls.
        is_ragged: True if the hidden state may be a nested tensor, whose lengths then travel.
        leaves_out: True if the model leaves out blocks at random in training; which ones run then travels.
    """

    inputs: tuple[bool, ...]
    carried: tuple[CarriedResult, ...] = ()
    is_ragged: bool = False
    leaves_out: bool = False

    def __deepcopy__(self, memo: object) -> Travel:
        """Return itself: nothing in it changes, and copies of layers are made often."""
        return self

    def take_runs(self, rest: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Part the tensors behind a hidden state: the one that says which blocks run, if there is one, and others."""
        count = int(self.leaves_out)
        return rest[:count], rest[count:]


@dataclass(frozen=True)
class CarriedResult:
    """A result of a part before the blocks that the exit needs.

    Attributes:
        part: Name of the part in the model.
        call: Number of the call of the part.
        leaves: Leaves of the result; TENSOR for each tensor.
        form: How the leaves make the result.
    """

    part: str
    call: int
    leaves: tuple[Any, ...]
    form: pytree.TreeSpec

    def result(self, tensors: Iterator[Tensor]) -> Any:
        """Return the result with its tensors, the next ones."""
        leaves = [next(tensors) if leaf is TENSOR else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.form)


class _EndLayer(nn.Module):
    """A copy of the model, with stubs, that is run by its own `forward`.

    Attributes:
        model: The copy.
        travel: The values that travel from entry to exit.
    """

    def __init__(self, model: nn.Module, shape_model: nn.Module | None, call: ForwardCall) -> None:
        """Take the copy, and one with stubs in more places, which is run while `model` has no weights."""
        super().__init__()
        self.model = model
        self.travel = Travel((True,) * len(call.names))
        self._call = call
        # nn.Module would register it as a submodule, and its parameters would appear in state_dict().
        object.__setattr__(self, "_shape_model", shape_model)

    # Models behave otherwise under the compiler's tracer, and there is little to gain outside the blocks.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self, inputs: Sequence[Tensor]) -> Any:
        """Return the model's result; while it has no weights (the meta device), a result of the right shape."""
        shape_model = self.__dict__["_shape_model"]
        model = shape_model if shape_model is not None and on_meta(self) else self.model
        return self._call.run(model, inputs)


class EntryLayer(_EndLayer):
    """Everything that comes before the first block."""

    def __init__(
        self,
        model: nn.Module,
        shape_model: nn.Module | None,
        call: ForwardCall,
        stubs: Sequence[RecordingStub],
        wiring: Wiring,
    ) -> None:
        """Take a copy of the model whose blocks are `stubs`."""
        super().__init__(model, shape_model, call)
        self._stubs = list(stubs)
        self._wiring = wiring

    def forward(self, payload: Payload) -> Payload:
        """Map inputs to (hidden state, sides, carried results, inputs)."""
        inputs = [leaf for leaf in pytree.tree_leaves(payload) if isinstance(leaf, Tensor)]
        meta = inputs[0].is_meta
        given: dict[int, list[Any]] = {}
        while not given:  # one that leaves out all of its blocks at random is run again: there is no hidden state
            # The last stub raises: what the model does after its blocks belongs to the exit, and is not run here.
            with self._noting() as (carried, sizes), suppress(AllBlocksCalled):
                self._run(_with_values(inputs))
            given = self._given()
        hidden = given[min(given)][self._wiring.blocks[min(given)].hidden_in]
        outgoing: list[Tensor] = padded(hidden, sizes, slots=self.travel.is_ragged)
        if self.travel.leaves_out:
            outgoing.append(torch.tensor([index in given for index in range(len(self._stubs))], device=hidden.device))
        for side in self._wiring.travelling(0):
            tensor = next((given[block][place] for block, place in side.places if block in given), None)
            # A payload holds tensors only, so None travels as an empty one.
            outgoing.append(torch.empty(0, device=hidden.device) if tensor is None else tensor)
        outgoing += [tensor for result in self.travel.carried for tensor in carried[result.part][result.call]]
        for tensor, travels in zip(inputs, self.travel.inputs, strict=True):
            outgoing.append(tensor if travels else torch.tensor(tensor.shape, device=tensor.device))
        return tuple(tensor.to("meta") for tensor in outgoing) if meta else tuple(outgoing)

    def _given(self) -> dict[int, list[Any]]:
        """Return what each block was given, which the stubs forget: they must not keep activations alive."""
        given = {index: stub.given for index, stub in enumerate(self._stubs) if stub.given}
        for stub in self._stubs:
            stub.given = []
        missing = [stub.name for index, stub in enumerate(self._stubs) if index not in given]
        if missing and not (self.travel.leaves_out and self.training):
            raise UsageError(
                f"the model leaves out its block {missing[0]!r}, which ran when it was split; set what leaves blocks "
                "out (layerdrop, stochastic depth of whole blocks) to 0 or less",
                code="block-left-out",
            )
        return given

    @contextmanager
    def _noting(self) -> Iterator[tuple[dict[str, list[list[Tensor]]], list[torch.Size]]]:
        """Note the tensors of the results of parts that the exit needs, and the sizes of what holders of blocks get."""
        carried: dict[str, list[list[Tensor]]] = {result.part: [] for result in self.travel.carried}
        sizes: list[torch.Size] = []

        def note(name: str) -> Callable[..., None]:
            def after(_module: nn.Module, _args: Any, result: Any) -> None:
                carried[name].append([leaf for leaf in flat(result)[0] if isinstance(leaf, Tensor)])

            return after

        def measure(_module: nn.Module, args: Any, kwargs: Any) -> None:
            given = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            sizes.extend(leaf.shape for leaf in given if leaf.is_floating_point() and not leaf.is_nested)

        with ExitStack() as hooks:
            for name in carried:
                hooks.callback(self.model.get_submodule(name).register_forward_hook(note(name)).remove)
            if self.travel.is_ragged:
                for name in {stub.name.rpartition(".")[0].rpartition(".")[0] for stub in self._stubs}:
                    holder = self.model.get_submodule(name)
                    hooks.callback(holder.register_forward_pre_hook(measure, with_kwargs=True).remove)
            yield carried, sizes


class Initialiser:
    """Gives parts of a model fresh weights, as the model's library does: `fill` draws from torch's global generator."""

    def __init__(self, fill: Callable[[nn.Module], None]) -> None:
        self.fill = fill

    def __deepcopy__(self, _: object) -> Initialiser:
        """Return itself: `fill` holds the whole model, which a copy of one block must not copy along."""
        return self


class BlockLayer(nn.Module):
    """One of the model's blocks: (hidden state, sides, ..) -> (hidden state, sides, ..).

    Attributes:
        block: The model's own block.
        travel: The values that travel from entry to exit.
        initialiser: How the model makes its weights; None: each part of it by its own `reset_parameters`, if any.
    """

    initialiser: Initialiser | None = None

    def __init__(self, block: nn.Module, wiring: Wiring, index: int, travel: Travel) -> None:
        super().__init__()
        self.block = block
        self.travel = travel
        self._index = index
        self._wiring = wiring.blocks[index]
        self._before = _slots(wiring.travelling(index))
        self._after = _slots(wiring.travelling(index + 1))

    @property
    def reset_parameters(self) -> Callable[[], None] | None:
        """Return a function that makes fresh weights in place, for critics that copy layers; None if there is none."""
        initialiser = self.initialiser
        if initialiser is None:
            return None  # so that callable() is False, and a critic looks for the method on the parts instead
        return lambda: initialiser.fill(self.block)

    def forward(self, payload: Payload) -> Payload:
        """Call the block as the model would."""
        hidden, rest = ragged(payload, slots=self.travel.is_ragged)
        runs, rest = self.travel.take_runs(rest)
        sides = dict(zip(self._before, rest, strict=False))  # the rest of `rest` is for the exit
        others = rest[len(self._before) :]
        given = {slot: None if side.shape == (0,) else side for slot, side in sides.items()}
        args, kwargs = self._wiring.arguments(hidden, given)
        if not runs or bool(runs[0][self._index]):
            # Library blocks return a tensor, a tuple or a dataclass; the wiring knows the places among the leaves.
            made = pytree.tree_leaves(self.block(*args, **kwargs))
            sides |= {slot: made[place] for place, slot in self._wiring.makes}
            hidden = made[self._wiring.hidden_out]
        out = padded(hidden, [as_tuple(payload)[0].shape], slots=self.travel.is_ragged)
        after = (sides.get(slot, torch.empty(0, device=hidden.device)) for slot in self._after)
        return (*out, *runs, *after, *others)


class ExitLayer(_EndLayer):
    """Everything that comes after the last block."""

    def __init__(
        self, model: nn.Module, shape_model: nn.Module | None, call: ForwardCall, last: PassThroughStub
    ) -> None:
        """Take a copy of the model whose last block is `last`."""
        super().__init__(model, shape_model, call)
        self._last = last
        self._callers = [module for module in model.modules() if last in module.modules() and module is not last]

    def forward(self, payload: Payload) -> Tensor:
        """Map (hidden state, carried results, inputs) to the network's output.

        Sides between the two are ignored, so that a copy of this layer can judge the output of any block.
        """
        hidden, rest = ragged(payload, slots=self.travel.is_ragged)
        first_input = len(rest) - len(self._call.names)
        inputs = _with_values(rest[first_input:])
        # Code around the blocks reads shapes of its inputs (a mask's length); NaNs show if it reads more.
        rebuilt = [
            given if travels else torch.full(given.tolist(), torch.nan, dtype=dtype, device=given.device)
            for given, travels, dtype in zip(inputs, self.travel.inputs, self._call.dtypes, strict=True)
        ]
        self._take_carried(rest[:first_input])
        self._last.hidden = hidden
        # What the model draws before its blocks, the entry has drawn: here the stream goes on behind the blocks.
        self._last.called = random_position(hidden.device)
        try:
            with self._calling_all_blocks(), _creating_on(hidden):
                output = self._call.picked(self._run(rebuilt))
            if self._last.called is not None:
                raise UsageError(
                    "the model leaves out its last block, which ran when it was split; set what leaves blocks out "
                    "(layerdrop, stochastic depth of whole blocks) to 0 or less",
                    code="block-left-out",
                )
            return output
        finally:
            self._last.hidden = None  # the stub must not keep the graph alive
            self._last.called = None

    @contextmanager
    def _calling_all_blocks(self) -> Iterator[None]:
        """Make code that leaves out blocks in training call them all: the last one takes the hidden state."""
        modes = [module.training for module in self._callers]
        if self.travel.leaves_out:
            for module in self._callers:
                module.training = False
        try:
            yield
        finally:
            for module, mode in zip(self._callers, modes, strict=True):
                module.training = mode

    def _take_carried(self, before_inputs: Sequence[Tensor]) -> None:
        """Hand the results that have travelled to the stubs of their parts."""
        count = sum(leaf is TENSOR for result in self.travel.carried for leaf in result.leaves)
        tensors = iter(before_inputs[len(before_inputs) - count :])
        stubs = [self.model.get_submodule(result.part) for result in self.travel.carried]
        for stub in stubs:
            stub.results = []  # type: ignore[assignment]
        for stub, result in zip(stubs, self.travel.carried, strict=True):
            assert isinstance(stub, MissingPartStub)
            stub.results.append(result.result(tensors))


def _with_values(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return ones on the CPU for meta tensors: code around the blocks may look at values, which those have not."""
    return [torch.ones_like(tensor, device="cpu") if tensor.is_meta else tensor for tensor in inputs]


def _creating_on(hidden: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which the model creates tensors where its inputs are, not on the default device."""
    if hidden.is_nested:
        return nullcontext()  # torch's encoder makes no nested tensors in such a context, and could not undo this one
    return torch.device("cpu") if hidden.is_meta else hidden.device


def _slots(sides: Sequence[Side]) -> tuple[int, ...]:
    return tuple(side.slot for side in sides)
