"""`dpp bench memory`: activations that every rank of a pipeline holds for backward, against ranks and micro-batches."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.commands.bench.memory_report import draw, table
from decoupled_pp.commands.bench.schedule import STRATEGIES
from decoupled_pp.commands.launcher import launch
from decoupled_pp.core import environment
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

VOCABULARY, HEADS, BLOCKS, TIMEOUT = 256, 4, 2, 60.0
"""BLOCKS: transformer blocks of a rank, whatever the number of ranks; the interleaved schedules' stages have half."""
_CPU = torch.device("cpu")
_OPTIMIZER = OptimizerSettings(kind="SGD", lr=0.01)

Measurement = dict[str, Any]
"""ranks, micro_batches, strategy, and `bytes` of every rank or the reason why it was `refused`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("--output", required=True, help="folder for memory.json, memory.md and memory.png")
    parser.add_argument("--ranks", default="2,4,8", help="comma-separated numbers of processes")
    parser.add_argument("--per-rank", default="1,2,4", help="micro-batches of a step, as multiples of the ranks")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="comma-separated; the default is all")
    parser.add_argument("--width", type=int, default=64, help="width of the GPT")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a sample")
    parser.add_argument("--batch", type=int, default=4, help="samples of a micro-batch")
    parser.set_defaults(run=run_command)


def run_command(chosen: argparse.Namespace) -> int:
    """Start the ranks, one number of them after the other, and report; or be one of them."""
    sizes, multiples = _numbers(chosen.ranks, "--ranks", 2), _numbers(chosen.per_rank, "--per-rank", 1)
    chosen.strategies = [kind.strip() for kind in chosen.strategies.split(",")]
    if unknown := [kind for kind in chosen.strategies if kind not in STRATEGIES]:
        raise UsageError(f"--strategies: {unknown[0]!r} is not known; of {', '.join(STRATEGIES)}")
    if chosen.width < HEADS or chosen.width % HEADS or min(chosen.tokens, chosen.batch) < 1:
        raise UsageError(
            f"--width {chosen.width} must be a multiple of {HEADS} (heads); --tokens {chosen.tokens} and "
            f"--batch {chosen.batch} at least 1"
        )
    folder = Path(chosen.output)
    if environment.world_size() > 1:
        measured = measure(chosen, multiples)
        if environment.rank() == 0:
            _write(_part(folder, environment.world_size()), measured)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    results: list[Measurement] = []
    for ranks in sizes:
        if code := launch(sys.argv[1:], ranks, max_restarts=0, grace_seconds=10):
            return code
        results += json.loads(_part(folder, ranks).read_text(encoding="utf-8"))
        _part(folder, ranks).unlink()
    report(results, chosen, folder)
    return 0


def report(results: list[Measurement], chosen: argparse.Namespace, folder: Path) -> None:
    """Write memory.json, memory.md and memory.png, and print the table."""
    arguments = {key: value for key, value in vars(chosen).items() if key not in ("run", "output")}
    _write(folder / "memory.json", {"arguments": arguments, "blocks_per_rank": BLOCKS, "measurements": results})
    text = table(results, chosen.strategies)
    (folder / "memory.md").write_text(text, encoding="utf-8")
    draw(results, chosen.strategies, folder / "memory.png")
    sys.stdout.write(text)


def measure(chosen: argparse.Namespace, multiples: list[int]) -> list[Measurement]:
    """All strategies and numbers of micro-batches on the ranks that there are; equal on all ranks."""
    torch.set_num_threads(1)
    world = join_world(TIMEOUT)
    channel = world.channel()
    results: list[Measurement] = []
    for count in (world.size * multiple for multiple in multiples):
        for kind in chosen.strategies:
            found: Measurement = {"ranks": world.size, "micro_batches": count, "strategy": kind}
            batches: list[Batch] = [batch(chosen, number) for number in range(count)]
            plan = plan_of(world.size, stages_needed(kind, world.size) or world.size, chosen.width, batch(chosen, 0)[0])
            try:
                peak = _decoupled(plan, batches) if kind == "decoupled" else _baseline(kind, plan, world, batches)
            except UsageError as error:  # on every rank alike; the others are measured all the same
                results.append({**found, "refused": str(error)})
                continue
            results.append({**found, "bytes": channel.gather(f"{kind}/{count}", peak, TIMEOUT)})
    return results


def batch(chosen: argparse.Namespace, number: int) -> tuple[Tensor, Tensor]:
    """Random tokens (B, T), and the ones that follow them."""
    tokens = torch.randint(
        VOCABULARY, (chosen.batch, chosen.tokens + 1), generator=torch.Generator().manual_seed(number)
    )
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def plan_of(ranks: int, stages: int, width: int, sample: Tensor) -> Plan:
    """A GPT of `BLOCKS` blocks per rank; the first stage has the embedding besides, the last the head."""
    model = GptModel(kind="gpt", width=width, depth=BLOCKS * ranks, heads=HEADS)
    with seeded(1):
        network: nn.Sequential = build_model(model, DataInfo("tokens", (sample.shape[1],), VOCABULARY))
    sizes = [BLOCKS * ranks // stages] * stages
    sizes[0] += 1
    sizes[-1] += 1
    return partition(network, stages, sizes, sample, device="cpu")


def _decoupled(plan: Plan, batches: list[Batch]) -> int:
    """Peak bytes of this rank over a whole optimizer step that accumulates all micro-batches, critic included.

    (What `Stage` itself measures is its first packet; that no more are held together is the point here.)
    """
    options: dict[str, Any] = {"device": "cpu", "accumulate": len(batches), "timeout_seconds": TIMEOUT}
    trainer = Trainer(plan, optimizer={"kind": "SGD", "lr": 0.01}, observer=lambda records: None, **options)
    trainer.fit(batches, 1)
    stage = trainer.stages[0]
    modules = [module for module in (stage.trunk, stage.critic) if module is not None]
    with SavedActivations([tensor for m in modules for tensor in (*m.parameters(), *m.buffers())]) as saved:
        trainer.fit(batches, 1)
    return max(saved.peak, stage.saved_activation_bytes_peak or 0)


def _baseline(kind: str, plan: Plan, world: World, batches: list[Batch]) -> int:
    """Peak bytes of this rank over the first step."""
    training = Training(cross_entropy, _OPTIMIZER, ScheduleSettings(), 1)
    strategy = build_baseline(kind, plan, training, _CPU, rank=world.rank, ranks=world.size)
    strategy.step(batches)
    return strategy.saved_activation_bytes_peak or 0


def _numbers(text: str, option: str, least: int) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} {text!r} must be whole numbers with commas between them") from error
    if min(numbers) < least:
        raise UsageError(f"{option} {text!r}: each must be at least {least}")
    return numbers


def _part(folder: Path, ranks: int) -> Path:
    return folder / f"ranks-{ranks}.json"


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
