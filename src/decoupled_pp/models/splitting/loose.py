"""Parameters and buffers of the model itself, in none of its parts: class tokens, position tables, projections."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from decoupled_pp.core.torch_private import non_persistent_buffers, own_buffers, own_parameters
from decoupled_pp.models.splitting.stubs import nan_like


@dataclass(frozen=True)
class LooseTensor:
    """A loose tensor, which the copy of the model before the blocks has, or the one after them.

    Attributes:
        name: Its name in the model.
        tensor: The tensor.
        is_persistent: True if it is in the model's state.
        ends: The copies before and after the blocks.
    """

    name: str
    tensor: Tensor
    is_persistent: bool
    ends: tuple[nn.Module, nn.Module]

    def place(self, *, entry: bool, exit: bool) -> None:
        """Give it to ends; another has NaNs in its place, which show if it uses them."""
        for end, has_it in zip(self.ends, (entry, exit), strict=True):
            holder_name, _, key = self.name.rpartition(".")
            holder = end.get_submodule(holder_name)
            own_parameters(holder).pop(key, None)
            own_buffers(holder).pop(key, None)
            non_persistent_buffers(holder).discard(key)
            if has_it and isinstance(self.tensor, nn.Parameter):
                holder.register_parameter(key, self.tensor)
            else:
                tensor = self.tensor if has_it else nan_like(self.tensor.detach())
                holder.register_buffer(key, tensor, persistent=has_it and self.is_persistent)


def loose_tensors(
    model: nn.Module, parts: Iterable[nn.Module], ends: tuple[nn.Module, nn.Module]
) -> tuple[LooseTensor, ...]:
    """Return the parameters and buffers of the model that are in none of the parts."""
    held = {id(tensor) for part in parts for tensor in (*part.parameters(), *part.buffers())}
    found = []
    for name, module in model.named_modules():
        for key, tensor in (*own_parameters(module).items(), *own_buffers(module).items()):
            if tensor is not None and id(tensor) not in held:
                full_name = f"{name}.{key}" if name else key
                found.append(LooseTensor(full_name, tensor, key not in non_persistent_buffers(module), ends))
    return tuple(found)
