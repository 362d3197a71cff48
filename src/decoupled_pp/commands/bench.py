"""`dpp bench`: dispatches to the repository's own benchmarks, which are not installed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import decoupled_pp
from decoupled_pp.commands.subcommands import Parser, Subcommand
from decoupled_pp.core.errors import UsageError

_CHECKOUT = Path(decoupled_pp.__file__).parents[2]
BENCHMARKS = (
    Subcommand("schedule", "share of ideal with emulated compute", "benchmarks.schedule"),
    Subcommand("memory", "activations that every rank of a pipeline holds", "benchmarks.memory"),
    Subcommand("wan", "two hosts, slow links: share of the rate without latency", "benchmarks.wan"),
    Subcommand("gpu", "speed of one stage on one GPU", "benchmarks.gpu"),
)


def add_arguments(parser: Parser) -> None:
    """Adds the benchmarks; where the repository is not, every command line is refused."""
    if not (_CHECKOUT / "benchmarks" / "schedule.py").is_file():
        parser.add_argument("words", nargs=argparse.REMAINDER, help="only in a checkout of the repository")
        parser.set_defaults(run=_refuse)
        return
    # The console script has its own folder on the path, not the checkout.
    if str(_CHECKOUT) not in sys.path:
        sys.path.append(str(_CHECKOUT))
    parser.add_table(BENCHMARKS, metavar="BENCHMARK")


def _refuse(_: argparse.Namespace) -> int:
    raise UsageError(
        "the benchmarks come with the repository and are not installed; run `dpp bench` in a checkout, after "
        "pip install --editable .",
        code="benchmark-not-installed",
    )
