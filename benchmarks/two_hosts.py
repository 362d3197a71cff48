"""Makes two hosts of one machine: two network namespaces, joined by a delay line only, and removed at the end.

with two_hosts(round_trip_seconds=0.05, mbit=100) as hosts:
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

from benchmarks import delay_line
from decoupled_pp.core import environment
from decoupled_pp.core.errors import TrainingError

ADDRESSES = ("10.99.0.1", "10.99.0.2")
DEVICE = "dpp0"
_PATIENCE_SECONDS = 20.0
_MTU = 9000  # fewer packets cost the delay line less time
_BURST_BYTES = 32768  # of the rate limit: 2.6 ms at 100 Mbit/s; tbf drops a packet that is larger
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
"""Settings of both namespaces, below /proc/sys/net. (net.core.rmem_max bounds SO_RCVBUF, which gloo does not set.)"""


class UnavailableError(TrainingError):
    """Raised when two hosts cannot be made here; its text says why and how to get them."""

    def __init__(self, text: str) -> None:
        """Stores the text."""
        super().__init__(text, code="hosts-unavailable")


def check_available() -> None:
    """Looks for what two hosts need, before anything is made.

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
    """Hosts 0 and 1, with the addresses of `ADDRESSES` on the interface `DEVICE`."""

    def __init__(self, names: tuple[str, str]) -> None:
        """Takes over two existing namespaces."""
        self._names = names
        self._started: list[subprocess.Popen[str]] = []

    def start(
        self,
        host: int,
        command: list[str],
        variables: Mapping[str, str] | None = None,
        errors: IO[str] | None = None,
    ) -> subprocess.Popen[str]:
        """Starts a command on a host.

        Args:
            host: 0 or 1.
            command: Program and arguments.
            variables: Environment variables besides those of this process.
            errors: File for its standard error; None: ours.

        Returns:
            The process, with its standard output piped; it is killed when the hosts are removed.
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
        """Kills the started processes that still run."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@contextmanager
def two_hosts(*, round_trip_seconds: float, mbit: float) -> Iterator[Hosts]:
    """Makes two hosts; at the end of the context, however it comes, processes, devices and namespaces are removed.

    Args:
        round_trip_seconds: Delay in both directions together.
        mbit: Limit of each direction in Mbit/s by the kernel's token bucket (tbf); 0: none.

    Raises:
        UnavailableError: This machine does not allow it.
    """
    names = (f"dpp-wan-{os.getpid()}-0", f"dpp-wan-{os.getpid()}-1")
    hosts = Hosts(names)
    cable = None
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        cable = _lay_cable(round_trip_seconds / 2, names)
        for name, address in zip(names, ADDRESSES, strict=True):
            _configure(name, address, mbit)
        yield hosts
    finally:
        hosts.kill()
        if cable is not None:
            _end(cable)
        for name in names:
            delay_line.remove(name)


def _lay_cable(delay_seconds: float, names: tuple[str, str]) -> subprocess.Popen[str]:
    """Starts the delay line; it ends with its standard input, also if this process is killed."""
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
        _end(cable)
        raise UnavailableError(f"this kernel or container does not allow TUN devices in network namespaces ({line})")
    return cable


def _end(cable: subprocess.Popen[str]) -> None:
    with cable:  # closes its standard input, at which it removes the namespaces and ends
        try:
            cable.communicate(timeout=_PATIENCE_SECONDS)
        finally:
            cable.kill()


def _configure(name: str, address: str, mbit: float) -> None:
    """Sets address, limits and kernel settings of one host."""
    for setting, value in _KERNEL.items():
        _run("ip", "netns", "exec", name, "sh", "-c", f"echo {value} > /proc/sys/net/{setting}", required=False)
    _run("ip", "-n", name, "link", "set", "lo", "up")
    _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
    _run("ip", "-n", name, "link", "set", DEVICE, "mtu", str(_MTU), "txqueuelen", str(_QUEUE_PACKETS), "up")
    if mbit:
        limits = ("burst", f"{_BURST_BYTES}b", "limit", f"{_QUEUE_MEGABYTES}mb")
        _run("tc", "-n", name, "qdisc", "add", "dev", DEVICE, "root", "tbf", "rate", f"{mbit}mbit", *limits)


def _run(*command: str, required: bool = True) -> None:
    """Runs a command of the system; only a required one must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_SECONDS)
    if required and done.returncode:
        cause = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UnavailableError(
            f"this kernel or container does not allow it: {' '.join(command)}: {cause}; try another machine, or docker "
            "run --privileged"
        )
