"""Reads and changes the process's environment (nothing else does): rank, world size, restarts, threads."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from decoupled_pp.core.errors import UsageError, shortened

DPP_RUN = "dpp-"
"""Prefix of the run id of a launch by `dpp train --ranks`."""
DEFAULT_THREADS = "DPP_DEFAULT_THREADS"
"""Variable that is set where OMP_NUM_THREADS is a launcher's default and not the user's choice."""


_place_on_host = [0, 1]
"""Rank and number of ranks on this machine, as far as no variable says."""


def _joined_group() -> Any:
    """Return torch.distributed if this process is in a process group, which knows its ranks better than variables."""
    distributed = sys.modules.get("torch.distributed")  # not imported to find out
    joined = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if joined else None


def _refusal(fault: str) -> UsageError:
    remedy = (
        "start the ranks with torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; for one process unset"
    )
    return UsageError(f"{fault}; {remedy} RANK and WORLD_SIZE", code="launcher-variables")


def _number(name: str, default: int, least: int = 0) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise _refusal(f"the variable {name} is {shortened(text)!r}, no whole number of at least {least}")
    return int(text)


def under_torchrun() -> bool:
    """Return whether a launcher (torchrun, or anything that sets the same variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def rank() -> int:
    """Return the global rank of this process, 0 without a launcher."""
    if group := _joined_group():
        return int(group.get_rank())
    number = _number("RANK", 0)
    if number >= (size := world_size()):
        raise _refusal(f"the variable RANK is {number}, and WORLD_SIZE {size}; ranks count from 0")
    return number


def world_size() -> int:
    """Return the number of processes, 1 without a launcher."""
    if group := _joined_group():
        return int(group.get_world_size())
    size = _number("WORLD_SIZE", 1, least=1)
    if size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise _refusal(f"the variable WORLD_SIZE is {size}, but {name} is not set")
        if (port := _number("MASTER_PORT", 0)) > 65535:
            raise _refusal(f"the variable MASTER_PORT is {port}; ports end at 65535")
    return size


def reaches_others() -> bool:
    """Return whether there are other ranks, and no variable is missing by which to reach them."""
    try:
        return world_size() > 1
    except UsageError:
        return False


def local_rank() -> int:
    """Return the rank on this machine, 0 without a launcher."""
    return _number("LOCAL_RANK", _place_on_host[0])


def local_world_size() -> int:
    """Return the number of processes of this run on this machine."""
    return _number("LOCAL_WORLD_SIZE", _place_on_host[1], least=1)


def lacks_local_rank() -> bool:
    """Return whether no launcher has said which of the ranks of this machine this process is."""
    return "LOCAL_RANK" not in os.environ


def set_place_on_host(rank: int, size: int) -> None:
    """Say which of the ranks of this machine this process is, where no launcher does."""
    _place_on_host[:] = [rank, size]


def host() -> str:
    """Return the name of this machine."""
    return socket.gethostname()


def master() -> tuple[str, int]:
    """Return address and port of the store where the ranks meet."""
    return os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0, least=1)


def launcher_has_store() -> bool:
    """Return whether the launcher is the store's host (torchrun is), and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restart_count() -> int:
    """Return how often torchrun, or the launcher of `dpp train --ranks`, has restarted the workers."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0) + _number("DPP_RESTART_COUNT", 0)


def begin_attempt(number: int) -> None:
    """Tell the workers that this process will start how often it has restarted them."""
    os.environ["DPP_RESTART_COUNT"] = str(number)


def launched_by_dpp() -> bool:
    """True if started by `dpp train --ranks`; that parent prints the final message once for all ranks."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(DPP_RUN)


def job() -> str:
    """Return a name of this launch that stays when torchrun restarts its workers: run id, else launcher's process."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return run_id if run_id != "none" else f"{host()} {os.getppid()}"


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
