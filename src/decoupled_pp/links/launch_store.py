"""The store through which the ranks of a launch meet; where it is ours to make, it listens at one address only."""

from __future__ import annotations

import errno
import ipaddress
import socket
from datetime import timedelta

import torch.distributed as dist

from decoupled_pp.core import environment
from decoupled_pp.core.errors import UsageError

LOOPBACK = "127.0.0.1"

_hosted: dict[tuple[str, int], dist.TCPStore] = {}
"""The stores that this process is the host of: a port can be listened at once."""


def store_of_launch(timeout_seconds: float) -> dist.Store:
    """Return the launch's store, under keys of this attempt: the launcher's, or by hand that of rank 0."""
    address, port = environment.master()
    timeout = timedelta(seconds=timeout_seconds)
    if environment.rank() == 0 and not environment.launcher_has_store():
        if (address, port) not in _hosted:
            _hosted[address, port] = listening_store(address, port, timeout)
        store = _hosted[address, port]
    else:
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    # torchrun's store outlives a restart of the workers, and so does what the attempt before has left in it.
    return dist.PrefixStore(f"dpp/attempt-{environment.restart_count()}", store)


def listening_store(address: str, port: int, timeout: timedelta = timedelta(minutes=5)) -> dist.TCPStore:
    """Return a store that other processes find at the address; port 0 is any free one."""
    listener = _listener(address, port)
    return dist.TCPStore(
        address,
        port if listener is None else listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=None if listener is None else listener.detach(),
    )


def close_stores() -> None:
    """Stop listening."""
    _hosted.clear()


def _listener(address: str, port: int) -> socket.socket | None:
    """Return a socket that listens at the address and at no other; None if it is not this machine's own."""
    family, place = _own_address(address, port)
    if place is None:  # torch listens at every address then
        return None
    try:
        return socket.create_server(place, family=family, backlog=1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"MASTER_PORT {port}: something listens there already, perhaps another run; give each run a free port",
                code="port-in-use",
            ) from None
        return None  # an address that a router translates


def _own_address(address: str, port: int) -> tuple[int, tuple[str, int] | None]:
    try:
        family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        return socket.AF_INET, None
    host = str(place[0])
    # Some systems map their own name to the loopback address: what others reach by that name is another one.
    if ipaddress.ip_address(host).is_loopback and address not in (host, "localhost"):
        return socket.AF_INET, None
    return family, (host, port)
