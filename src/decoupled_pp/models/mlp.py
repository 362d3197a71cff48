"""Builds a multi-layer perceptron on the flattened input, as a list of layers."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import nn

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.models.fit import expect_form
from decoupled_pp.settings.sections import MlpModel


def _hidden_layer(inputs: int, width: int, dropout: float, flatten: bool) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if flatten:  # not a layer of its own, which could become a stage with nothing to train
        parts["flatten"] = nn.Flatten()
    parts["linear"] = nn.Linear(inputs, width)
    parts["relu"] = nn.ReLU()
    if dropout:
        parts["dropout"] = nn.Dropout(dropout)
    return nn.Sequential(parts)


def build_mlp(settings: MlpModel, info: DataInfo) -> nn.Sequential:
    """Build layers `hidden0`.. (linear + ReLU, + dropout), `head`: (B, ...) -> (B, outputs) logits."""
    expect_form(info, "mlp", "image", "vector", "other")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = math.prod(info.shape)
    for index in range(settings.depth):
        layers[f"hidden{index}"] = _hidden_layer(inputs, settings.width, settings.dropout, flatten=index == 0)
        inputs = settings.width
    layers["head"] = nn.Linear(inputs, info.outputs)
    return nn.Sequential(layers)
