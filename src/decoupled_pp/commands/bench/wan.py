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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from decoupled_pp.commands.bench import probe, schedule, wan_report
from decoupled_pp.commands.bench.contestants import TIMEOUT, WIDTH
from decoupled_pp.commands.bench.two_hosts import (
    ADDRESSES,
    DEVICE,
    Hosts,
    UnavailableError,
    check_available,
    two_hosts,
)
from decoupled_pp.commands.bench.wan_report import Condition
from decoupled_pp.core import environment
from decoupled_pp.core.errors import TrainingError, UsageError

_RANKS, _PORT = 2, 29500
_STRATEGIES = "decoupled,1f1b,gpipe,zero_bubble,zbv,interleaved_1f1b"
_PINGS, _FLOOD_SECONDS = 10, 1.5
_SAMPLE_BYTES = 4 * WIDTH + 8  # float32 features and an int64 target
_POLL_SECONDS = 0.05
_MTU = range(1280, 65521)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    schedule.add_work_arguments(parser)
    parser.add_argument("--round-trips", default="1,10,50,200", help="ms, comma-separated; 0 is always measured")
    parser.add_argument("--mbit", default="0,100", help="limits of each direction, comma-separated; 0: none")
    parser.add_argument("--mtu", type=int, default=9000, help="bytes of the largest IP packet")
    parser.add_argument("--output", help="folder for figures.json, log.txt and share.png")
    # A packet of 135 KB, so that 100 Mbit/s matter: a third of them at 30 ms per packet, and 11 ms of transfer.
    parser.set_defaults(strategies=_STRATEGIES, micro_batches=4, steps=2, batch=512, capacity=None)
    parser.set_defaults(ranks=_RANKS, run=run_command)


def run_command(chosen: argparse.Namespace) -> int:
    """Measure every condition in turn, `repeats` times; where two hosts cannot be made, say so and end well."""
    _check(chosen)
    try:
        check_available()
        for mbit in chosen.mbit:
            with two_hosts(round_trip_seconds=0.0, mbit=mbit, mtu=chosen.mtu):
                pass  # it can be done
    except UnavailableError as error:
        sys.stdout.write(f"dpp bench wan: nothing measured: {error}\n")
        return 0
    with _Output(chosen.output) as output:
        _measure(chosen, output)
    return 0


def _check(chosen: argparse.Namespace) -> None:
    """Check the arguments and fill in what follows from others.

    Raises:
        UsageError: One of them cannot be honoured.
    """
    if environment.world_size() > 1:
        raise UsageError("bench wan starts its own ranks: run it without a launcher")
    schedule.check_work(chosen, "wan")
    chosen.round_trips = sorted({0.0, *_numbers("--round-trips", chosen.round_trips)})
    chosen.mbit = sorted(set(_numbers("--mbit", chosen.mbit)))
    if chosen.batch < 1 or min(chosen.forward_ms, chosen.backward_ms) <= 0:
        raise UsageError(
            f"bench wan needs --batch of at least 1, --forward-ms and --backward-ms above 0, not {chosen.batch}, "
            f"{chosen.forward_ms:g} and {chosen.backward_ms:g}"
        )
    if chosen.mtu not in _MTU:
        raise UsageError(f"--mtu {chosen.mtu} must be {_MTU.start} to {_MTU.stop - 1} bytes")
    if chosen.capacity is None:
        chosen.capacity = math.ceil(needed_capacity(chosen))
    if chosen.capacity < 1:
        raise UsageError(f"--capacity {chosen.capacity} must be at least 1")
    if chosen.packets < 3 * chosen.capacity:
        raise UsageError(
            f"--packets {chosen.packets} are too few to see a link of capacity {chosen.capacity} in steady state: take "
            f"at least {3 * chosen.capacity}"
        )


def _numbers(option: str, text: str) -> list[float]:
    """Comma-separated numbers from 0."""
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = [-1.0]
    if not all(0 <= number < math.inf for number in numbers):
        raise UsageError(f"{option} {text}: must be comma-separated numbers of at least 0, such as 1,10,50")
    return numbers


def needed_capacity(chosen: argparse.Namespace) -> float:
    """Packets that a link must hold for its round trip to stay hidden: 1 + (round trip + transfer) / period.

    A credit comes back one round trip and one transfer after it was taken (docs/links.md); the one more is for the
    packet that the stage is about to take.
    """
    period = chosen.forward_ms + chosen.backward_ms
    slowest = min((mbit for mbit in chosen.mbit if mbit), default=math.inf)
    transfer = packet_bytes(chosen) * 8 / 1000 / slowest
    return float(1 + (max(chosen.round_trips) + transfer) / period)


def packet_bytes(chosen: argparse.Namespace) -> int:
    """Activations and targets of a micro-batch."""
    return int(chosen.batch * _SAMPLE_BYTES)


class _Output:
    """What is printed, and the folder that keeps it."""

    def __init__(self, folder: str | None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._log: IO[str] | None = None

    def __enter__(self) -> _Output:
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._log = (self._folder / "log.txt").open("w", encoding="utf-8")
            except OSError as error:
                raise UsageError(
                    f"--output {self._folder}: cannot be written ({error}); name another folder"
                ) from error
        return self

    def __exit__(self, *_error: object) -> None:
        if self._log is not None:
            self._log.close()

    def say(self, text: str, *, details: bool = False) -> None:
        """One or more lines; details go to the log only."""
        for stream in (None if details else sys.stdout, self._log):
            if stream is not None:
                stream.write(text.rstrip() + "\n")
                stream.flush()

    def keep(self, figures: dict[str, Any]) -> None:
        """Write what is measured so far."""
        if self._folder is not None:
            (self._folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
            wan_report.draw(figures, self._folder / "share.png")


def _measure(chosen: argparse.Namespace, output: _Output) -> None:
    output.say(wan_report.headline(chosen, packet_bytes(chosen), needed_capacity(chosen)))
    conditions = [Condition(mbit, trip) for mbit in chosen.mbit for trip in chosen.round_trips]
    for repeat in range(chosen.repeats):
        for condition in conditions:
            _measure_once(chosen, condition, first=repeat == 0)
            output.say(f"repeat {repeat + 1}/{chosen.repeats}, {condition.progress()}")
        figures = wan_report.summarize(conditions, chosen, shlex.join(["dpp", *sys.argv[1:]]))
        output.keep(figures)  # what is measured stays, whatever comes next
    output.say(wan_report.details(figures, chosen), details=True)
    output.say(wan_report.describe(figures, chosen))


def _measure_once(chosen: argparse.Namespace, condition: Condition, *, first: bool) -> None:
    """Add one repeat to the condition, on hosts, connections and processes of its own."""
    trip, mbit = condition.round_trip_ms, condition.mbit
    with two_hosts(round_trip_seconds=trip / 1000, mbit=mbit, mtu=chosen.mtu) as hosts:
        try:
            condition.pings += probe.measure_ping(hosts.start, ADDRESSES[1], _PINGS)
            if first and trip == 0:
                condition.stream_mbit = probe.measure_throughput(hosts.start, ADDRESSES[1], _FLOOD_SECONDS)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise TrainingError(f"bench wan: {condition}: {error}") from error
        figures = _run_ranks(chosen, hosts, f"{condition}")
    condition.refused = figures["refused"]
    for kind in figures["strategies"]:
        if kind in figures["refused"]:
            continue
        once = {key: values["median"] for key, values in figures[kind].items()}  # of one repeat
        condition.repeats.setdefault(kind, []).append(once)


def _run_ranks(chosen: argparse.Namespace, hosts: Hosts, where: str) -> dict[str, Any]:
    """`dpp bench schedule`, one repeat, with a rank on every host and the store on host 0.

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
        raise TrainingError(f"bench wan: {where}: rank {failed} {ended}: {said[-1]}")


def _arguments(chosen: argparse.Namespace, output: Path) -> Iterator[str]:
    yield from (f"--strategies={','.join(chosen.strategies)}", "--repeats=1", f"--output={output}")
    for name in ("ranks", "micro_batches", "packets", "steps", "forward_ms", "backward_ms", "batch", "capacity"):
        yield f"--{name.replace('_', '-')}={getattr(chosen, name)}"


def _variables(rank: int) -> Mapping[str, str]:
    """What torchrun would set for one rank per machine, and gloo's interface."""
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
    """Far more than a repeat may take: every wait inside the ranks has a bound of its own."""
    packets = chosen.packets + 2 * (chosen.steps + 1) * chosen.micro_batches
    each = chosen.forward_ms + chosen.backward_ms + 10 * max(chosen.round_trips)
    return float(4 * TIMEOUT + len(chosen.strategies) * packets * each / 1000)


def _wait(ranks: list[subprocess.Popen[str]], deadline: float) -> int | None:
    """Wait for all; the rank that failed or outstayed the deadline, or None."""
    while True:
        codes = [process.poll() for process in ranks]
        if failed := [rank for rank, code in enumerate(codes) if code]:
            return failed[0]
        if None not in codes:
            return None
        if time.monotonic() > deadline:
            return codes.index(None)
        time.sleep(_POLL_SECONDS)
