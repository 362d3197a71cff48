"""The command line of `dpp evaluate`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from decoupled_pp.commands.arguments import add_overrides, check_at_least, numbers_of, output_file
from decoupled_pp.core.paths import expanded

if TYPE_CHECKING:
    from decoupled_pp.commands.evaluate.exits import Evaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dpp evaluate`."""
    parser.add_argument("folder", help="run folder")
    parser.add_argument(
        "--progressive",
        metavar="CONFIDENCE",
        help="leave at the first exit whose largest softmax is above this, e.g. 0.9; several: 0.8,0.9,0.95",
    )
    parser.add_argument("--ensemble", action="store_true", help="score the sum of all exits' logits")
    parser.add_argument(
        "--gradient-probe",
        type=int,
        nargs="?",
        const=8,
        default=0,
        metavar="N",
        help="cosine between local and true gradients of every stage, on N training micro-batches (default: 8)",
    )
    parser.add_argument(
        "--plain",
        metavar="RUN",
        help="a run of the same settings with --strategy backprop: what depth is worth, and how much of it is kept",
    )
    parser.add_argument("--picture", metavar="FILE", help="draw accuracy against FLOPs as a PNG")
    parser.add_argument("--json", metavar="FILE", help="write all of it as JSON, too")
    add_overrides(parser, "override a setting, e.g. training.steps=100")
    parser.set_defaults(run=run_command)


def run_command(chosen: argparse.Namespace) -> int:
    """Evaluates a run, prints the tables, and writes the files that were asked for."""
    from decoupled_pp.commands.evaluate.finished_run import evaluate_run
    from decoupled_pp.commands.evaluate.tables import print_evaluation
    from decoupled_pp.core.records import write_json

    check_at_least(chosen, gradient_probe=0)
    json = output_file("--json", chosen.json)
    picture = output_file("--picture", chosen.picture)
    found = evaluate_run(
        Path(expanded(chosen.folder)),
        tuple(chosen.set),
        thresholds=numbers_of("--progressive", chosen.progressive, 0, "0.8,0.9") if chosen.progressive else [],
        together=chosen.ensemble,
        gradients=chosen.gradient_probe,
        plain=Path(expanded(chosen.plain)) if chosen.plain else None,
    )
    print_evaluation(found)
    if json is not None:
        json.write_text(write_json(dataclasses.asdict(found), indent=2) + "\n", encoding="utf-8")
        sys.stdout.write(f"{json}\n")
    if picture is not None:
        _draw(found, picture)
        sys.stdout.write(f"{picture}\n")
    return 0


def _draw(found: Evaluation, path: Path) -> None:
    from decoupled_pp.run.plots import plot_exits

    scored = [
        (cost.flops, one.val_accuracy)
        for cost, one in zip(found.costs, found.exits, strict=True)
        if one.val_accuracy is not None
    ]
    early = [(row.flops, row.accuracy, row.threshold) for row in found.progressive]
    plot_exits(scored, early, path)
