"""Builds the user's own network, by a function named in the settings."""

from __future__ import annotations

from torch import nn

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.factory import call_factory
from decoupled_pp.settings.sections import FactoryModel


def build_from_factory(settings: FactoryModel, info: DataInfo) -> nn.Sequential:
    """Call `factory(info, **arguments)`; it returns an `nn.Sequential`, or a list of modules to make one of."""
    network = call_factory(settings.factory, "model.factory", info, **settings.arguments)
    if isinstance(network, nn.Sequential):
        return network
    if isinstance(network, list | tuple) and network and all(isinstance(layer, nn.Module) for layer in network):
        return nn.Sequential(*network)
    raise UsageError(
        f"`model.factory` {settings.factory!r} returned {type(network).__name__}; "
        "return an nn.Sequential or a non-empty list of nn.Module, the layers in order",
        code="factory-wrong-result",
        key="model.factory",
    )
