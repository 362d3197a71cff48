"""Stands in for a benchmark of the repository where only the package is installed."""

from __future__ import annotations

import argparse

from decoupled_pp.commands.subcommands import Parser
from decoupled_pp.core.errors import UsageError


def add_arguments(parser: Parser) -> None:
    """Adds a command that only says where the benchmark is."""
    parser.set_defaults(run=_refuse)


def _refuse(_: argparse.Namespace) -> int:
    raise UsageError(
        "this benchmark is in the folder benchmarks/ of the repository and is not installed; run it in a checkout, "
        "after pip install --editable .",
        code="benchmark-not-installed",
    )
