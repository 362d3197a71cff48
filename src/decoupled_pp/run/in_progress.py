"""Says whether the run of a folder is in progress, over all processes and machines that share the folder.

Every rank of a run holds a lock of the kernel (`flock`) on one file, which ends with the process, however it ends. Some
network file systems know no such locks, or each machine its own: so every rank also renews the file's time stamp, a
heartbeat. Who wants the folder trusts the lock where all ranks were on this machine, and watches the heartbeat where
they were not. Nothing that a dead run leaves behind keeps a folder from being used.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from decoupled_pp.core import environment
from decoupled_pp.core.errors import UsageError

LOCK_FILE = ".lock"
JOB_FILE = ".job"
"""A file of every run folder: the name of the launch that claimed it last."""
_BEAT_SECONDS = 3.0
_WATCH_SECONDS = 3 * _BEAT_SECONDS
_PAUSE_SECONDS = 0.2
_OLD_SECONDS = 600.0
"""A heartbeat older than this is over: no clocks of two machines differ by more."""


class RunLock:
    """The lock of one rank; nothing is held before `take` or `share`, nor after `release`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / LOCK_FILE
        self._handle: int | None = None
        self._ending = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A rank that fails is not the last one: others may still be on their way out.
        self.release(is_over=kind is None)

    def take(self) -> bool:
        """Take the folder for a new run (rank 0); return whether no other run has it."""
        handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
        if not _try_lock(handle, fcntl.LOCK_EX, patience_seconds=1.0):  # somebody may just be looking
            os.close(handle)
            return False
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(_owner()).encode(), 0)
        self._hold(handle)
        return True

    def share(self) -> None:
        """Join the run that rank 0 has taken the folder for; a rank that does not see the folder holds nothing."""
        with suppress(OSError):
            self._hold(os.open(self._file, os.O_RDWR))

    def release(self, *, is_over: bool) -> None:
        """Let go; a run that is over in order leaves no owner, and nobody need wait for its heartbeat."""
        if self._handle is None or self._beating is None:
            return
        self._ending.set()
        self._beating.join()
        if is_over and _read(self._handle) == _owner():
            os.ftruncate(self._handle, 0)
        os.close(self._handle)
        self._handle = None

    def _hold(self, handle: int) -> None:
        _try_lock(handle, fcntl.LOCK_SH, patience_seconds=1.0)
        self._handle = handle
        self._ending.clear()
        self._beating = threading.Thread(target=self._beat, args=(handle,), name="dpp-heartbeat", daemon=True)
        self._beating.start()

    def _beat(self, handle: int) -> None:
        while not self._ending.wait(_BEAT_SECONDS):
            with suppress(OSError):  # of a disk that is full or gone: whoever writes to it says so
                os.utime(handle)


def running(folder: Path) -> str | None:
    """Return in words which run is in progress in a folder, or None; only looks."""
    try:
        handle = os.open(folder / LOCK_FILE, os.O_RDWR)
    except OSError:  # none, or of a folder that cannot be written anyway
        return None
    try:
        is_free = _try_lock(handle, fcntl.LOCK_EX)
        owner = _read(handle)
    finally:
        os.close(handle)
    is_here = not owner or owner.get("machine") == _machine()
    words = f"process {owner.get('process', '?')} on {owner.get('host', 'some machine')}"
    return None if is_free and (is_here or not _is_beating(folder / LOCK_FILE)) else words


def run_in_progress(folder: Path, who: str, other: str, *, key: str) -> UsageError:
    """Return the error of a folder that a run, in words, has; `other` says how to name another folder."""
    return UsageError(
        f"a run is in progress in {folder} ({who}); end it, wait for its end, or {other}",
        code="run-in-progress",
        key=key,
    )


def _try_lock(handle: int, kind: int, patience_seconds: float = 0.0) -> bool:
    """Return False if another process holds the lock; True if this one does, or there are no locks here."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        except OSError:  # a file system without locks: the heartbeat alone decides
            return True


def _owner() -> dict[str, object]:
    # A run of several machines has no machine: a lock here says nothing of ranks elsewhere.
    alone = environment.local_world_size() == environment.world_size()
    return {"host": socket.gethostname(), "process": os.getpid(), "machine": _machine() if alone else None}


def _machine() -> str:
    """Return an identity of this machine since it was started, the same in all its containers."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return socket.gethostname()


def _read(handle: int) -> dict[str, object]:
    try:
        content = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_beating(file: Path) -> bool:
    """Watch the heartbeat, unless it is an old one."""
    first = _stamp(file)
    if abs(time.time() - first) > _OLD_SECONDS:
        return False
    deadline = time.monotonic() + _WATCH_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_PAUSE_SECONDS)
        if _stamp(file) != first:
            return True
    return False


def _stamp(file: Path) -> float:
    with file.open("rb") as opened:  # opened anew, because a network file system asks its server only then
        return os.fstat(opened.fileno()).st_mtime
