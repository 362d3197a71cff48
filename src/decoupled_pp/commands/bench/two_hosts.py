"""Two hosts on one machine: two network namespaces, joined by a delay line and nothing else, gone when it is over.

with two_hosts(round_trip_seconds=0.05, mbit=100, mtu=9000) as hosts:
    hosts.start(0, ["ping", ADDRESSES[1]])
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from decoupled_pp.commands.bench import delay_line
from decoupled_pp.core import environment
from decoupled_pp.core.errors import TrainingError

ADDRESSES = ("10.99.0.1", "10.99.0.2")
DEVICE = "dpp0"
_PATIENCE_SECONDS = 20.0
_BURST_BYTES = 32768  # of the rate limit: 2.6 ms at 100 Mbit/s
_QUEUE_MEGABYTES = 16  # of the rate limit: more than TCP keeps there, so that it never loses a packet
_QUEUE_PACKETS = 10000
_KERNEL = {
    "ipv4/tcp_rmem": "4096 4194304 67108864",  # bytes; the largest covers 1 Gbit/s at 200 ms twice
    "ipv4/tcp_wmem": "4096 4194304 67108864",
    "ipv4/tcp_slow_start_after_idle": "0",  # a pause between two packets must not shrink the window
    "ipv4/tcp_no_metrics_save": "1",  # nothing learnt from one measurement may help the next
    "ipv4/tcp_congestion_control": "cubic",  # Linux's default, and always there
    "ipv6/conf/default/disable_ipv6": "1",
}
"""Settings of both namespaces, below /proc/sys/net. (net.core.rmem_max bounds SO_RCVBUF only, which gloo leaves.)"""


class UnavailableError(TrainingError):
    """Two hosts cannot be made here; says why and how to get them."""


def check_available() -> None:
    """Look for what two hosts need, before anything is made.

    Raises:
        UnavailableError: Something is missing.
    """
    if sys.platform != "linux":
        raise UnavailableError("network namespaces exist on Linux only")
    if os.geteuid() != 0:
        raise UnavailableError("making network namespaces needs root; run it with sudo")
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        raise UnavailableError(f"the command {missing[0]} is missing; install the package iproute2")
    if not Path(delay_line.TUN).exists():
        raise UnavailableError(f"{delay_line.TUN} is missing; modprobe tun (docker: --device {delay_line.TUN})")


class Hosts:
    """The two hosts, 0 and 1, with the addresses of `ADDRESSES` on the interface `DEVICE`."""

    def __init__(self, names: tuple[str, str]) -> None:
        """Take over namespaces, which exist."""
        self._names = names
        self._started: list[subprocess.Popen[str]] = []

    def start(
        self,
        host: int,
        command: list[str],
        variables: Mapping[str, str] | None = None,
        errors: IO[str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command on a host.

        Args:
            host: 0 or 1.
            command: Program and arguments.
            variables: Environment variables besides those of this process.
            errors: Where standard error goes; None: to ours.

        Returns:
            The process, with its standard output piped; it is killed with the hosts.
        """
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._names[host], *command],
            env=environment.with_variables(variables or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C is for the command, which ends its processes itself
        )
        self._started.append(process)
        return process

    def kill(self) -> None:
        """Kill what was started and still runs."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@contextmanager
def two_hosts(*, round_trip_seconds: float, mbit: float, mtu: int) -> Iterator[Hosts]:
    """Make two hosts; on leaving, however, processes, devices and namespaces are gone.

    Args:
        round_trip_seconds: Half of it in each direction.
        mbit: Limit of each direction in Mbit/s by the kernel's token bucket (tbf); 0: none.
        mtu: Bytes of the largest IP packet; fewer packets cost the delay line less time.

    Raises:
        UnavailableError: This machine does not let us.
    """
    names = (f"dpp-wan-{os.getpid()}-0", f"dpp-wan-{os.getpid()}-1")
    hosts, cable = Hosts(names), None
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        cable = _lay_cable(round_trip_seconds / 2, names)
        for name, address in zip(names, ADDRESSES, strict=True):
            _configure(name, address, mbit, mtu)
        yield hosts
    finally:
        hosts.kill()
        if cable is not None:
            _take_up(cable)
        for name in names:
            delay_line.remove(name)


def _lay_cable(delay_seconds: float, names: tuple[str, str]) -> subprocess.Popen[str]:
    """Start the delay line; it ends with its standard input, also if this process is killed."""
    cable = subprocess.Popen(
        [sys.executable, "-I", delay_line.__file__, str(delay_seconds), DEVICE, *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    line = cable.stdout.readline().strip() if cable.stdout is not None else ""
    if line != delay_line.READY:
        _take_up(cable)
        raise UnavailableError(f"this kernel or container does not allow TUN devices in network namespaces ({line})")
    return cable


def _take_up(cable: subprocess.Popen[str]) -> None:
    with cable:  # closes its standard input
        try:
            cable.communicate(timeout=_PATIENCE_SECONDS)
        finally:
            cable.kill()


def _configure(name: str, address: str, mbit: float, mtu: int) -> None:
    """Address, limits and kernel settings of one host."""
    for setting, value in _KERNEL.items():
        _run("ip", "netns", "exec", name, "sh", "-c", f"echo {value} > /proc/sys/net/{setting}", required=False)
    _run("ip", "-n", name, "link", "set", "lo", "up")
    _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
    _run("ip", "-n", name, "link", "set", DEVICE, "mtu", str(mtu), "txqueuelen", str(_QUEUE_PACKETS), "up")
    if mbit:
        burst = max(_BURST_BYTES, 2 * mtu)  # tbf drops a packet that is larger
        limits = ("burst", f"{burst}b", "limit", f"{_QUEUE_MEGABYTES}mb")
        _run("tc", "-n", name, "qdisc", "add", "dev", DEVICE, "root", "tbf", "rate", f"{mbit}mbit", *limits)


def _run(*command: str, required: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_SECONDS)
    if required and done.returncode:
        cause = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UnavailableError(
            f"this kernel or container does not allow it: {' '.join(command)}: {cause}; try another machine, or docker "
            "run --privileged"
        )
