"""A cable with a delay: forwards packets between two TUN devices, each in a network namespace of its own.

    namespace 0                          this process                          namespace 1
    TCP/IP -- dpp0 (TUN) -- read --> [ waits until it is due ] -- write --> dpp0 (TUN) -- TCP/IP
                   write <-- [ waits until it is due ] <-- read

It is a script of its own (`python -I delay_line.py SECONDS DEVICE NAMESPACE NAMESPACE`) with the standard library only,
because it changes its network namespace, which a process with other work must not, and because it must start quickly.
It ends when its standard input does, and removes the namespaces with their processes: nothing outlives the command that
started it, even if that is killed. Linux only; TUN devices as in the kernel's Documentation/networking/tuntap.rst.
"""

from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path
from struct import pack

READY = "ready"
TUN = "/dev/net/tun"
_SET_INTERFACE, _IS_TUN, _NO_PACKET_INFORMATION = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of linux/sched.h
_LARGEST_PACKET = 65536
_BATCH = 32  # packets read at once, before those that are due are written


class Direction:
    """One direction of a cable: packets leave in the order in which they came, and none before its time.

    Attributes:
        source: Non-blocking file descriptor, one packet per read.
        lost: Packets that the sink did not take.
    """

    def __init__(self, source: int, sink: int, delay_seconds: float, clock: Callable[[], float]) -> None:
        """Joins `source` to `sink`."""
        self.source = source
        self.lost = 0
        self._sink = sink
        self._delay = delay_seconds
        self._clock = clock
        self._held: deque[tuple[float, bytes]] = deque()

    def take(self) -> None:
        """Reads the packets that have come, at most one batch."""
        with suppress(BlockingIOError):
            for _ in range(_BATCH):
                packet = os.read(self.source, _LARGEST_PACKET)
                self._held.append((self._clock() + self._delay, packet))

    def deliver(self) -> None:
        """Writes the packets that are due; a device that is down loses them, as a pulled plug would."""
        held = self._held
        while held and held[0][0] <= self._clock():
            try:
                os.write(self._sink, held.popleft()[1])
            except OSError:
                self.lost += 1

    def due(self) -> float:
        """Returns when the next packet is to leave; infinity if none is held."""
        return self._held[0][0] if self._held else float("inf")


class DelayLine:
    """Both directions of a cable."""

    def __init__(
        self, ends: tuple[int, int], delay_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Joins two file descriptors.

        Args:
            ends: Non-blocking file descriptors, one packet per read and per write.
            delay_seconds: Delay of one direction, half the round trip.
            clock: Returns seconds; never goes back.
        """
        first, second = ends
        self.directions = (
            Direction(first, second, delay_seconds, clock),
            Direction(second, first, delay_seconds, clock),
        )
        self._clock = clock

    def run(self, stop: int) -> None:
        """Forwards until the file descriptor `stop` is readable (or at its end)."""
        sources = [direction.source for direction in self.directions]
        while True:
            wait = min(direction.due() for direction in self.directions) - self._clock()
            timeout = None if wait == float("inf") else max(0.0, wait)
            # Not epoll: its timeout rounds up to whole milliseconds, that of select counts microseconds.
            readable, _, _ = select.select([*sources, stop], [], [], timeout)
            if stop in readable:
                return
            for direction in self.directions:
                if direction.source in readable:
                    direction.take()
                direction.deliver()


def open_tun(namespace: str, device: str) -> int:
    """Moves this process into a named network namespace and makes a TUN device there, which lasts while it is open.

    Without IFF_VNET_HDR the kernel leaves no segmentation to us: a read is one IP packet of at most the device's MTU.

    Args:
        namespace: Name that was given to `ip netns add`.
        device: Name of the device.

    Returns:
        Its file descriptor, non-blocking.

    Raises:
        OSError: There is no such namespace, no TUN, or no right to use them.
    """
    library = ctypes.CDLL(None, use_errno=True)
    handle = os.open(Path("/run/netns") / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if library.setns(handle, _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
    finally:
        os.close(handle)
    opened = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    ioctl(opened, _SET_INTERFACE, pack("16sH22x", device.encode(), _IS_TUN | _NO_PACKET_INFORMATION))
    return opened


def remove(namespace: str) -> None:
    """Kills the processes in a namespace and removes it; one that does not exist any more is no fault."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    for process in map(int, listed.stdout.split()):
        if process != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", namespace], stderr=subprocess.DEVNULL, check=False)


def main(arguments: Sequence[str]) -> int:
    """Makes the devices, says READY, forwards until standard input ends; returns 1, with one line, if it cannot."""
    seconds, device, *namespaces = arguments
    gc.disable()  # there are no reference cycles, and a collection would hold packets up
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)  # a cable must not wait for a processor
    try:
        first, second = (open_tun(name, device) for name in namespaces)
        sys.stdout.write(f"{READY}\n")
        sys.stdout.flush()
        DelayLine((first, second), float(seconds)).run(sys.stdin.fileno())
    except OSError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    finally:
        for name in namespaces:
            remove(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
