"""The one place that looks at the process's environment, or changes it: rank, world size, restarts, cores."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

DPP_RUN = "dpp-"
"""How the run id of a launch by `dpp train --ranks` begins."""


def under_torchrun() -> bool:
    """Whether a launcher (torchrun, or anything that sets the same variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def rank() -> int:
    """Global rank of this process, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Rank on this machine, 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def restart_count() -> int:
    """How often torchrun, or the launcher of `dpp train --ranks`, has restarted the workers."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) + int(os.environ.get("DPP_RESTART_COUNT", "0"))


def begin_attempt(number: int) -> None:
    """Tell the workers that this process is about to start how often it has restarted them."""
    os.environ["DPP_RESTART_COUNT"] = str(number)


def launched_by_dpp() -> bool:
    """Whether `dpp train --ranks` started this process, and says at the end what all ranks would say."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(DPP_RUN)


def job() -> str:
    """A name of this launch that stays when torchrun restarts its workers: its run id, else its launcher's process."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return run_id if run_id != "none" else f"{socket.gethostname()} {os.getppid()}"


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_defaults(values: Mapping[str, str]) -> None:
    """Set environment variables for child processes where the user has not set them."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


@contextmanager
def temporarily(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for as long as the context lasts; what is changed inside is as before afterwards."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name not in before]:
            del os.environ[name]
        os.environ.update(before)


def with_variables(values: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child process: ours, and `values` on top."""
    return {**os.environ, **values}
