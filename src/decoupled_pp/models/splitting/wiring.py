"""Works out, from one observed forward pass, what every block of a model is given and where that comes from.

Between two blocks travel the hidden state and *sides*: tensors that later blocks are given as well (attention masks,
rotary embeddings, a position bias that the first block has made). A side is recognised by being the same tensor object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, empty

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.torch_private import pytree
from decoupled_pp.models.splitting.observe import Call

TENSOR = object()
"""Stands for a tensor among the leaves of a call."""


@dataclass(frozen=True)
class BlockWiring:
    """Describes how one block is called; a place is the index of a leaf of its arguments or of its result."""

    given: tuple[Any, ...]  # its arguments: constants, and TENSOR for each tensor
    given_form: pytree.TreeSpec
    hidden_in: int  # place of the hidden state
    sides: tuple[tuple[int, int], ...]  # (place, slot) of every side that it is given
    made: tuple[Any, ...]  # its result, in the same way
    made_form: pytree.TreeSpec
    hidden_out: int
    makes: tuple[tuple[int, int], ...]  # (place, slot) of every side that it makes

    def __deepcopy__(self, memo: object) -> BlockWiring:
        """Return itself: nothing in it changes, and copies of layers are made often."""
        return self

    def arguments(self, hidden: Tensor, sides: Mapping[int, Tensor | None]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return args and kwargs for the block; `sides` holds a tensor, or None, for each slot."""
        leaves = list(self.given)
        leaves[self.hidden_in] = hidden
        for place, slot in self.sides:
            leaves[place] = sides[slot]
        args, kwargs = pytree.tree_unflatten(leaves, self.given_form)
        return args, kwargs

    def result(self, hidden: Tensor) -> Any:
        """Return a result as the block would, with this hidden state and all other tensors empty."""
        leaves = [empty(0) if leaf is TENSOR else leaf for leaf in self.made]
        leaves[self.hidden_out] = hidden
        return pytree.tree_unflatten(leaves, self.made_form)


@dataclass
class Side:
    """A tensor that blocks are given beside the hidden state; blocks are counted from 0."""

    slot: int
    maker: int  # the block that makes it; -1: the model does, before its blocks
    places: list[tuple[int, int]]  # (block, place) of each block that is given it

    @property
    def last(self) -> int:
        """The last block that is given it."""
        return self.places[-1][0]


@dataclass(frozen=True)
class Wiring:
    """Describes how all blocks are called."""

    blocks: tuple[BlockWiring, ...]
    sides: tuple[Side, ...]

    def travelling(self, block: int) -> list[Side]:
        """Return the sides that must travel to a block: there before it, and given to it or to a later one."""
        return [side for side in self.sides if side.maker < block <= side.last]


def wire(calls: Sequence[Call], names: Sequence[str]) -> Wiring:
    """Work out the wiring of blocks, from their calls (one of each, in order) and their names (for errors)."""
    passes = [
        _hidden_between(before, after, name) for before, after, name in zip(calls, calls[1:], names[1:], strict=False)
    ]
    # The last block has no successor, and the first no predecessor: they are taken to be like their neighbours.
    hidden_out = [out for out, _ in passes] + [passes[-1][0]]
    hidden_in = [passes[0][1]] + [into for _, into in passes]
    # Both by the id of a tensor: ids are unique, because the observed calls keep their tensors alive.
    sides: dict[int, Side] = {}
    makers: dict[int, int] = {}
    for block, call in enumerate(calls):
        for place, key in _tensors(call.given):
            if place != hidden_in[block]:
                side = sides.setdefault(key, Side(len(sides), makers.get(key, -1), []))
                side.places.append((block, place))
        for _, key in _tensors(call.made):
            makers.setdefault(key, block)
    blocks = []
    for block, call in enumerate(calls):
        taken = [(place, key) for place, key in _tensors(call.given) if place != hidden_in[block]]
        made = [(place, key) for place, key in _tensors(call.made) if key in sides and makers[key] == block]
        blocks.append(
            BlockWiring(
                given=_without_tensors(call.given),
                given_form=call.given_form,
                hidden_in=hidden_in[block],
                sides=tuple((place, sides[key].slot) for place, key in taken),
                made=_without_tensors(call.made),
                made_form=call.made_form,
                hidden_out=hidden_out[block],
                makes=tuple((place, sides[key].slot) for place, key in made),
            )
        )
    return Wiring(tuple(blocks), tuple(sides.values()))


def _tensors(leaves: Sequence[Any]) -> list[tuple[int, int]]:
    """Return (place, id) of every tensor."""
    return [(place, id(leaf)) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]


def _without_tensors(leaves: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def _hidden_between(before: Call, after: Call, name: str) -> tuple[int, int]:
    """Return the place of the hidden state in a block's result, and in the next block's arguments."""
    made = {key: place for place, key in _tensors(before.made)}
    for place, leaf in enumerate(after.given):
        # The first floating one: integers that pass from block to block are positions or masks.
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and id(leaf) in made:
            return made[id(leaf)], place
    raise UsageError(
        f"block {name!r} is not given what the block before it returned: the model computes something between them; "
        "let a module compute it, or pass the layers as a list",
        code="blocks-not-chained",
    )
