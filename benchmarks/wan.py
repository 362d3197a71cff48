"""`dpp bench wan`: what a slow link leaves of a pipeline's rate, over real TCP between two network namespaces."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import probe, schedule, wan_report
from benchmarks.two_hosts import (
    ADDRESSES,
    DEVICE,
    Hosts,
    UnavailableError,
    check_available,
    two_hosts,
)
from benchmarks.wan_report import Condition
from benchmarks.workload import TIMEOUT, WIDTH
from decoupled_pp.commands.arguments import flag, numbers_of
from decoupled_pp.commands.child import say
from decoupled_pp.core import environment
from decoupled_pp.core.errors import TrainingError, UsageError

_RANKS = 2
_PORT = 29500
_STRATEGIES = "decoupled,1f1b,gpipe,zero_bubble,zbv,interleaved_1f1b"
_PINGS = 10
_STREAM_SECONDS = 1.5
_TARGET_BYTES = 8
_POLL_SECONDS = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dpp bench wan`."""
    schedule.add_work_arguments(parser)
    parser.add_argument("--round-trips", default="1,10,50,200", help="ms, comma-separated; 0 is always measured")
    parser.add_argument("--mbit", default="0,100", help="limits of each direction, comma-separated; 0: none")
    parser.add_argument("--output", help="folder for figures.json and share.png")
    # A packet of 135 KB, so that 100 Mbit/s matter: a third of them at 30 ms per packet, and 11 ms of transfer.
    parser.set_defaults(strategies=_STRATEGIES, micro_batches=4, steps=2, batch=512, capacity=None)
    parser.set_defaults(ranks=_RANKS, run=run_command)


def run_command(chosen: argparse.Namespace) -> int:
    """Measures every condition in turn, `repeats` times; where two hosts cannot be made, says so and ends well."""
    _check(chosen)
    try:
        check_available()
        for mbit in chosen.mbit:
            with two_hosts(round_trip_seconds=0.0, mbit=mbit):
                pass
    except UnavailableError as error:
        sys.stdout.write(f"dpp bench wan: nothing measured: {error}\n")
        return 0
    _measure(chosen, _make_folder(chosen.output))
    return 0


def _check(chosen: argparse.Namespace) -> None:
    """Checks the arguments and fills in those that follow from others.

    Raises:
        UsageError: One of them cannot be honoured.
    """
    if environment.world_size() > 1:
        raise UsageError("bench wan starts its own ranks: run it without a launcher", code="launcher-refused")
    chosen.round_trips = sorted({0.0, *numbers_of("--round-trips", chosen.round_trips, 0, "1,10,50")})
    chosen.mbit = sorted(set(numbers_of("--mbit", chosen.mbit, 0, "0,100")))
    for name in ("forward_ms", "backward_ms"):
        if getattr(chosen, name) <= 0:
            raise UsageError(f"{flag(name)} {getattr(chosen, name):g} must be above 0", code="option-out-of-range")
    if chosen.capacity is None:
        chosen.capacity = math.ceil(needed_capacity(chosen))
    schedule.workload_of(chosen)
    if chosen.packets < 3 * chosen.capacity:
        raise UsageError(
            f"--packets {chosen.packets} are too few to see a link of capacity {chosen.capacity} in steady state: take "
            f"at least {3 * chosen.capacity}",
            code="option-out-of-range",
        )


def needed_capacity(chosen: argparse.Namespace) -> float:
    """Returns the packets that a link must hold to hide its round trip: 1 + (round trip + transfer) / period.

    A credit comes back one round trip and one transfer after it was taken (docs/links.md); the one more is for the
    packet that the stage is about to take.
    """
    period = chosen.forward_ms + chosen.backward_ms
    slowest = min((mbit for mbit in chosen.mbit if mbit), default=math.inf)
    transfer = packet_bytes(chosen) * 8 / 1000 / slowest
    return float(1 + (max(chosen.round_trips) + transfer) / period)


def packet_bytes(chosen: argparse.Namespace) -> int:
    """Returns the bytes of a micro-batch's activations and targets."""
    return int(chosen.batch * (4 * WIDTH + _TARGET_BYTES))


def _measure(chosen: argparse.Namespace, folder: Path | None) -> None:
    say(wan_report.headline(chosen, packet_bytes(chosen), needed_capacity(chosen)))
    conditions = [Condition(mbit, round_trip) for mbit in chosen.mbit for round_trip in chosen.round_trips]
    figures: dict[str, Any] = {}
    for repeat in range(chosen.repeats):
        for condition in conditions:
            _measure_once(chosen, condition, first=repeat == 0)
            say(f"repeat {repeat + 1}/{chosen.repeats}, {condition.progress()}")
        figures = wan_report.summarize(conditions, chosen, shlex.join(["dpp", *sys.argv[1:]]))
        if folder is not None:  # after every repeat, so that an interrupted command leaves what it has measured
            (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
            wan_report.draw(figures, folder / "share.png")
    say(wan_report.describe(figures, chosen))


def _make_folder(name: str | None) -> Path | None:
    """Makes the folder for the results before anything is measured."""
    if name is None:
        return None
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output {name} cannot be made: {error.strerror}; name another folder", code="folder-unwritable"
        ) from None
    return Path(name)


def _measure_once(chosen: argparse.Namespace, condition: Condition, *, first: bool) -> None:
    """Adds one repeat to the condition, on hosts, connections and processes of its own."""
    with two_hosts(round_trip_seconds=condition.round_trip_ms / 1000, mbit=condition.mbit) as hosts:
        try:
            condition.pings += probe.measure_ping(hosts.start, ADDRESSES[1], _PINGS)
            if first and condition.round_trip_ms == 0:
                condition.stream_mbit = probe.measure_throughput(hosts.start, ADDRESSES[1], _STREAM_SECONDS)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise TrainingError(f"bench wan: {condition}: {error}", code="hosts-unreachable") from error
        figures = _run_ranks(chosen, hosts, str(condition))
    condition.refused = figures["refused"]
    for kind in figures["strategies"]:
        if kind not in figures["refused"]:
            once = {key: values["median"] for key, values in figures[kind].items()}  # the median of one repeat
            condition.repeats.setdefault(kind, []).append(once)


def _run_ranks(chosen: argparse.Namespace, hosts: Hosts, where: str) -> dict[str, Any]:
    """Runs one repeat of `dpp bench schedule`, with a rank on every host and the store on host 0.

    Raises:
        TrainingError: A rank failed.
    """
    with tempfile.TemporaryDirectory(prefix="dpp-wan-") as folder, ExitStack() as files:
        figures = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "decoupled_pp", "bench", "schedule", *_arguments(chosen, figures)]
        errors = [files.enter_context((Path(folder) / f"{rank}.txt").open("w+")) for rank in range(_RANKS)]
        ranks = [hosts.start(rank, command, _variables(rank), errors[rank]) for rank in range(_RANKS)]
        failed = _wait(ranks, time.monotonic() + _bound_seconds(chosen))
        if failed is None:
            found: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))
            return found
        errors[failed].seek(0)
        said = errors[failed].read().strip().splitlines() or ["it said nothing"]
        code = ranks[failed].poll()
        ended = "did not end within its bound" if code is None else f"ended with code {code}"
        raise TrainingError(f"bench wan: {where}: rank {failed} {ended}: {said[-1]}", code="rank-failed")


def _arguments(chosen: argparse.Namespace, output: Path) -> list[str]:
    options = [f"--strategies={','.join(chosen.strategies)}", "--repeats=1", f"--output={output}"]
    names = ["ranks", "micro_batches", "packets", "steps", "forward_ms", "backward_ms", "batch", "capacity", "jitter"]
    names += [name for name in ("slow_factor", "slow_share") if getattr(chosen, name) is not None]
    return options + [f"{flag(name)}={getattr(chosen, name)}" for name in names]


def _variables(rank: int) -> Mapping[str, str]:
    """Returns what torchrun would set for one rank per machine, and gloo's interface."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(_RANKS),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": str(_PORT),
        "GLOO_SOCKET_IFNAME": DEVICE,
        "OMP_NUM_THREADS": "1",
    }


def _bound_seconds(chosen: argparse.Namespace) -> float:
    """Returns far more than a repeat may take: every wait inside the ranks has a bound of its own."""
    packets = chosen.packets + 2 * (chosen.steps + 1) * chosen.micro_batches
    each = chosen.forward_ms + chosen.backward_ms + 10 * max(chosen.round_trips)
    return float(4 * TIMEOUT + len(chosen.strategies) * packets * each / 1000)


def _wait(ranks: list[subprocess.Popen[str]], deadline: float) -> int | None:
    """Waits for all; returns the rank that failed or outstayed the deadline, or None."""
    while True:
        codes = [process.poll() for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            return failed[0]
        if None not in codes:
            return None
        if time.monotonic() > deadline:
            return codes.index(None)
        time.sleep(_POLL_SECONDS)
