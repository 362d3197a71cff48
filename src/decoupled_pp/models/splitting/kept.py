"""One call of a module that a trace keeps whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.torch_private import is_without_data, pytree


@dataclass(frozen=True)
class Flag:
    """A truth about values, in the place of a bool among the arguments of a module: known only when the model runs.

    Attributes:
        value: A tensor of one bool.
    """

    value: Tensor

    def __bool__(self) -> bool:
        return bool(self.value)


def is_causal(mask: Tensor | None, known: bool | None = None, size: int | None = None) -> bool | Flag:
    """Return whether an attention mask is causal, as `nn.TransformerEncoder` and its like ask before their layers run.

    Args:
        mask: The mask.
        known: The answer, if the caller knows it; None: compare the mask.
        size: Its rows and columns; None: as it has.
    """
    if known is not None or mask is None:
        return known is True
    rows = mask.size(-2) if size is None else size
    causal = nn.Transformer.generate_square_subsequent_mask(rows, device=mask.device, dtype=mask.dtype)
    return Flag((mask == causal).all()) if mask.size() == causal.size() else False


@dataclass(frozen=True)
class Call:
    """One call of a module that is kept whole.

    Attributes:
        name: The module's.
        leaves: Leaves of its arguments; those given anew in every call (tensors, flags, sizes) by their class.
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
            elif leaf is Flag:
                flag = next(tensors_left)
                leaves.append(not is_without_data(flag) and bool(flag))
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
