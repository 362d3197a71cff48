"""Measures the saved activations of every rank, over a whole optimizer step, for every strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.workload import TIMEOUT
from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.device import seeded
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Batch
from decoupled_pp.core.plans import Plan
from decoupled_pp.links import World, join_world
from decoupled_pp.models import build_model
from decoupled_pp.pipeline.activations import SavedActivations
from decoupled_pp.pipeline.losses import cross_entropy
from decoupled_pp.settings.run import OptimizerSettings, ScheduleSettings
from decoupled_pp.settings.sections import GptModel
from decoupled_pp.training.baselines import Training, build_baseline, stages_needed
from decoupled_pp.training.partition import partition
from decoupled_pp.training.trainer import Trainer

BLOCKS = 2
"""Transformer blocks of a rank, whatever the number of ranks; the interleaved schedules' stages have half."""

_VOCABULARY = 256
_HEADS = 4
_CPU = torch.device("cpu")

Measurement = dict[str, Any]
"""ranks, micro_batches, strategy, and `bytes` of every rank or the reason why it was `refused`."""


@dataclass(frozen=True)
class GptSize:
    """Sizes of the GPT and its micro-batches.

    Attributes:
        width: Width of the residual stream.
        tokens: Tokens of a sample.
        batch: Samples of a micro-batch.
    """

    width: int = 64
    tokens: int = 64
    batch: int = 4


def measure(strategies: Sequence[str], multiples: Sequence[int], size: GptSize) -> list[Measurement]:
    """Measures all strategies and numbers of micro-batches on the ranks that there are.

    Args:
        strategies: Names of the strategies.
        multiples: Micro-batches of a step, as multiples of the ranks.
        size: Sizes of the network.

    Returns:
        The measurements, equal on all ranks.
    """
    torch.set_num_threads(1)
    world = join_world(TIMEOUT)
    channel = world.channel()
    results: list[Measurement] = []
    for count in (world.size * multiple for multiple in multiples):
        batches: list[Batch] = [_micro_batch(size, number) for number in range(count)]
        for kind in strategies:
            found: Measurement = {"ranks": world.size, "micro_batches": count, "strategy": kind}
            plan = _plan(world.size, stages_needed(kind, world.size) or world.size, size)
            try:
                peak = _decoupled(plan, batches) if kind == "decoupled" else _baseline(kind, plan, world, batches)
            except UsageError as error:  # on every rank alike; the others are measured all the same
                results.append({**found, "refused": str(error)})
                continue
            results.append({**found, "bytes": channel.gather(f"{kind}/{count}", peak, TIMEOUT)})
    return results


def _micro_batch(size: GptSize, number: int) -> tuple[Tensor, Tensor]:
    """Returns random tokens (B, T), and the ones that follow them."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(_VOCABULARY, (size.batch, size.tokens + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _plan(ranks: int, stages: int, size: GptSize) -> Plan:
    """Cuts a GPT of `BLOCKS` blocks per rank; the first stage has the embedding besides, the last the head."""
    model = GptModel(kind="gpt", width=size.width, depth=BLOCKS * ranks, heads=_HEADS)
    with seeded(1):
        network: nn.Sequential = build_model(model, DataInfo("tokens", (size.tokens,), _VOCABULARY))
    layers = [BLOCKS * ranks // stages] * stages
    layers[0] += 1
    layers[-1] += 1
    return partition(network, stages, layers, _micro_batch(size, 0)[0], device="cpu")


def _decoupled(plan: Plan, batches: list[Batch]) -> int:
    """Returns the peak bytes of this rank over a step that accumulates all micro-batches, critic included."""
    options: dict[str, Any] = {"device": "cpu", "accumulate": len(batches), "timeout_seconds": TIMEOUT}
    trainer = Trainer(plan, optimizer={"kind": "SGD", "lr": 0.01}, observer=lambda records: None, **options)
    trainer.fit(batches, 1)
    stage = trainer.stages[0]
    modules = [module for module in (stage.trunk, stage.critic) if module is not None]
    owned = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    # The stage itself measures its first packet only; that no more are held together is the point here.
    with SavedActivations(owned) as saved:
        trainer.fit(batches, 1)
    return max(saved.peak, stage.saved_activation_bytes_peak or 0)


def _baseline(kind: str, plan: Plan, world: World, batches: list[Batch]) -> int:
    """Returns the peak bytes of this rank over the first step."""
    training = Training(cross_entropy, OptimizerSettings(kind="SGD", lr=0.01), ScheduleSettings(), 1)
    strategy = build_baseline(kind, plan, training, _CPU, rank=world.rank, ranks=world.size)
    strategy.step(batches)
    return strategy.saved_activation_bytes_peak or 0
