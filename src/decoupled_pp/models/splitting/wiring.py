"""Works out, from one observed forward pass, what every block of a model is given and where that comes from.

Between two blocks travel the hidden state and *sides*: tensors that later blocks are given as well (attention masks,
rotary embeddings, a position bias that the first block has made). A side is recognised by being the same tensor object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.torch_private import pytree
from decoupled_pp.models.splitting.observe import Call


@dataclass(frozen=True)
class Hidden:
    """A leaf that is the hidden state."""


@dataclass(frozen=True)
class Side:
    """A leaf that is a side; `slot` is its number."""

    slot: int


@dataclass(frozen=True)
class Constant:
    """A leaf that is no tensor, and the same in every call."""

    value: Any


Leaf: TypeAlias = Hidden | Side | Constant

_TENSOR = object()
"""Stands for a tensor among the leaves of a result."""


@dataclass(frozen=True)
class BlockWiring:
    """Describes how one block is called.

    Attributes:
        form: How the leaves make up (args, kwargs).
        leaves: A description of each leaf.
        hidden_in: Index of the leaf that is the hidden state.
        result_form: How the leaves of its result make up the result.
        result_leaves: Leaves of the result that are no tensors; `_TENSOR` in place of a tensor.
        hidden_out: Index of the leaf of the result that is the hidden state.
        makes: (leaf of the result, slot) of every side that it makes.
    """

    form: pytree.TreeSpec
    leaves: tuple[Leaf, ...]
    hidden_in: int
    result_form: pytree.TreeSpec
    result_leaves: tuple[Any, ...]
    hidden_out: int
    makes: tuple[tuple[int, int], ...]

    def __deepcopy__(self, memo: object) -> BlockWiring:
        """Return itself: nothing in it changes, and copies of layers are made often."""
        return self

    def result(self, hidden: Tensor, stand_in: Tensor) -> Any:
        """Return a result as the block would, with this hidden state and a stand-in for all other tensors."""
        leaves = [stand_in if leaf is _TENSOR else leaf for leaf in self.result_leaves]
        leaves[self.hidden_out] = hidden
        return pytree.tree_unflatten(leaves, self.result_form)


@dataclass(frozen=True)
class Wiring:
    """Describes how all blocks are called.

    Attributes:
        blocks: The wiring of each.
        origin: For every slot (block, leaf) where the side is first given; None if a block makes it.
        live: For every block the slots that must travel to it: those that it or a later one is given, and that were
            there before.
    """

    blocks: tuple[BlockWiring, ...]
    origin: tuple[tuple[int, int] | None, ...]
    live: tuple[tuple[int, ...], ...]

    def __deepcopy__(self, memo: object) -> Wiring:
        """Return itself: nothing in it changes."""
        return self


class _Sides:
    """Numbers the sides of blocks in the order in which they are given.

    Attributes:
        slots: id of a tensor -> its slot; ids are unique because the observed calls keep their tensors alive.
        origin: See `Wiring`.
        maker: id of a tensor -> the first block that returned it.
    """

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}
        self.origin: list[tuple[int, int] | None] = []
        self.maker: dict[int, int] = {}

    def leaves(self, block: int, call: Call, hidden_in: int) -> tuple[Leaf, ...]:
        """Return what the leaves of a block's arguments are; call it block by block, in order."""
        leaves: list[Leaf] = []
        for place, leaf in enumerate(call.given):
            if place == hidden_in:
                leaves.append(Hidden())
            elif not isinstance(leaf, Tensor):
                leaves.append(Constant(leaf))
            else:
                if id(leaf) not in self.slots:
                    self.slots[id(leaf)] = len(self.origin)
                    self.origin.append(None if id(leaf) in self.maker else (block, place))
                leaves.append(Side(self.slots[id(leaf)]))
        for leaf in call.made:
            if isinstance(leaf, Tensor):
                self.maker.setdefault(id(leaf), block)
        return tuple(leaves)

    def made_by(self, block: int, call: Call) -> tuple[tuple[int, int], ...]:
        """Return (leaf of the result, slot) of every side that a block makes."""
        makes = []
        for place, leaf in enumerate(call.made):
            if isinstance(leaf, Tensor) and id(leaf) in self.slots and self.maker[id(leaf)] == block:
                makes.append((place, self.slots[id(leaf)]))
        return tuple(makes)


def wire(calls: Sequence[Call], names: Sequence[str]) -> Wiring:
    """Work out the wiring of blocks that were called once each, in order.

    Args:
        calls: The calls of the blocks.
        names: Names of the blocks, for errors.

    Raises:
        UsageError: A block is not given what the one before it made.
    """
    passes = [
        _hidden_between(before, after, name) for before, after, name in zip(calls, calls[1:], names[1:], strict=False)
    ]
    # The last block has no successor, and the first no predecessor: they are taken to be like their neighbours.
    hidden_out = [out for out, _ in passes] + [passes[-1][0]]
    hidden_in = [passes[0][1]] + [into for _, into in passes]
    sides = _Sides()
    leaves = [sides.leaves(block, call, hidden_in[block]) for block, call in enumerate(calls)]
    blocks = []
    for block, call in enumerate(calls):
        assert call.made_form is not None
        blocks.append(
            BlockWiring(
                form=call.given_form,
                leaves=leaves[block],
                hidden_in=hidden_in[block],
                result_form=call.made_form,
                result_leaves=tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in call.made),
                hidden_out=hidden_out[block],
                makes=sides.made_by(block, call),
            )
        )
    return Wiring(tuple(blocks), tuple(sides.origin), _live_slots(blocks, sides.origin))


def _hidden_between(before: Call, after: Call, name: str) -> tuple[int, int]:
    """Return which leaf of a block's result is the hidden state, and which leaf of the next block's arguments."""
    made = {id(leaf): place for place, leaf in enumerate(before.made) if isinstance(leaf, Tensor)}
    for place, leaf in enumerate(after.given):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and id(leaf) in made:
            return made[id(leaf)], place
    raise UsageError(
        f"block {name!r} is not given what the block before it returned: the model computes something between them; "
        "pass its layers as a list, or trace it",
        code="blocks-not-chained",
    )


def _live_slots(blocks: Sequence[BlockWiring], origin: Sequence[object]) -> tuple[tuple[int, ...], ...]:
    """Return for every block the slots that must travel to it (see `Wiring.live`)."""
    live: list[list[int]] = [[] for _ in blocks]
    for slot in range(len(origin)):
        first = _maker(slot, blocks) if origin[slot] is None else -1
        last = max(index for index, block in enumerate(blocks) if Side(slot) in block.leaves)
        for index in range(first + 1, last + 1):
            live[index].append(slot)
    return tuple(tuple(slots) for slots in live)


def _maker(slot: int, blocks: Sequence[BlockWiring]) -> int:
    """Return the block that makes a side."""
    return min(index for index, block in enumerate(blocks) if any(made == slot for _, made in block.makes))
