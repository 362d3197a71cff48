"""Measures a path between two hosts: round trip by ICMP echo, throughput by one TCP stream.

It is a script of its own (`python -I probe.py ping|listen|flood ...`), because it runs inside a network namespace, and
uses the standard library only, to start quickly.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

PORT = 5201
_ECHO, _REPLY = 8, 0  # RFC 792
_PATIENCE_SECONDS = 5.0
_CHUNK = bytes(1 << 18)

Start = Callable[[int, list[str]], "subprocess.Popen[str]"]
"""Starts a command on host 0 or 1, with its standard output piped."""


def measure_ping(start: Start, address: str, count: int) -> list[float]:
    """Returns `count` round trips from host 0 to `address`, in milliseconds."""
    # The first one, which resolves addresses and wakes everything, does not count.
    milliseconds: list[float] = json.loads(_output(start(0, _script("ping", address, str(count + 1)))))
    return milliseconds[1:]


def measure_throughput(start: Start, address: str, seconds: float) -> float:
    """Returns the Mbit/s of one TCP stream from host 0 to host 1 at `address`, headers left out."""
    listener = start(1, _script("listen", address))
    try:
        if listener.stdout is not None:
            listener.stdout.readline()  # until it listens
        _output(start(0, _script("flood", address, str(seconds))))
        mbit: float = json.loads(_output(listener))
    finally:
        listener.kill()
        listener.wait()
    return mbit


def _script(*arguments: str) -> list[str]:
    return [sys.executable, "-I", __file__, *arguments]


def _output(process: subprocess.Popen[str]) -> str:
    with process:
        try:
            text, _ = process.communicate(timeout=12 * _PATIENCE_SECONDS)
        finally:
            process.kill()
    if process.returncode:
        raise OSError(f"the path between the two hosts does not work: {' '.join(process.args)}")  # type: ignore[arg-type]
    return text


def _ping(address: str, count: int) -> list[float]:
    times = []
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as echo:
        echo.settimeout(_PATIENCE_SECONDS)
        mark = os.getpid() & 0xFFFF
        for number in range(count):
            head = struct.pack("!BBHHH", _ECHO, 0, 0, mark, number)
            packet = struct.pack("!BBHHH", _ECHO, 0, _checksum(head), mark, number)
            sent = time.perf_counter()
            echo.sendto(packet, (address, 0))
            while True:
                reply = echo.recv(1024)[20:]  # after the IP header
                if reply[0] == _REPLY and struct.unpack("!HH", reply[4:8]) == (mark, number):
                    break
            times.append((time.perf_counter() - sent) * 1000)
            time.sleep(0.01)
    return times


def _checksum(data: bytes) -> int:
    """Returns the checksum of RFC 1071 of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def _listen(address: str) -> float:
    """Accepts one stream; returns the Mbit/s between its first byte and its last."""
    with socket.create_server((address, PORT)) as server:
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        server.settimeout(_PATIENCE_SECONDS)
        stream, _ = server.accept()
        with stream:
            stream.settimeout(_PATIENCE_SECONDS)
            buffer = bytearray(len(_CHUNK))
            received = stream.recv_into(buffer)
            start = time.perf_counter()
            while taken := stream.recv_into(buffer):
                received += taken
            return received * 8 / (time.perf_counter() - start) / 1e6


def _flood(address: str, seconds: float) -> None:
    with socket.create_connection((address, PORT), timeout=_PATIENCE_SECONDS) as stream:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            stream.sendall(_CHUNK)


def main(arguments: Sequence[str]) -> int:
    """Runs one side of a measurement; writes its result to standard output as JSON."""
    role, address, *more = arguments
    if role == "ping":
        sys.stdout.write(json.dumps(_ping(address, int(more[0]))))
    elif role == "listen":
        sys.stdout.write(json.dumps(_listen(address)))
    else:
        _flood(address, float(more[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
