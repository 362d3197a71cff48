"""The table of networks that a settings file can name. Each builder returns an `nn.Sequential` of named layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.factory import call_factory
from decoupled_pp.models.gpt import build_gpt
from decoupled_pp.models.huggingface import build_from_transformers
from decoupled_pp.models.mlp import build_mlp
from decoupled_pp.models.resnet import build_resnet
from decoupled_pp.models.splitting import Split
from decoupled_pp.models.vgg import build_vgg
from decoupled_pp.settings.sections import FactoryModel, ModelSettings


def build_from_factory(settings: FactoryModel, info: DataInfo) -> nn.Sequential:
    """Call `factory(info, **arguments)`; it returns an `nn.Sequential`, a list of modules, or a split model."""
    network = call_factory(settings.factory, "model.factory", info, **settings.arguments)
    if isinstance(network, Split):
        network = network.layers
    if isinstance(network, nn.Sequential):
        return network
    if isinstance(network, list | tuple) and network and all(isinstance(layer, nn.Module) for layer in network):
        return nn.Sequential(*network)
    raise UsageError(
        f"`model.factory` {settings.factory!r} returned {type(network).__name__}; "
        "return an nn.Sequential or a non-empty list of nn.Module, the layers in order, or what dpp.split returns",
        code="factory-wrong-result",
        key="model.factory",
    )


KINDS: dict[str, Callable[[Any, DataInfo], nn.Sequential]] = {
    "gpt": build_gpt,
    "resnet": build_resnet,
    "vgg": build_vgg,
    "mlp": build_mlp,
    "huggingface": build_from_transformers,
    "factory": build_from_factory,
}
"""`model.kind` -> the function that builds it."""


def build_model(settings: ModelSettings, info: DataInfo) -> nn.Sequential:
    """Build the network of a run, on the CPU, in fp32; initial weights come from torch's global generator."""
    return KINDS[settings.kind](settings, info)
