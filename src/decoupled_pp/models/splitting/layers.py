"""The layers that a model is split into: what comes before its blocks, each block, and what comes after them.

    inputs -> Entry -> (hidden, sides.., inputs..) -> Block -> .. -> Block -> (hidden, inputs..) -> Exit -> output

Entry and Exit run the model's own `forward` in copies of it in which stubs stand for all that is elsewhere. An input
whose values the Exit does not need travels as its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Payload, as_tuple
from decoupled_pp.models.splitting.stubs import Noting, Passing, Reached, without_weights
from decoupled_pp.models.splitting.wiring import BlockWiring, Constant, Hidden, Wiring


class _End(nn.Module):
    """A copy of the model that is run by its own `forward`.

    Attributes:
        model: The copy.
        travels: For every input whether its values travel to the end, or its shape.
    """

    def __init__(
        self, model: nn.Module, sample: Mapping[str, Tensor], options: Mapping[str, Any], hollow: nn.Module | None
    ) -> None:
        super().__init__()
        self.model, self._options = model, dict(options)
        self._dtypes = {name: tensor.dtype for name, tensor in sample.items()}
        object.__setattr__(self, "_hollow", hollow)  # no part of it
        self.travels: tuple[bool, ...] = (True,) * len(sample)

    # Models behave otherwise under the compiler's tracer, and there is little to gain outside the blocks.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self, inputs: Sequence[Tensor]) -> Any:
        """The model's result; by shapes alone while it has no weights (the meta device)."""
        if len(inputs) != len(self._dtypes):
            raise UsageError(
                f"the network was split for {', '.join(self._dtypes)} and is given {len(inputs)} tensors; split it "
                "with a sample that has all of them"
            )
        hollow = self.__dict__["_hollow"]
        model = hollow if hollow is not None and without_weights(self) else self.model
        return model(**dict(zip(self._dtypes, inputs, strict=True)), **self._options)


class Entry(_End):
    """All that comes before the first block."""

    def __init__(  # noqa: PLR0917 - made in one place
        self,
        model: nn.Module,
        notes: Sequence[Noting],
        wiring: Wiring,
        sample: Mapping[str, Tensor],
        options: Mapping[str, Any],
        hollow: nn.Module | None = None,
    ) -> None:
        """Take a copy of the model whose blocks are `notes`.

        Args:
            model: The copy.
            notes: Its blocks.
            wiring: Of the blocks.
            sample: The model's inputs by name, in the order of the payload.
            options: Further arguments of the model's `forward`.
            hollow: Another copy in which stubs stand for more parts, to be run while `model` has no weights.
        """
        super().__init__(model, sample, options, hollow)
        self._notes, self._wiring = list(notes), wiring

    def forward(self, payload: Payload) -> Payload:
        """Inputs -> (hidden state, sides, inputs)."""
        inputs = as_tuple(payload)
        bare = inputs[0].is_meta
        with suppress(Reached):
            self._run([torch.ones_like(tensor, device="cpu") for tensor in inputs] if bare else inputs)
        given = []
        for note in self._notes:
            given.append(note.given or [])
            note.given = None
        hidden: Tensor = given[0][self._wiring.blocks[0].hidden_in]
        places = [self._wiring.origin[slot] for slot in self._wiring.live[0]]
        sides = [_packed(given[place[0]][place[1]], hidden.device) for place in places if place is not None]
        outgoing = (hidden, *sides, *map(_for_exit, inputs, self.travels))
        return tuple(tensor.to("meta") for tensor in outgoing) if bare else outgoing


class Rule:
    """How a model gives one of its parts fresh weights; copies of what holds it share it, and so the model."""

    def __init__(self, fill: Callable[[nn.Module], None]) -> None:
        """Take the function that fills a part in place, from torch's global generator."""
        self.fill = fill

    def __deepcopy__(self, _: object) -> Rule:
        return self


class Block(nn.Module):
    """One of the model's blocks: (hidden state, sides, inputs) -> the same.

    Attributes:
        rule: How the model makes its weights; None: each part of it by its own `reset_parameters`, if it has one.
    """

    rule: Rule | None = None

    def __init__(self, block: nn.Module, wiring: BlockWiring, before: Sequence[int], after: Sequence[int]) -> None:
        """Wrap a block.

        Args:
            block: The user's own.
            wiring: How it is called.
            before: Slots of the sides that come in.
            after: Slots of those that go out.
        """
        super().__init__()
        self.block, self._wiring = block, wiring
        self._before, self._after = tuple(before), tuple(after)

    @property
    def reset_parameters(self) -> Callable[[], None] | None:
        """Fresh weights in place, for critics that copy layers; None if the model has no rule for that."""
        rule, block = self.rule, self.block
        return None if rule is None else lambda: rule.fill(block)

    def forward(self, payload: Payload) -> Payload:
        """Call the block as the model would."""
        hidden, *rest = as_tuple(payload)
        sides = dict(zip(self._before, rest, strict=False))
        inputs = rest[len(self._before) :]
        leaves: list[Any] = []
        for leaf in self._wiring.leaves:
            if isinstance(leaf, Hidden):
                leaves.append(hidden)
            elif isinstance(leaf, Constant):
                leaves.append(leaf.value)
            else:
                leaves.append(_unpacked(sides[leaf.slot]))
        args, kwargs = pytree.tree_unflatten(leaves, self._wiring.form)
        made = pytree.tree_leaves(self.block(*args, **kwargs))
        sides |= {slot: made[place] for place, slot in self._wiring.makes}
        return (made[self._wiring.hidden_out], *(sides[slot] for slot in self._after), *inputs)


class Exit(_End):
    """All that comes after the last block."""

    def __init__(  # noqa: PLR0917 - made in one place
        self,
        model: nn.Module,
        last: Passing,
        sample: Mapping[str, Tensor],
        options: Mapping[str, Any],
        output: Callable[[Any], Tensor],
        hollow: nn.Module | None = None,
    ) -> None:
        """Take a copy of the model in which `last` is the last block and all before it are stubs.

        Args:
            model: The copy.
            last: Its last block, which gives out the hidden state that comes in.
            sample: The model's inputs by name: their dtypes.
            options: Further arguments of the model's `forward`.
            output: The tensor of its result that is the network's output.
            hollow: As for `Entry`.
        """
        super().__init__(model, sample, options, hollow)
        self._last, self._output = last, output

    def forward(self, payload: Payload) -> Tensor:
        """(hidden state, inputs) -> the network's output; sides between them are let go (a copy judges any block)."""
        hidden, *rest = as_tuple(payload)
        inputs = rest[len(rest) - len(self._dtypes) :]
        bare = hidden.is_meta
        if bare:
            inputs = [torch.ones_like(tensor, device="cpu") for tensor in inputs]
        rebuilt = [
            given if travels else torch.full(given.tolist(), torch.nan, dtype=dtype, device=given.device)
            for given, travels, dtype in zip(inputs, self.travels, self._dtypes.values(), strict=True)
        ]
        self._last.hidden = hidden
        try:
            with torch.device("cpu") if bare else hidden.device:
                return self._output(self._run(rebuilt))
        finally:
            self._last.hidden = None


def _for_exit(tensor: Tensor, travels: bool) -> Tensor:
    return tensor if travels else torch.tensor(tensor.shape, device=tensor.device)


def _packed(side: Tensor | None, device: torch.device) -> Tensor:
    """An optional side that is not there travels as an empty tensor."""
    return torch.empty(0, device=device) if side is None else side


def _unpacked(side: Tensor) -> Tensor | None:
    return None if side.shape == (0,) else side
