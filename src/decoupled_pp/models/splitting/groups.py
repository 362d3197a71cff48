"""Makes blocks of groups of modules: pairs or dictionaries in an `nn.ModuleList`, which a loop in a `forward` calls.

    for attention, mlp in self.layers:      # the holder of the list has this loop
        x = attention(x) + x
        x = mlp(x) + x
    return self.norm(x)

One round of the loop is run by the holder's own `forward`, on a list that ends behind the group; what comes behind the
loop by its `forward` on an empty list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.torch_private import child_modules, own_parameters, pytree
from decoupled_pp.models.splitting.stubs import MissingPartStub, copy_replacing, nan_like


class _NextRound(Exception):
    """Raised by the first call of the next round of the loop, with what it is given."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _NextGroup(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _NextRound(_hidden((args, kwargs)))


class GroupBlock(nn.Module):
    """One round of the loop: takes what its holder takes, and returns the hidden state.

    Attributes:
        group: The model's own modules of this round.
    """

    def __init__(self, holder: nn.Module, groups: nn.ModuleList, index: int) -> None:
        super().__init__()
        group = groups[index]
        self.group = group
        after = _like(group)
        stubs: dict[Any, Any] = {groups: nn.ModuleList([group, after])}
        for child in holder.children():  # what the loop takes of them would be in every stage
            if child is not groups and next(child.parameters(), None) is not None:
                stubs[child] = MissingPartStub(child)
        stubs |= {own: nan_like(own.detach()) for own in own_parameters(holder).values() if own is not None}
        # nn.Module would register it as a submodule, and the group would appear twice in state_dict().
        object.__setattr__(self, "_holder", _copied(holder, stubs))

    def train(self, mode: bool = True) -> GroupBlock:
        """Set the mode, also of the code of the loop."""
        self.__dict__["_holder"].train(mode)
        super().train(mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one round of the loop."""
        try:
            self.__dict__["_holder"](*args, **kwargs)
        except _NextRound as end:
            return end.hidden
        raise UsageError(
            f"the loop over groups of modules in {type(self.__dict__['_holder']).__name__} ends before its next group; "
            "make each group a module with a forward of its own",
            code="groups-not-chained",
        )


class Grouped(nn.Module):
    """A holder of groups as blocks in an `nn.ModuleList`.

    Attributes:
        blocks: One for each group.
        tail: The holder with an empty list: what comes behind the loop.
    """

    def __init__(self, holder: nn.Module, groups: nn.ModuleList) -> None:
        super().__init__()
        self.training = holder.training
        self.blocks = nn.ModuleList(GroupBlock(holder, groups, index) for index in range(len(groups)))
        kept: dict[Any, Any] = {child: child for child in holder.children()}
        kept |= {own: own for own in own_parameters(holder).values() if own is not None}
        self.tail = _copied(holder, {**kept, groups: nn.ModuleList()})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the rounds of the loop one after another, and what comes behind them."""
        leaves, form = pytree.tree_flatten((args, kwargs))
        place = next(index for index, leaf in enumerate(leaves) if _is_hidden(leaf))
        for block in self.blocks:
            args, kwargs = pytree.tree_unflatten(leaves, form)
            leaves[place] = block(*args, **kwargs)
        args, kwargs = pytree.tree_unflatten(leaves, form)
        return self.tail(*args, **kwargs)


def with_blocks_of_groups(model: nn.Module, blocks: Mapping[str, nn.Module]) -> tuple[nn.Module, dict[str, str]]:
    """Return a copy of the model, of the same modules, whose groups are blocks; and beginnings of names -> its own.

    A model whose blocks are modules with a `forward` is returned as it is.

    Raises:
        UsageError: The loop is in the model itself, or begins with other code.
    """
    first = next(iter(blocks))
    if not isinstance(blocks[first], nn.ModuleList | nn.ModuleDict):
        return model, {}
    list_name = first.rpartition(".")[0]
    holder_name, _, key = list_name.rpartition(".")
    if not holder_name:
        raise UsageError(
            f"the groups of modules in {list_name!r} are called by the code of the model itself; make each group a "
            "module with a forward of its own",
            code="groups-not-chained",
        )
    holder = model.get_submodule(holder_name)
    grouped = Grouped(holder, child_modules(holder)[key])  # type: ignore[arg-type]
    around = {part: part for name, part in model.named_modules() if _is_beside(name, holder_name)}
    tensors = {tensor: tensor for tensor in (*model.parameters(), *model.buffers())}
    renamed = {f"{holder_name}.tail.": f"{holder_name}."}
    for index in range(len(blocks)):
        renamed[f"{holder_name}.blocks.{index}.group."] = f"{list_name}.{index}."
    return copy_replacing(model, {**around, **tensors, holder: grouped}), renamed


def _is_beside(name: str, holder: str) -> bool:
    """Return whether a module is a child of one of the holder's parents, and not one of them itself."""
    parent = name.rpartition(".")[0]
    is_above = holder == name or holder.startswith(f"{name}.") or not name
    return not is_above and (not parent or holder.startswith(f"{parent}."))


def _copied(holder: nn.Module, replacements: Mapping[Any, Any]) -> nn.Module:
    copied = copy_replacing(
        holder, {old: new for old, new in replacements.items() if not isinstance(old, nn.Parameter)}
    )
    for name, parameter in own_parameters(holder).items():
        if parameter is None:
            continue
        own_parameters(copied).pop(name)
        new = replacements[parameter]
        if isinstance(new, nn.Parameter):
            copied.register_parameter(name, new)
        else:
            copied.register_buffer(name, new, persistent=False)
    return copied


def _like(group: nn.Module) -> nn.Module:
    """Return a container like a group whose modules tell that the next round has begun."""
    if isinstance(group, nn.ModuleDict):
        return nn.ModuleDict({name: _NextGroup() for name in group})
    return nn.ModuleList(
        _NextGroup() if child is not None else nn.Identity() for child in child_modules(group).values()
    )


def _hidden(arguments: Any) -> Tensor:
    found: Tensor = next(leaf for leaf in pytree.tree_leaves(arguments) if _is_hidden(leaf))
    return found


def _is_hidden(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
