"""What every block of a model is given, and where that comes from: worked out from one observed forward pass.

Between two blocks travel the hidden state and *sides*, tensors that later blocks are given as well (attention masks,
rotary embeddings, a position bias that the first block has made). A side is recognised by being the same tensor object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils import _pytree as pytree

from decoupled_pp.core.errors import UsageError
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


@dataclass(frozen=True)
class BlockWiring:
    """How a block is called.

    Attributes:
        form: How the leaves make up (args, kwargs).
        leaves: What each of them is.
        hidden_in: Which leaf is the hidden state.
        made: How the leaves of its result make it up, and those of them that are no tensors.
        hidden_out: Which leaf of the result is the hidden state.
        makes: (leaf of the result, slot) of every side that it makes.
    """

    form: pytree.TreeSpec
    leaves: tuple[Leaf, ...]
    hidden_in: int
    made: tuple[pytree.TreeSpec, tuple[Any, ...]]
    hidden_out: int
    makes: tuple[tuple[int, int], ...]

    def __deepcopy__(self, memo: object) -> BlockWiring:
        """Itself: nothing in it changes."""
        return self

    def result(self, hidden: Tensor, stand_in: Tensor | None = None) -> Any:
        """A result as the block would give it, with this hidden state and a stand-in for all other tensors."""
        form, plain = self.made
        leaves = [stand_in if leaf is _TENSOR else leaf for leaf in plain]
        leaves[self.hidden_out] = hidden
        return pytree.tree_unflatten(leaves, form)


_TENSOR = object()
"""Stands for a tensor among the leaves of a result."""


@dataclass(frozen=True)
class Wiring:
    """Of all blocks.

    Attributes:
        blocks: One for each.
        origin: For every slot (block, leaf) where the side is first given; None if a block makes it.
        live: For every block the slots that must travel to it: those that it or a later one is given, and that were
            there before.
    """

    blocks: tuple[BlockWiring, ...]
    origin: tuple[tuple[int, int] | None, ...]
    live: tuple[tuple[int, ...], ...]

    def __deepcopy__(self, memo: object) -> Wiring:
        """Itself: nothing in it changes."""
        return self


def wire(calls: Sequence[Call], names: Sequence[str]) -> Wiring:
    """The wiring of blocks that were called once each, in order.

    Args:
        calls: Of the blocks.
        names: Of the blocks, for errors.

    Raises:
        UsageError: A block is not given what the one before it made.
    """
    ways = [_way(a, b, name) for a, b, name in zip(calls, calls[1:], names[1:], strict=False)]
    outs = [out for out, _ in ways] + [ways[-1][0]]
    ins = [ways[0][1]] + [into for _, into in ways]
    slots: dict[int, int] = {}
    origin: list[tuple[int, int] | None] = []
    made_at: dict[int, int] = {}
    leaves: list[tuple[Leaf, ...]] = []
    for block, call in enumerate(calls):
        row: list[Leaf] = []
        for place, leaf in enumerate(call.given):
            if place == ins[block]:
                row.append(Hidden())
            elif isinstance(leaf, Tensor):
                if id(leaf) not in slots:
                    slots[id(leaf)] = len(origin)
                    origin.append(None if id(leaf) in made_at else (block, place))
                row.append(Side(slots[id(leaf)]))
            else:
                row.append(Constant(leaf))
        leaves.append(tuple(row))
        for leaf in call.made:
            if isinstance(leaf, Tensor):
                made_at.setdefault(id(leaf), block)
    blocks = tuple(
        BlockWiring(
            form=call.given_form,
            leaves=leaves[block],
            hidden_in=ins[block],
            made=_plain(call),
            hidden_out=outs[block],
            makes=tuple(
                (place, slots[id(leaf)])
                for place, leaf in enumerate(call.made)
                if isinstance(leaf, Tensor) and id(leaf) in slots and made_at[id(leaf)] == block
            ),
        )
        for block, call in enumerate(calls)
    )
    first = [_first(slot, blocks, origin) for slot in range(len(origin))]
    last = [max(b for b, one in enumerate(blocks) if Side(slot) in one.leaves) for slot in range(len(origin))]
    live = tuple(
        tuple(slot for slot in range(len(origin)) if first[slot] < block <= last[slot]) for block in range(len(blocks))
    )
    return Wiring(blocks, tuple(origin), live)


def _first(slot: int, blocks: Sequence[BlockWiring], origin: Sequence[object]) -> int:
    """The block that makes a side; -1 if it is there from the beginning."""
    if origin[slot] is not None:
        return -1
    return min(block for block, one in enumerate(blocks) if any(made == slot for _, made in one.makes))


def _way(before: Call, after: Call, name: str) -> tuple[int, int]:
    """Which leaf of a block's result is the hidden state, and which leaf of what the next is given."""
    made = {id(leaf): place for place, leaf in enumerate(before.made) if isinstance(leaf, Tensor)}
    for place, leaf in enumerate(after.given):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and id(leaf) in made:
            return made[id(leaf)], place
    raise UsageError(
        f"block {name!r} is not given what the block before it returned: the model computes something between them; "
        "pass its layers as a list, or trace it"
    )


def _plain(call: Call) -> tuple[pytree.TreeSpec, tuple[Any, ...]]:
    assert call.made_form is not None
    return call.made_form, tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in call.made)
