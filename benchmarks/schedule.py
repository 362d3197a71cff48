"""`dpp bench schedule`: share of the ideal that pipelines of emulated stages reach over real links and processes."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.workload import Unevenness, Workload
from decoupled_pp.commands.arguments import check_at_least, strategies_of
from decoupled_pp.commands.plan.orders import PIPELINES
from decoupled_pp.core import environment
from decoupled_pp.core.errors import UsageError

STRATEGIES = ("decoupled", *PIPELINES)
"""Strategies that can be measured: those with stages. (`data_parallel` and `backprop` have none to emulate.)"""

_SLOW_SHARE = 0.33


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dpp bench schedule`."""
    parser.add_argument("--ranks", type=int, required=True, help="processes; a decoupled pipeline has as many stages")
    add_work_arguments(parser)
    parser.add_argument("--output", help="write the figures to this JSON file")
    parser.set_defaults(run=run_command)


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that the benchmarks with emulated compute share."""
    parser.add_argument("--strategies", default="decoupled", help=f"comma-separated, of {', '.join(STRATEGIES)}")
    parser.add_argument(
        "--micro-batches", type=int, help="per optimizer step of a pipelined baseline (default: ranks); decoupled: 1"
    )
    parser.add_argument("--packets", type=int, default=60, help="micro-batches per repeat")
    parser.add_argument(
        "--steps",
        type=int,
        help="optimizer steps per repeat of a pipelined baseline (default: packets / micro-batches)",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--forward-ms", type=float, default=10.0, help="emulated forward of one rank and micro-batch")
    parser.add_argument("--backward-ms", type=float, default=20.0, help="emulated backward of one rank and micro-batch")
    parser.add_argument("--batch", type=int, default=16, help="samples per micro-batch (64 floats each)")
    parser.add_argument("--capacity", type=int, default=4, help="packets a link may hold")
    parser.add_argument(
        "--slow-factor", type=float, help="the middle stage takes this many times as long at random moments"
    )
    parser.add_argument("--slow-share", type=float, help=f"share of its micro-batches that do (default: {_SLOW_SHARE})")
    parser.add_argument(
        "--jitter",
        choices=("none", "exponential"),
        default="none",
        help="distribution of every forward and backward about its mean",
    )


def run_command(chosen: argparse.Namespace) -> int:
    """Starts the ranks, or is one of them."""
    work = workload_of(chosen)
    if environment.world_size() == 1:
        from decoupled_pp.commands.launcher import launch

        return launch(sys.argv[1:], chosen.ranks, max_restarts=0, grace_seconds=10)
    from benchmarks.schedule_measure import measure

    results, refused = measure(work, chosen.strategies, chosen.repeats)
    if environment.rank() == 0:
        figures = summarize(results, refused, work, chosen)
        if chosen.output:
            Path(chosen.output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        head = f"{work.unevenness}\n" if work.unevenness.drawn else ""
        sys.stdout.write(head + describe(figures))
    return 0


def workload_of(chosen: argparse.Namespace) -> Workload:
    """Checks the arguments of `add_work_arguments`, and fills in those that follow from others.

    Raises:
        UsageError: One of them cannot be honoured.
    """
    check_at_least(chosen, ranks=2, packets=10, repeats=1, batch=1, capacity=1, forward_ms=0, backward_ms=0)
    chosen.strategies = strategies_of(chosen.strategies, STRATEGIES)
    if chosen.micro_batches is None:
        chosen.micro_batches = chosen.ranks
    check_at_least(chosen, micro_batches=1)
    if chosen.steps is None:
        chosen.steps = max(2, chosen.packets // chosen.micro_batches)
    check_at_least(chosen, steps=1)
    return Workload(
        ranks=chosen.ranks,
        forward_seconds=chosen.forward_ms / 1000,
        backward_seconds=chosen.backward_ms / 1000,
        batch=chosen.batch,
        packets=chosen.packets,
        micro_batches=chosen.micro_batches,
        steps=chosen.steps,
        capacity=chosen.capacity,
        unevenness=_unevenness_of(chosen),
    )


def _unevenness_of(chosen: argparse.Namespace) -> Unevenness:
    factor = chosen.slow_factor
    share = chosen.slow_share
    if factor is None:
        if share is not None:
            raise UsageError(
                f"--slow-share {share} has no effect without --slow-factor; add it, or leave this out",
                code="option-without-effect",
            )
        return Unevenness(jitter=chosen.jitter)
    if factor <= 1:
        raise UsageError(f"--slow-factor {factor:g} must be above 1", code="option-out-of-range")
    if share is None:
        share = _SLOW_SHARE
    if not 0 < share <= 1:
        raise UsageError(f"--slow-share {share:g} must be above 0 and at most 1", code="option-out-of-range")
    return Unevenness(chosen.ranks // 2, factor, share, chosen.jitter)


def summarize(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    refused: Mapping[str, str],
    work: Workload,
    chosen: argparse.Namespace,
) -> dict[str, Any]:
    """Returns the arguments, and the spread of every strategy's figures, as JSON takes them."""
    return {
        **{key: value for key, value in vars(chosen).items() if key not in ("run", "output")},
        "refused": refused,
        "unevenness": asdict(work.unevenness),
        "slowest_mean": work.unevenness.slowest_mean,
        **{kind: spreads(repeats) for kind, repeats in results.items()},
    }


def spreads(repeats: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Returns the spread of every figure over the repeats."""
    return {key: spread([one[key] for one in repeats]) for key in repeats[0]}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns median, smallest and largest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def describe(figures: Mapping[str, Any]) -> str:
    """Returns the figures as a few lines of text."""
    nominal = (figures["forward_ms"] + figures["backward_ms"]) * figures["slowest_mean"]
    rows = (
        ("alone_ms", "ideal: slowest rank alone, back to back, ms", ".2f"),
        ("period_ms", "pipeline in steady state, ms/micro-batch", ".2f"),
        ("share_of_ideal", "share of ideal", ".4f"),
        ("share_of_nominal", f"share of the bare sleeps ({nominal:g} ms)", ".4f"),
        ("cost_us", "more than compute alone, us/micro-batch", ".0f"),
        ("predicted_ms", "predicted by the planner, ms/micro-batch", ".2f"),
        ("measured_to_predicted", "measured / predicted", ".3f"),
    )
    text = f"{figures['ranks']} ranks, {figures['packets']} micro-batches, {figures['repeats']} repeats; "
    text += "median (min .. max)\n"
    for kind in figures["strategies"]:
        if kind in figures["refused"]:
            text += f"{kind}: not measured: {figures['refused'][kind]}\n"
            continue
        per_step = 1 if kind == "decoupled" else figures["micro_batches"]
        text += f"{kind}, an optimizer step every {per_step} micro-batch{'es' if per_step > 1 else ''}\n"
        for key, label, form in rows:
            if key in figures[kind]:
                low, middle, high = (format(figures[kind][key][which], form) for which in ("min", "median", "max"))
                text += f"  {label:<44} {middle}  ({low} .. {high})\n"
    return text
