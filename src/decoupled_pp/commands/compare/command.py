"""`dpp compare`: the same model and data trained by several strategies, and one report of what each buys and costs."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from decoupled_pp.commands.compare.contenders import STRATEGIES, contenders, with_own_settings
from decoupled_pp.commands.compare.pages import Comparison, write_pages
from decoupled_pp.commands.compare.runs import run_all
from decoupled_pp.core import environment
from decoupled_pp.core.errors import TrainingError, UsageError
from decoupled_pp.run import folder as run_folder
from decoupled_pp.settings.load import load_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("config", help="YAML file with the settings (docs/configuration.md)")
    parser.add_argument(
        "--strategies",
        default="decoupled,1f1b,zero_bubble,backprop",
        help=f"comma-separated, of {', '.join(STRATEGIES)}; default: decoupled,1f1b,zero_bubble,backprop",
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes of every strategy but backprop; default: 2")
    parser.add_argument("--micro-batches", type=int, help="per flush of a pipeline; default: twice the ranks")
    parser.add_argument("--repeats", type=int, default=3, help="of every strategy, in turn; default: 3")
    parser.add_argument("--output", help="folder of the report and of all runs; default: <runs>/<name>-compare")
    parser.add_argument("--overwrite", action="store_true", help="clear that folder if it exists")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting for all strategies"
    )
    parser.add_argument(
        "--set-for",
        action="append",
        nargs=2,
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help="override a setting for one entry of the report: 1f1b optimizer.lr=0.1, decoupled_per_flush ...",
    )
    parser.set_defaults(run=run_command)


def run_command(chosen: argparse.Namespace) -> int:
    """Check everything, run everybody, write the report."""
    settings = load_settings(chosen.config, tuple(chosen.set))
    if environment.world_size() > 1:
        raise UsageError("dpp compare starts the ranks itself: run it without torchrun")
    if chosen.repeats < 1:
        raise UsageError(f"--repeats {chosen.repeats} must be at least 1")
    micro_batches = chosen.micro_batches if chosen.micro_batches is not None else 2 * chosen.ranks
    entries = contenders(settings, [kind.strip() for kind in chosen.strategies.split(",")], chosen.ranks, micro_batches)
    entries = with_own_settings(entries, chosen.set_for)
    for entry in entries:
        load_settings(chosen.config, (*chosen.set, *entry.own))  # a wrong one is refused before anybody runs
    folder = Path(chosen.output) if chosen.output else Path(settings.runs) / f"{settings.name}-compare"
    run_folder.check(folder, resume=False, overwrite=chosen.overwrite)
    run_folder.claim(folder, environment.job(), resume=False, overwrite=chosen.overwrite)
    (folder / run_folder.CHECKPOINTS).rmdir()  # a comparison has none of its own
    run_folder.write_config(folder, settings, None)
    threads = settings.threads or max(1, environment.cores() // chosen.ranks)
    runs, failures = run_all(
        chosen.config,
        chosen.set,
        entries,
        folder,
        repeats=chosen.repeats,
        seed=settings.seed,
        threads=threads,
        say=_say,
    )
    if not runs:
        raise TrainingError(f"none of the strategies ran: {failures[0].reason}")
    command = shlex.join(["dpp", *sys.argv[1:]])
    context = getattr(settings.data, "context", None)
    size = (chosen.ranks, micro_batches, settings.data.batch_size)
    comparison = Comparison(chosen.config, command, *size, context, threads, entries, runs, failures)
    for path in write_pages(folder, comparison):
        _say(str(path))
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
