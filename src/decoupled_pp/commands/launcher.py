"""Starts the ranks of `dpp train --ranks N` on this machine, with torchrun's own launcher in this process."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import uuid

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from decoupled_pp.commands.terminal import INTERRUPTED, USAGE, say
from decoupled_pp.core import environment
from decoupled_pp.links.launch_store import LOOPBACK, listening_store

_SIGNAL = 128
"""A shell's exit code of a process that a signal ended is this plus the signal's number."""


def launch(arguments: list[str], ranks: int, *, max_restarts: int, grace_seconds: float) -> int:
    """Runs `python -m decoupled_pp ARGUMENTS` on `ranks` ranks, as `torchrun --standalone` does.

    Args:
        arguments: Command line of every rank.
        ranks: Number of ranks.
        max_restarts: How often a failed run is started again; one that ends for bad input would only repeat it, and one
            that a user or a cluster has interrupted is saved and to end.
        grace_seconds: How long ranks may take to end after a signal (Ctrl-C: to save).

    Returns:
        The exit code: 0, or that of the rank that failed first, or 128 + the signal.
    """
    logging.disable(logging.ERROR)  # torch's own reports are pages long; the ranks say in one line what is wrong
    environment.set_default_threads()  # so that ranks do not fight for cores before they choose their threads
    environment.set_defaults({"TORCH_CPP_LOG_LEVEL": "ERROR"})  # a warning of torch's C++ brings its call stack along
    environment.set_defaults(_loopback_alone())
    try:
        return _attempts(_config(ranks, grace_seconds), arguments, max_restarts)
    except SignalException as error:
        if error.sigval is signal.SIGTERM:
            say("got SIGTERM, so all ranks were told to end")
        return _SIGNAL + int(error.sigval)
    finally:
        logging.disable(logging.NOTSET)


def _loopback_alone() -> dict[str, str]:
    """Returns the variables by which the links between the ranks of one machine listen on no other interface."""
    names = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    return {f"{transport}_SOCKET_IFNAME": name for name in names for transport in ("GLOO", "NCCL")}


class _Meeting(RendezvousHandler):
    """Lets the ranks of one machine meet at a store that only this machine reaches; torch's own listens everywhere."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        store = listening_store(LOOPBACK, 0)  # port 0: a free one, so that several launches do not meet
        self._run_id = parameters.run_id
        self._info = RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, store.port))

    @property
    def use_agent_store(self) -> bool:
        """Let the ranks use the store, too."""
        return True

    def get_backend(self) -> str:
        """Return the name by which the launcher asks for it."""
        return _BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the store, and that this launcher is the only one."""
        return self._info

    def is_closed(self) -> bool:
        """Return False: it ends with the process."""
        return False

    def set_closed(self) -> None:
        """Do nothing."""

    def num_nodes_waiting(self) -> int:
        """Return 0: no other machine joins."""
        return 0

    def get_run_id(self) -> str:
        """Return the name of the launch."""
        return self._run_id

    def shutdown(self) -> bool:
        """Do nothing; it could."""
        return True


_BACKEND = "dpp"
rendezvous_handler_registry.register(_BACKEND, _Meeting)


def _config(ranks: int, grace_seconds: float) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend=_BACKEND,
        run_id=environment.DPP_RUN + uuid.uuid4().hex,  # by which a restart knows the run folder of its own job
        max_restarts=0,  # restarts are counted in `_attempts`: torchrun would also repeat what cannot succeed
        monitor_interval=0.1,
        shutdown_timeout=max(1, int(grace_seconds)),
        local_addr="localhost",
    )


def _attempts(config: LaunchConfig, arguments: list[str], max_restarts: int) -> int:
    """Starts the ranks until they end well, by bad input or an interrupt, or too often; returns the last exit code."""
    code = 0
    for attempt in range(max_restarts + 1):
        environment.begin_attempt(attempt)
        code = _attempt(config, arguments)
        if code in (0, USAGE, INTERRUPTED):
            break
    return code


def _attempt(config: LaunchConfig, arguments: list[str]) -> int:
    """Starts the ranks once and waits for them; returns the exit code as `launch` does."""
    try:
        elastic_launch(config, sys.executable)("-m", "decoupled_pp", *arguments)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode > 0:
            return first.exitcode
        name = signal.Signals(-first.exitcode).name
        say(f"rank {rank} (process {first.pid}) was killed by {name}")  # a killed rank cannot say so itself
        return _SIGNAL - first.exitcode
    return 0
