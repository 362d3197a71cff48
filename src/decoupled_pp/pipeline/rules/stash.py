"""Copies the weights and buffers of layers, and writes copies back into them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from decoupled_pp.core.structures import write


class Stash:
    """Copies of the weights of layers; those of one version are made once."""

    def __init__(self, trunk: nn.Module) -> None:
        self._trunk = trunk
        self._version: int | None = None
        self._weights: dict[str, Tensor] = {}

    def forget(self) -> None:
        """Make a new copy at the next call, whatever the version."""
        self._version = None

    def weights(self, version: int) -> dict[str, Tensor]:
        """Return the weights that learn, by name; `version` is another number once they have changed."""
        if self._version != version:
            learn = {name: p for name, p in self._trunk.named_parameters() if p.requires_grad}
            self._weights = {name: parameter.detach().clone() for name, parameter in learn.items()}
            self._version = version
        return self._weights


def copies_of_buffers(trunk: nn.Module) -> dict[str, Tensor]:
    """Return copies of the buffers of layers, by name."""
    # Of all: torch changes batch statistics without raising the tensors' versions, and comparing waits for a GPU.
    return {name: buffer.detach().clone() for name, buffer in trunk.named_buffers()}


def put_buffers(trunk: nn.Module, copies: Mapping[str, Tensor]) -> None:
    """Write copies into the buffers of layers."""
    _put(dict(trunk.named_buffers()), copies)


def put_weights(trunk: nn.Module, copies: Mapping[str, Tensor]) -> None:
    """Write copies into the weights of layers."""
    _put(dict(trunk.named_parameters()), copies)


@torch.no_grad()
def _put(owned: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> None:
    for name, copy in copies.items():
        write(owned[name].data, copy)  # `data`: no graph that saved the tensor is to see a change
