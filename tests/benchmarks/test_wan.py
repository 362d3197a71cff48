"""`dpp bench wan`: the delay line keeps order and time, its command cleans up, and says why where it cannot run."""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks import delay_line, two_hosts, wan, wan_report
from decoupled_pp.core.errors import UsageError
from kit import refused, run_dpp

DELAY, PACKETS = 0.02, 60
NAMESPACES = Path("/run/netns")
TINY = ["--strategies=decoupled,1f1b", "--round-trips=10", "--mbit=100", "--packets=16", "--steps=1", "--repeats=1"]
TINY += ["--forward-ms=1", "--backward-ms=2", "--batch=64"]

# ------------------------------------------------------------------------------------------------------ the delay line


@pytest.fixture
def cable():
    """A running delay line; the two sockets at its ends."""
    with ExitStack() as opened:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        stop, ended = socket.socketpair()
        for one in (*pairs[0], *pairs[1], stop, ended):
            opened.enter_context(one)
        inner = tuple(pair[1] for pair in pairs)
        for one in inner:
            one.setblocking(False)
        line = delay_line.DelayLine((inner[0].fileno(), inner[1].fileno()), DELAY)
        thread = threading.Thread(target=line.run, args=(stop.fileno(),), name="dpp-delay-line")
        thread.start()
        for pair in pairs:
            pair[0].settimeout(300.0)
        yield pairs[0][0], pairs[1][0]
        ended.close()
        thread.join(10.0)
        assert not thread.is_alive()


def test_packets_arrive_in_order_and_none_before_its_time_both_ways(cable):
    sent = ([], [])
    for number in range(PACKETS):
        for end, times in zip(cable, sent, strict=True):
            times.append(time.monotonic())
            end.send(b"%d" % number + bytes(random.randrange(200)))
        time.sleep(random.choice((0.0, 0.0005)))
    for end, times in zip(reversed(cable), sent, strict=True):
        for number, start in enumerate(times):
            assert int(end.recv(1000).rstrip(b"\0")) == number
            assert time.monotonic() - start >= DELAY


def test_a_packet_is_held_until_its_time():
    now = [0.0]
    (first, source), (sink, last) = (socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
    with first, source, sink, last:
        source.setblocking(False)
        last.setblocking(False)
        way = delay_line.Direction(source.fileno(), sink.fileno(), 1.0, lambda: now[0])
        assert way.due() == float("inf")
        for now[0] in (0.0, 0.25):
            first.send(b"%g" % now[0])
            way.take()
        for now[0], arrived in ((0.5, None), (1.0, b"0"), (1.125, None), (1.5, b"0.25")):
            way.deliver()
            assert _received(last) == arrived
        assert way.due() == float("inf") and way.lost == 0


def _received(end):
    try:
        return end.recv(100)
    except BlockingIOError:
        return None


def test_a_device_that_is_down_loses_the_packet():
    first, source = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with first, source:
        source.setblocking(False)
        down = os.open(os.devnull, os.O_RDONLY)
        way = delay_line.Direction(source.fileno(), down, 0.0, time.monotonic)
        first.send(b"packet")
        way.take()
        way.deliver()
        os.close(down)
        assert way.lost == 1


# --------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("option", "code", "part"),
    [
        ("--round-trips=1,fast", "option-unreadable", "--round-trips 1,fast"),
        ("--round-trips=-1", "option-unreadable", "--round-trips -1"),
        ("--mbit=nan", "option-unreadable", "--mbit nan"),
        ("--batch=0", "option-out-of-range", "--batch 0"),
        ("--forward-ms=0", "option-out-of-range", "--forward-ms 0"),
        ("--capacity=0", "option-out-of-range", "--capacity 0"),
        ("--packets=20", "option-out-of-range", "a link of capacity 9 in steady state: take at least 27"),
        ("--strategies=1f2b", "unknown-strategy", "'1f2b'"),
        ("--steps=0", "option-out-of-range", "--steps 0"),
    ],
)
def test_bad_input(option, code, part):
    with refused(code, UsageError, part):
        run_dpp("bench", "wan", option)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ((os, "geteuid", lambda: 1000), "making network namespaces needs root; run it with sudo"),
        ((two_hosts.shutil, "which", lambda _tool: None), "the command ip is missing; install the package iproute2"),
        ((delay_line, "TUN", "/nowhere/tun"), "/nowhere/tun is missing; modprobe tun"),
        ((two_hosts.sys, "platform", "darwin"), "network namespaces exist on Linux only"),
    ],
)
def test_says_why_nothing_can_be_measured(monkeypatch, capsys, change, why):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(two_hosts.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(delay_line, "TUN", os.devnull)
    monkeypatch.setattr(*change)
    assert run_dpp("bench", "wan") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"dpp bench wan: nothing measured: {why}") and said.count("\n") == 1


def test_capacity_covers_round_trip_and_transfer():
    chosen = argparse.Namespace(forward_ms=10, backward_ms=20, round_trips=[0.0, 60.0], mbit=[0.0], batch=512)
    assert wan.needed_capacity(chosen) == 1 + 60 / 30
    chosen.mbit = [0.0, 100.0]
    assert wan.needed_capacity(chosen) == pytest.approx(1 + (60 + 512 * 264 * 8 / 1e5) / 30)


def test_shares_are_of_the_same_repeat_and_limit(tmp_path):
    conditions = []
    for mbit, periods in ((0.0, (30.0, 40.0)), (100.0, (60.0, 60.0))):
        for trip, factor in ((0.0, 1.0), (50.0, 2.0)):
            once = {"share_of_ideal": 0.5, "measured_to_predicted": 1.01}
            repeats = {"decoupled": [{"period_ms": p * factor, **once} for p in periods]}
            conditions.append(wan_report.Condition(mbit, trip, [trip], repeats=repeats, refused={"zbv": "too few"}))
    chosen = argparse.Namespace(strategies=["decoupled", "zbv"], repeats=2)
    figures = wan_report.summarize(conditions, chosen, "dpp bench wan")
    shares = [one["summary"]["decoupled"]["share_of_zero_latency"] for one in figures["conditions"]]
    assert [share["min"] for share in shares] == [share["max"] for share in shares] == [1.0, 0.5, 1.0, 0.5]
    text = wan_report.describe(figures, chosen)
    assert "zbv: not measured: too few\n" in text
    assert "| no limit | 50 | 50.00 | 0.500 (0.500 .. 0.500) | refused |" in text
    wan_report.draw(figures, tmp_path / "share.png")
    assert (tmp_path / "share.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------------- two real hosts


def _require_hosts():
    try:
        two_hosts.check_available()
        with two_hosts.two_hosts(round_trip_seconds=0.0, mbit=100):
            pass
    except two_hosts.UnavailableError as error:
        pytest.skip(str(error))


def _start(*arguments):
    command = [sys.executable, "-m", "decoupled_pp", "bench", "wan", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def _namespaces_of(process):
    return sorted(NAMESPACES.glob(f"dpp-wan-{process.pid}-*"))


@pytest.mark.slow
def test_measures_over_two_hosts_and_leaves_nothing(tmp_path):
    _require_hosts()
    with _start(*TINY, f"--output={tmp_path}") as process:
        said, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert [one["round_trip_ms"] for one in figures["conditions"]] == [0.0, 10.0]
    slow = figures["conditions"][1]
    assert slow["ping_ms"]["min"] >= 10.0
    assert slow["repeats"]["decoupled"][0]["period_ms"] >= 3.0
    assert slow["repeats"]["1f1b"][0]["period_ms"] * 4 >= 2 * 10.0  # out and back, at least twice per step
    assert "| 100 Mbit/s | 10 | " in said
    assert (tmp_path / "share.png").exists()
    assert _namespaces_of(process) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_cleans_up_however_it_ends(number, code):
    _require_hosts()
    with _start(*TINY) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()  # the headline is out: the hosts of the first condition come next
        _eventually(lambda: _processes_in(_namespaces_of(process)[:1]))  # a probe, or a rank
        inside = _processes_in(_namespaces_of(process))
        process.send_signal(number)
        process.communicate(timeout=300)
    assert process.returncode == code
    _eventually(lambda: _namespaces_of(process) == [])
    _eventually(lambda: not any(Path(f"/proc/{one}").exists() for one in inside))


def _processes_in(namespaces):
    commands = [["ip", "netns", "pids", one.name] for one in namespaces]
    return [n for c in commands for n in subprocess.run(c, capture_output=True, text=True, check=False).stdout.split()]


def _eventually(holds):
    deadline = time.monotonic() + 300.0
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
