"""Defines a network as a list of layers, and the plan that cuts it into stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.packets import Payload
from decoupled_pp.core.torch_private import child_modules


class Weights(ABC):
    """The weights of a network that was built on the meta device."""

    @abstractmethod
    def fill(self, part: nn.Module, device: torch.device) -> None:
        """Give storage and content to layers of the network, under their names in it."""


class Layers(nn.Sequential):
    """Layers under names that may contain dots, as in the user's own, nested network.

    Attributes:
        places: Boundaries where the network may be cut (`cut_after`); None: anywhere.
        weights: Fills layers that are on the meta device, stage by stage; None: they have their weights.
        tied: Key of a parameter that was tied before the network was split -> key of the one it was tied to.
        own_names: Key in the model that the layers were made of -> key here; exports use the former. Empty: alike.
    """

    places: tuple[int, ...] | None = None
    weights: Weights | None = None
    tied: Mapping[str, str] = MappingProxyType({})
    own_names: Mapping[str, str] = MappingProxyType({})

    def __init__(self, named: Iterable[tuple[str, nn.Module]] = ()) -> None:
        super().__init__()
        child_modules(self).update(named)  # add_module refuses dots

    def _load_from_state_dict(  # noqa: PLR0917 - torch's own signature
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, False, missing, unexpected, errors)
        known = tuple(f"{prefix}{name}." for name in child_modules(self))
        if strict:  # done here, because torch compares only the part of a key before its first dot
            unexpected += [key for key in state_dict if key.startswith(prefix) and not key.startswith(known)]


@dataclass(frozen=True)
class Plan:
    """A network and where it is cut. Built by `dpp.partition`; stages are contiguous runs of layers.

    Attributes:
        module: The whole network: the user's own layers under their own names.
        boundaries: Index of the first layer of every stage, then the number of layers: strictly increasing,
            `len(boundaries) == stages + 1`, `boundaries[0] == 0`.
        sample: An input micro-batch (fixes shapes for critics and measurements).
        layer_seconds: Measured forward + backward seconds of every layer, or None if not measured.
        critic_seconds: Measured forward + backward seconds of the critic of every cut stage, or None.
    """

    module: nn.Sequential
    boundaries: tuple[int, ...]
    sample: Payload
    layer_seconds: tuple[float, ...] | None = None
    critic_seconds: tuple[float, ...] | None = None

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.boundaries) - 1

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the layers in order, as in the user's module."""
        return tuple(name for name, _ in self.module.named_children())

    @property
    def sizes(self) -> tuple[int, ...]:
        """Layers per stage."""
        return tuple(b - a for a, b in zip(self.boundaries[:-1], self.boundaries[1:], strict=True))

    def stage_module(self, stage: int) -> nn.Sequential:
        """Return the layers of one stage, sharing the user's modules and keeping their names in `state_dict`."""
        layers = list(self.module.named_children())
        return Layers(layers[self.boundaries[stage] : self.boundaries[stage + 1]])


def count_parameters(module: nn.Module | None) -> int:
    """Return the number of parameter elements (0 for None)."""
    if module is None:
        return 0
    return sum(parameter.numel() for parameter in module.parameters())
