"""`dpp compare`: trains one model by several strategies, and reports what each buys and costs."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from decoupled_pp.commands.arguments import add_overrides, check_at_least, strategies_of
from decoupled_pp.commands.child import check_entry, say
from decoupled_pp.commands.compare.contenders import STRATEGIES, contenders, with_own_settings
from decoupled_pp.core import environment
from decoupled_pp.core.errors import TrainingError, UsageError
from decoupled_pp.core.paths import expanded
from decoupled_pp.core.threads import choose_threads
from decoupled_pp.settings.load import load_settings
from decoupled_pp.training.ranks import ONE_PROCESS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dpp compare`."""
    parser.add_argument("config", help="YAML file with the settings (docs/configuration.md)")
    parser.add_argument(
        "--strategies",
        default="decoupled,1f1b,zero_bubble,backprop",
        help=f"comma-separated, of {', '.join(STRATEGIES)}; default: %(default)s",
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes of every strategy but backprop; default: 2")
    parser.add_argument("--micro-batches", type=int, help="per flush of a pipeline; default: twice the ranks")
    parser.add_argument("--repeats", type=int, default=3, help="of every strategy, in turn; default: 3")
    parser.add_argument("--output", help="folder of the report and of all runs; default: <runs>/<name>-compare")
    parser.add_argument("--overwrite", action="store_true", help="clear that folder if it exists")
    add_overrides(parser, "override a setting for all strategies")
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
    """Checks everything, runs everybody, writes the report."""
    settings = load_settings(chosen.config, tuple(chosen.set))
    if environment.world_size() > 1:
        raise UsageError("dpp compare starts the ranks itself: run it without torchrun", code="under-torchrun")
    check_at_least(chosen, repeats=1)
    micro_batches = chosen.micro_batches if chosen.micro_batches is not None else 2 * chosen.ranks
    kinds = strategies_of(chosen.strategies, STRATEGIES)
    entries = with_own_settings(contenders(settings, kinds, chosen.ranks, micro_batches), chosen.set_for)
    each = {one.name: load_settings(chosen.config, (*chosen.set, *one.own, *one.overrides)) for one in entries}
    # Data and network are those of all. A pipeline that cannot run does not stop the others.
    alone = [name for name, own in each.items() if own.strategy in ONE_PROCESS]
    for name in alone or [entries[0].name]:
        check_entry(name, each[name])
    from decoupled_pp.commands.compare.pages import Comparison, Setup, write_pages
    from decoupled_pp.commands.compare.runs import run_all
    from decoupled_pp.commands.results_folder import COMPARISON
    from decoupled_pp.run.folder import write_config

    folder = Path(expanded(chosen.output)) if chosen.output else Path(settings.runs) / f"{settings.name}-compare"
    advice = "--overwrite starts anew, or give another --output"
    COMPARISON.claim(folder, advice, overwrite=chosen.overwrite)
    write_config(folder, settings, None)
    setup = Setup(
        config=chosen.config,
        command=shlex.join(["dpp", *sys.argv[1:]]),
        ranks=chosen.ranks,
        micro_batches=micro_batches,
        batch_size=settings.data.batch_size,
        tokens_per_sample=getattr(settings.data, "context", None),
        threads=choose_threads(settings.threads, chosen.ranks).count,
    )
    seeds = range(settings.seed, settings.seed + chosen.repeats)
    runs, failures = run_all(entries, folder, chosen.config, chosen.set, seeds, threads=setup.threads)
    if not runs:
        raise TrainingError(f"none of the strategies ran: {next(iter(failures.values()))}", code="nothing-ran")
    for path in write_pages(folder, Comparison(setup, entries, runs, failures)):
        say(str(path))
    return 0
