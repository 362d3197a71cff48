"""The layers that a model is split into: what comes before its blocks, each block, and what comes after them.

    inputs -> entry -> (hidden, sides.., inputs..) -> block -> .. -> block -> (hidden, inputs..) -> exit -> output

Entry and exit run the model's own `forward` in copies of it in which stubs stand for all that is elsewhere. An input
whose values the exit does not need travels as its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.device import on_meta
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Payload, as_tuple
from decoupled_pp.core.torch_private import pytree
from decoupled_pp.models.splitting.stubs import AllBlocksCalled, PassThroughStub, RecordingStub
from decoupled_pp.models.splitting.wiring import Side, Wiring


@dataclass(frozen=True)
class ForwardCall:
    """Says how a model is called."""

    sample: Mapping[str, Tensor]  # an input micro-batch by argument name
    options: Mapping[str, Any]  # further arguments
    output: Callable[[Any], Tensor]  # picks the network's output from the result


class _EndLayer(nn.Module):
    """A copy of the model, with stubs, that is run by its own `forward`.

    Attributes:
        model: The copy.
        travels: For every input whether its values travel to the exit, or only its shape.
    """

    def __init__(self, model: nn.Module, shape_model: nn.Module | None, call: ForwardCall) -> None:
        """Take the copy, and one with stubs in more places, which is run while `model` has no weights."""
        super().__init__()
        self.model = model
        self.travels: tuple[bool, ...] = (True,) * len(call.sample)
        self._options = dict(call.options)
        self._dtypes = {name: tensor.dtype for name, tensor in call.sample.items()}
        # nn.Module would register it as a submodule, and its parameters would appear in state_dict().
        object.__setattr__(self, "_shape_model", shape_model)

    # Models behave otherwise under the compiler's tracer, and there is little to gain outside the blocks.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self, inputs: Sequence[Tensor]) -> Any:
        """Return the model's result; while it has no weights (the meta device), a result of the right shape."""
        if len(inputs) != len(self._dtypes):
            raise UsageError(
                f"the network was split for {', '.join(self._dtypes)} and is given {len(inputs)} tensors; split it "
                "with a sample that has all of them",
                code="split-for-other-inputs",
            )
        shape_model = self.__dict__["_shape_model"]
        model = shape_model if shape_model is not None and on_meta(self) else self.model
        return model(**dict(zip(self._dtypes, inputs, strict=True)), **self._options)


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
        self._outgoing = [(0, wiring.blocks[0].hidden_in), *(side.origin for side in wiring.travelling(0))]

    def forward(self, payload: Payload) -> Payload:
        """Map inputs to (hidden state, sides, inputs)."""
        inputs = as_tuple(payload)
        meta = inputs[0].is_meta
        # The last stub raises: what the model does after its blocks belongs to the exit, and is not run here.
        with suppress(AllBlocksCalled):
            self._run(_with_values(inputs))
        recorded = []
        for stub in self._stubs:
            recorded.append(stub.given)
            stub.given = []  # a stub must not keep the activations of this micro-batch alive
        hidden, *sides = (recorded[block][place] for block, place in self._outgoing)
        outgoing: list[Tensor] = [hidden]
        for side in sides:  # a payload holds tensors only, so None travels as an empty one
            outgoing.append(torch.empty(0, device=hidden.device) if side is None else side)
        for tensor, travels in zip(inputs, self.travels, strict=False):
            outgoing.append(tensor if travels else torch.tensor(tensor.shape, device=tensor.device))
        return tuple(tensor.to("meta") for tensor in outgoing) if meta else tuple(outgoing)


class Initialiser:
    """Gives parts of a model fresh weights, as the model's library does: `fill` draws from torch's global generator."""

    def __init__(self, fill: Callable[[nn.Module], None]) -> None:
        self.fill = fill

    def __deepcopy__(self, _: object) -> Initialiser:
        """Return itself: `fill` holds the whole model, which a copy of one block must not copy along."""
        return self


class BlockLayer(nn.Module):
    """One of the model's blocks: (hidden state, sides, inputs) -> (hidden state, sides, inputs).

    Attributes:
        block: The model's own block.
        initialiser: How the model makes its weights; None: each part of it by its own `reset_parameters`, if any.
    """

    initialiser: Initialiser | None = None

    def __init__(self, block: nn.Module, wiring: Wiring, index: int) -> None:
        super().__init__()
        self.block = block
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
        hidden, *rest = as_tuple(payload)
        sides = dict(zip(self._before, rest, strict=False))  # the rest of `rest` are the inputs
        inputs = rest[len(self._before) :]
        given = {slot: None if side.shape == (0,) else side for slot, side in sides.items()}
        args, kwargs = self._wiring.arguments(hidden, given)
        # Library blocks return a tensor, a tuple or a dataclass; the wiring knows the places among the leaves.
        made = pytree.tree_leaves(self.block(*args, **kwargs))
        sides |= {slot: made[place] for place, slot in self._wiring.makes}
        return (made[self._wiring.hidden_out], *(sides[slot] for slot in self._after), *inputs)


class ExitLayer(_EndLayer):
    """Everything that comes after the last block."""

    def __init__(
        self, model: nn.Module, shape_model: nn.Module | None, call: ForwardCall, last: PassThroughStub
    ) -> None:
        """Take a copy of the model whose last block is `last`."""
        super().__init__(model, shape_model, call)
        self._last = last
        self._output = call.output

    def forward(self, payload: Payload) -> Tensor:
        """Map (hidden state, inputs) to the network's output.

        Sides between the two are ignored, so that a copy of this layer can judge the output of any block.
        """
        hidden, *rest = as_tuple(payload)
        inputs = _with_values(rest[len(rest) - len(self._dtypes) :])
        # Code around the blocks reads shapes of its inputs (a mask's length); NaNs show if it reads more.
        rebuilt = [
            given if travels else torch.full(given.tolist(), torch.nan, dtype=dtype, device=given.device)
            for given, travels, dtype in zip(inputs, self.travels, self._dtypes.values(), strict=True)
        ]
        self._last.hidden = hidden
        try:
            # The model may create tensors; it would create them on the default device, not where its inputs are.
            with torch.device("cpu") if hidden.is_meta else hidden.device:
                return self._output(self._run(rebuilt))
        finally:
            self._last.hidden = None  # the stub must not keep the graph alive


def _with_values(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return ones on the CPU for meta tensors: code around the blocks may look at values, which those have not."""
    return [torch.ones_like(tensor, device="cpu") if tensor.is_meta else tensor for tensor in inputs]


def _slots(sides: Sequence[Side]) -> tuple[int, ...]:
    return tuple(side.slot for side in sides)
