"""One call of a module that a trace keeps whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.torch_private import pytree


@dataclass(frozen=True)
class Call:
    """One call of a module that is kept whole.

    Attributes:
        name: The module's.
        leaves: Leaves of its arguments; those that are tensors or sizes are given anew in every call.
        form: How the leaves make (args, kwargs).
    """

    name: str
    leaves: tuple[Any, ...]
    form: Any

    def __call__(self, module: nn.Module, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Any:
        """Call the module as the model does."""
        tensors_left = iter(tensors)
        sizes_left = iter(sizes)
        leaves: list[Any] = []
        for leaf in self.leaves:
            if leaf is Tensor:
                leaves.append(next(tensors_left))
            elif leaf is torch.SymInt:
                leaves.append(next(sizes_left))
            elif isinstance(leaf, torch.device) and tensors:
                leaves.append(tensors[0].device)  # where the model runs now, not where it was traced
            else:
                leaves.append(leaf)
        args, kwargs = pytree.tree_unflatten(leaves, self.form)
        return module(*args, **kwargs)


def invoke(call: Call, module: nn.Module, tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Call a kept module and return the tensors of its result."""
    result = call(module, tensors, sizes)
    if isinstance(result, Tensor):
        return [result]
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
