"""The small networks the laws are tried on, how they train, and what there is to compare afterwards."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.core.criterion import IGNORED
from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.device import seeded
from decoupled_pp.models import build_model
from decoupled_pp.settings.sections import GptModel, MlpModel, ResnetModel
from kit import ignore, states

TOKENS = DataInfo("tokens", (6,), 11)
IMAGES = DataInfo("image", (3, 8, 8), 5)
VECTORS = DataInfo("vector", (7,), 3)


def token_batch(number):
    tokens = torch.randint(TOKENS.outputs, (3, 7))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def padded_batch(number):
    """Another number of tokens counts in every sample, none in every fifth micro-batch."""
    inputs, target = token_batch(number)
    lengths = torch.randint(1, target.shape[1] + 1, (len(target), 1)) if number % 5 != 1 else 0
    return inputs, target.masked_fill(torch.arange(target.shape[1]) >= lengths, IGNORED)


def image_batch(number):
    return torch.randn(4, *IMAGES.shape), torch.randint(IMAGES.outputs, (4,))


def vector_batch(number):
    return torch.randn(4, *VECTORS.shape), torch.randint(VECTORS.outputs, (4,))


def gapped_batch(number):
    """Not every sample counts, and of every fifth micro-batch none."""
    inputs, target = vector_batch(number)
    return inputs, target.masked_fill(torch.rand(len(target)) < (0.4 if number % 5 != 1 else 2), IGNORED)


@dataclass(frozen=True)
class Case:
    """A network, its data, and the options of its Trainer."""

    model: Any
    info: DataInfo
    batch: Callable[[int], Any]
    options: dict[str, Any] = field(default_factory=dict)

    def network(self) -> nn.Sequential:
        with seeded(1):
            return build_model(self.model, self.info)

    def batches(self, count: int) -> list[Any]:
        with seeded(2):
            return [self.batch(number) for number in range(count)]

    def plan(self, stages: int | list[int], **options):
        sizes = stages if isinstance(stages, list) else None
        return partition(
            self.network(), len(sizes) if sizes else stages, sizes or "uniform", self.batches(1)[0][0], **options
        )

    def trainer(self, stages: int | list[int], **options) -> Trainer:
        defaults = {"device": "cpu", "observer": ignore, "seed": 3}
        return Trainer(self.plan(stages), **(defaults | self.options | options))


ADAMW = {"kind": "AdamW", "lr": 1e-2}
MOMENTUM = {"kind": "SGD", "lr": 0.05, "arguments": {"momentum": 0.9, "weight_decay": 1e-3}}
MUON = {"kind": "Muon", "lr": 1e-2}

CASES = {
    "gpt": Case(GptModel(kind="gpt", width=8, depth=2, heads=2), TOKENS, token_batch, {"optimizer": ADAMW}),
    "gpt with dropout": Case(
        GptModel(kind="gpt", width=8, depth=2, heads=2, dropout=0.2), TOKENS, token_batch, {"optimizer": ADAMW}
    ),
    "gpt with padding": Case(
        GptModel(kind="gpt", width=8, depth=2, heads=2), TOKENS, padded_batch, {"optimizer": ADAMW}
    ),
    "resnet": Case(ResnetModel(kind="resnet", depth=8, width=4), IMAGES, image_batch, {"optimizer": MOMENTUM}),
    "mlp": Case(MlpModel(kind="mlp", width=8, depth=3), VECTORS, vector_batch, {"optimizer": ADAMW}),
    "mlp with gaps": Case(MlpModel(kind="mlp", width=8, depth=3), VECTORS, gapped_batch, {"optimizer": ADAMW}),
    "mlp with dropout": Case(
        MlpModel(kind="mlp", width=8, depth=3, dropout=0.3), VECTORS, vector_batch, {"optimizer": ADAMW}
    ),
}


LABEL_CRITICS = {
    "auto": ("resnet", {}),
    "head": ("mlp", {}),
    "conv": ("resnet", {"channels": 4}),
    "mlp_sr": ("resnet", {}),
    "auglocal": ("resnet", {"depth": 1}),
    "predsim": ("resnet", {"features": 64}),
    "infopro": ("resnet", {"width": 4, "features": 8}),
    "lls": ("resnet", {"pooled": 2}),
    "neuron_groups": ("resnet", {}),
    "collaborative": ("resnet", {"base": "mlp_sr"}),
    "sgr": ("resnet", {}),
    "reconstruct": ("gpt", {"weight": 1.0}),
    "vocabulary": ("gpt", {"tokens": 0.5, "classes": 4}),
}
"""`critic.kind` -> a case for it, and the rest of its settings."""


def train(case: str, stages: int, steps: int, batches: int = 12, **options) -> dict[int, dict[str, torch.Tensor]]:
    """Train a case; the state of every stage of this process (one stage on a rank)."""
    trainer = CASES[case].trainer(stages, **options)
    trainer.fit(CASES[case].batches(batches), steps)
    return states(trainer)
