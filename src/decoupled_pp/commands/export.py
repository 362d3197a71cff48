"""`dpp export`: writes the network of a run for use without this package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.paths import expanded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dpp export`."""
    parser.add_argument("folder", help="run folder")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        help="file to write, if it ends in .safetensors, else a folder that dpp.load (or from_pretrained) loads",
    )
    parser.add_argument("--exit", type=int, help="a smaller network: the stages up to this one, and its critic")
    parser.add_argument(
        "--tied", action="store_true", help="one weight again for embedding and output projection: the latter's"
    )
    parser.set_defaults(run=run_command)


def run_command(chosen: argparse.Namespace) -> int:
    """Writes the whole network, or one that ends at an exit."""
    from decoupled_pp.commands.exported import export_run

    if chosen.exit is not None and chosen.tied:
        raise UsageError(
            "--tied goes with the whole network, not with --exit; leave one of the two out", code="options-contradict"
        )
    run = Path(expanded(chosen.folder))
    output = Path(expanded(chosen.output))
    lines = export_run(run, output, exit=chosen.exit, tied=chosen.tied)
    sys.stdout.write("\n".join([chosen.output, *lines]) + "\n")
    return 0
