"""Benchmark commands of `dpp bench`."""

from __future__ import annotations

import argparse

from decoupled_pp.commands.bench import gpu, memory, schedule, wan


def add_benchmarks(parser: argparse.ArgumentParser) -> None:
    """Add the benchmarks' own commands."""
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    schedule.add_arguments(commands.add_parser("schedule", help="share of ideal with emulated compute"))
    wan.add_arguments(commands.add_parser("wan", help="two hosts, slow links: share of the rate without latency"))
    gpu.add_arguments(commands.add_parser("gpu", help="tests and speed of one stage on one GPU"))
    memory.add_arguments(commands.add_parser("memory", help="activations that every rank of a pipeline holds"))
