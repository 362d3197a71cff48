"""Reads and changes the process's environment (nothing else does): rank, world size, restarts, threads."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

DPP_RUN = "dpp-"
"""Prefix of the run id of a launch by `dpp train --ranks`."""
DEFAULT_THREADS = "DPP_DEFAULT_THREADS"
"""Variable that is set where OMP_NUM_THREADS is a launcher's default and not the user's choice."""


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


def told_threads() -> tuple[str, int] | None:
    """Return the variable by which the user bounds the threads of a process, and its number; None if there is none."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        value = os.environ.get(name, "").split(",")[0].strip()  # OpenMP takes a list, a number per level of nesting
        if value.isdigit() and int(value) > 0 and not (name == "OMP_NUM_THREADS" and _is_launchers(value)):
            return name, int(value)
    return None


def set_default_threads() -> None:
    """Let ranks begin with one thread, as torchrun does, unless the user has set another number."""
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ[DEFAULT_THREADS] = "1"


def _is_launchers(value: str) -> bool:
    """Return whether a launcher set OMP_NUM_THREADS, not the user: torchrun sets 1 if it is to start several ranks."""
    if DEFAULT_THREADS in os.environ:
        return True
    if value != "1" or "TORCHELASTIC_RUN_ID" not in os.environ or local_world_size() == 1:
        return False
    try:  # the environment that the launcher itself was started with
        return b"OMP_NUM_THREADS=1" not in Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return True


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
