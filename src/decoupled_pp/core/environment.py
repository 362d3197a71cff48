"""Reads and changes the process's environment (nothing else does): rank, world size, restarts, cores."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

DPP_RUN = "dpp-"
"""Prefix of the run id of a launch by `dpp train --ranks`."""


def under_torchrun() -> bool:
    """Return whether a launcher (torchrun, or anything that sets the same variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def rank() -> int:
    """Return the global rank of this process, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the rank on this machine, 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def restart_count() -> int:
    """Return how often torchrun, or the launcher of `dpp train --ranks`, has restarted the workers."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) + int(os.environ.get("DPP_RESTART_COUNT", "0"))


def begin_attempt(number: int) -> None:
    """Tell the workers that this process will start how often it has restarted them."""
    os.environ["DPP_RESTART_COUNT"] = str(number)


def launched_by_dpp() -> bool:
    """True if started by `dpp train --ranks`; that parent prints the final message once for all ranks."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(DPP_RUN)


def job() -> str:
    """Return a name of this launch that stays when torchrun restarts its workers: run id, else launcher's process."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return run_id if run_id != "none" else f"{socket.gethostname()} {os.getppid()}"


def cores() -> int:
    """Return the number of CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux: containers and `taskset` leave a process fewer than there are
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_defaults(values: Mapping[str, str]) -> None:
    """Set environment variables for child processes where the user has not set them."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


@contextmanager
def temporarily(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables while the context lasts; at its end the whole environment is as before."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name not in before]:
            del os.environ[name]
        os.environ.update(before)


def with_variables(values: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a child process: ours, and `values` on top."""
    return {**os.environ, **values}
