"""The table of the benchmarks, which are subcommands of `dpp bench`."""

from __future__ import annotations

from decoupled_pp.commands.subcommands import Parser, Subcommand

_ROOM = "decoupled_pp.commands.bench"
BENCHMARKS = (
    Subcommand("schedule", "share of ideal with emulated compute", f"{_ROOM}.schedule"),
    Subcommand("wan", "two hosts, slow links: share of the rate without latency", f"{_ROOM}.wan"),
    Subcommand("gpu", "speed of one stage on one GPU", f"{_ROOM}.gpu"),
    Subcommand("memory", "activations that every rank of a pipeline holds", f"{_ROOM}.memory"),
)


def add_arguments(parser: Parser) -> None:
    """Adds the benchmarks."""
    parser.add_table(BENCHMARKS, metavar="BENCHMARK")
