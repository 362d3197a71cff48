"""`dpp bench schedule`: share of the ideal that pipelines of emulated stages reach over real links and processes."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoupled_pp.commands.bench import durations, predicted
from decoupled_pp.commands.bench.contestants import TIMEOUT, Contestant, Work, contestant
from decoupled_pp.commands.launcher import launch
from decoupled_pp.core import environment
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.reports import NoteRecord
from decoupled_pp.links import StoreControl, World, join_world
from decoupled_pp.training.baselines import BASELINES, stages_needed
from decoupled_pp.training.baselines.alone import MessageSeconds, message_seconds

STRATEGIES = ("decoupled", *(kind for kind in BASELINES if stages_needed(kind, 1) is not None))
"""What can be measured: pipelines. (The copies of `data_parallel` and `backprop` have no stages to emulate.)"""

_MESSAGES = 15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("--ranks", type=int, required=True, help="processes; a decoupled pipeline has as many stages")
    add_work_arguments(parser)
    parser.add_argument("--output", help="write the figures to this JSON file")
    parser.set_defaults(run=run_command)


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, and on how much work: shared by the benchmarks with emulated compute."""
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
    durations.add_arguments(parser)


def run_command(chosen: argparse.Namespace) -> int:
    """Start the ranks, or be one of them."""
    check_work(chosen, "schedule")
    if environment.world_size() == 1:
        return launch(sys.argv[1:], chosen.ranks, max_restarts=0, grace_seconds=10)
    results = measure(chosen)
    if environment.rank() == 0:
        figures = summarize(results, chosen)
        if chosen.output:
            Path(chosen.output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        sys.stdout.write(durations.describe(durations.unevenness_of(chosen)) + describe(figures))
    return 0


def check_work(chosen: argparse.Namespace, command: str) -> None:
    """Check the arguments of `add_work_arguments`, and fill in what follows from others.

    Raises:
        UsageError: One of them cannot be honoured.
    """
    if chosen.ranks < 2 or chosen.packets < 10 or chosen.repeats < 1:
        raise UsageError(
            f"bench {command} needs --ranks of at least 2, --packets of at least 10, --repeats of at least 1"
        )
    chosen.strategies = [kind.strip() for kind in chosen.strategies.split(",")]
    if unknown := [kind for kind in chosen.strategies if kind not in STRATEGIES]:
        raise UsageError(f"--strategies: {unknown[0]!r} is not known; of {', '.join(STRATEGIES)}")
    chosen.micro_batches = chosen.ranks if chosen.micro_batches is None else chosen.micro_batches
    if chosen.micro_batches < 1:
        raise UsageError(f"--micro-batches {chosen.micro_batches} must be at least 1")
    chosen.steps = max(2, chosen.packets // chosen.micro_batches) if chosen.steps is None else chosen.steps
    if chosen.steps < 1:
        raise UsageError(f"--steps {chosen.steps} must be at least 1")
    durations.unevenness_of(chosen)
    chosen.refused = {}


def measure(chosen: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """All strategies in turn, `repeats` times (A B A B ...): the figures of every repeat; predictions on rank 0."""
    torch.set_num_threads(1)
    unevenness = durations.unevenness_of(chosen)
    world = join_world(TIMEOUT)
    channel = world.channel()
    work = Work(
        world,
        chosen.forward_ms / 1000,
        chosen.backward_ms / 1000,
        chosen.batch,
        chosen.packets,
        chosen.micro_batches,
        chosen.steps,
        chosen.capacity,
        durations.Durations(unevenness, world.rank),
    )
    contestants: dict[str, Contestant] = {}
    for kind in chosen.strategies:
        try:
            contestants[kind] = contestant(kind, work)
        except (
            UsageError
        ) as error:  # on every rank alike, before anything is sent; the others are measured all the same
            chosen.refused[kind] = str(error)
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in contestants}
    for repeat in range(chosen.repeats):
        work.durations.repeat = repeat
        message = _message(work, channel)
        for kind, one in contestants.items():
            results[kind].append(_measure_once(kind, one, work, channel, message))
    _part(world, channel)
    return results


def _measure_once(
    kind: str, one: Contestant, work: Work, channel: StoreControl, message: predicted.MessageCost
) -> dict[str, float]:
    """Own compute alone, its passes, and the pipeline, one after the other; every rank does the same."""
    unevenness, repeat = work.durations.unevenness, work.durations.repeat
    nominal = (work.forward_seconds + work.backward_seconds) * unevenness.slowest_mean
    seconds = TIMEOUT + 100 * work.packets * nominal
    channel.gather(f"start/{kind}/{repeat}", 0, TIMEOUT)
    own = one.alone()
    alone = max(channel.gather(f"alone/{kind}/{repeat}", own, seconds))
    with work.durations.pause():
        passes = one.passes(one.alone() if unevenness.drawn else own)
    passes_of_all = channel.gather(f"passes/{kind}/{repeat}", passes, seconds)
    period = max(channel.gather(f"period/{kind}/{repeat}", one.period(), seconds))
    found = figures_of(period, alone, nominal)
    if work.world.rank == 0:  # the others would only fight it for cores
        foreseen = predicted.predicted_period(kind, passes_of_all, message, _emulation(work))
        found |= predicted.figures(period, foreseen, passes_of_all, message)
    channel.gather(f"predicted/{kind}/{repeat}", 0, seconds + TIMEOUT)
    return found


def _part(world: World, channel: StoreControl) -> None:
    """Without torchrun rank 0 hosts the store: it leaves when the others need it no more, and they need not ask."""
    if world.rank:
        channel.post(NoteRecord(stage=world.rank, text="this rank is done"))
        return
    deadline, left = time.monotonic() + TIMEOUT, world.size - 1
    while left > 0 and time.monotonic() < deadline:
        left -= len(channel.collect())
        time.sleep(0.01)


def _message(work: Work, channel: StoreControl) -> predicted.MessageCost:
    """A message as large as a micro-batch's activations, all ranks at once; a tiny one tells its bytes apart."""
    inputs, _ = work.data()
    layer = work.plan(work.world.size).stage_module(0)

    def costs(size: str, tensor: Tensor) -> list[MessageSeconds]:
        rank, ranks = work.world.rank, work.world.size
        with work.durations.pause():
            own = message_seconds(
                tensor, rank=rank, ranks=ranks, compute=lambda: layer(inputs).sum().backward(), repeats=_MESSAGES
            )
        every = channel.gather(f"{size}/{work.durations.repeat}", [own.latency, own.host], TIMEOUT)
        return [MessageSeconds(*one) for one in every]

    return predicted.MessageCost.of(costs("tiny", inputs[:1, :1].clone()), costs("whole", inputs))


def _emulation(work: Work) -> predicted.Emulation:
    own, size = work.durations, work.world.size
    ranks = [durations.Durations(own.unevenness, rank, own.repeat) for rank in range(size)]
    return predicted.Emulation(
        ranks=size,
        micro_batches=work.micro_batches,
        steps=work.steps,
        packets=work.packets,
        fill=work.fill,
        capacity=work.capacity,
        message_bytes=work.data()[0].nbytes,
        forward=work.forward_seconds,
        backward=work.backward_seconds,
        factors=lambda rank, number: ranks[rank].factors(number),
    )


def figures_of(period: float, alone: float, nominal: float) -> dict[str, float]:
    """What one measurement says; the arguments are seconds per micro-batch.

    Args:
        period: Of the pipeline.
        alone: Of the slowest rank's own compute, back to back; all ranks run theirs at the same time. Uneven durations:
            the mean over the very micro-batches that `period` is measured on.
        nominal: Of the bare sleeps; uneven durations: expected, on the slowest rank.
    """
    return {
        "period_ms": period * 1000,
        "alone_ms": alone * 1000,
        "share_of_ideal": alone / period,
        "share_of_nominal": nominal / period,
        "cost_us": (period - alone) * 1e6,
    }


def summarize(results: dict[str, list[dict[str, float]]], chosen: argparse.Namespace) -> dict[str, Any]:
    """The arguments, and of every strategy the medians with the spread beside them."""
    figures: dict[str, Any] = {k: v for k, v in vars(chosen).items() if k not in ("run", "output")}
    unevenness = durations.unevenness_of(chosen)
    figures |= {"unevenness": asdict(unevenness), "slowest_mean": unevenness.slowest_mean}
    for kind, repeats in results.items():
        columns = {key: [one[key] for one in repeats] for key in repeats[0]}
        figures[kind] = {
            key: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for key, values in columns.items()
        }
    return figures


def describe(figures: dict[str, Any]) -> str:
    """The figures as a few lines of text."""
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
        for key, label, form in (row for row in rows if row[0] in figures[kind]):
            low, middle, high = (format(figures[kind][key][which], form) for which in ("min", "median", "max"))
            text += f"  {label:<44} {middle}  ({low} .. {high})\n"
    return text
