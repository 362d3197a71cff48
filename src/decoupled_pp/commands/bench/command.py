"""The table of the benchmarks, which are subcommands of `dpp bench`."""

from __future__ import annotations

import sys
from pathlib import Path

import decoupled_pp
from decoupled_pp.commands.subcommands import Parser, Subcommand

_ROOM = "decoupled_pp.commands.bench"
_CHECKOUT = Path(decoupled_pp.__file__).parents[2]
INSTALLED = (
    Subcommand("schedule", "share of ideal with emulated compute", f"{_ROOM}.schedule"),
    Subcommand("memory", "activations that every rank of a pipeline holds", f"{_ROOM}.memory"),
)
OF_THE_REPOSITORY = (
    Subcommand("wan", "two hosts, slow links: share of the rate without latency", "benchmarks.wan"),
    Subcommand("gpu", "speed of one stage on one GPU", "benchmarks.gpu"),
)
"""Benchmarks that few need (network namespaces, one GPU): files of the repository that are not installed."""


def add_arguments(parser: Parser) -> None:
    """Adds the benchmarks; those of the repository refuse to run where it is not."""
    if (_CHECKOUT / "benchmarks" / "wan.py").is_file():
        if str(_CHECKOUT) not in sys.path:
            sys.path.append(str(_CHECKOUT))
        parser.add_table((*INSTALLED, *OF_THE_REPOSITORY), metavar="BENCHMARK")
        return
    absent = (row._replace(module=f"{_ROOM}.absent") for row in OF_THE_REPOSITORY)
    parser.add_table((*INSTALLED, *absent), metavar="BENCHMARK")
