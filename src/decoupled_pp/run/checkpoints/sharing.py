"""Finds out whether all ranks of a run share a folder, before anything in it is changed."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

from decoupled_pp.core.channels import Control
from decoupled_pp.core.errors import UsageError
from decoupled_pp.run.checkpoints.files import cannot_write
from decoupled_pp.run.in_progress import LOCK_FILE

MOMENT_SECONDS = 60.0
"""Longest time a file on a shared file system may take to appear on another machine (NFS caches listings that long)."""


def refuse_unshared(folder: Path, control: Control, rank: int, timeout_seconds: float) -> None:
    """Raise UsageError unless every rank, each of which calls this, sees what rank 0 writes into an existing folder."""
    # A file that only this run can know of: a folder under the same path on another machine has no such file.
    mark = f"{LOCK_FILE}-{uuid.uuid4().hex}"
    if rank == 0:
        _touch(folder / mark)
    try:
        mark = control.gather("mark in the folder", mark, timeout_seconds)[0]
        sees = control.gather("sight of it", _sees(folder / mark, timeout_seconds), timeout_seconds + MOMENT_SECONDS)
    finally:
        if rank == 0:  # `gather` is a barrier: no rank looks for it any more
            (folder / mark).unlink(missing_ok=True)
    if not all(sees):
        blind = ", ".join(str(rank) for rank, saw in enumerate(sees) if not saw)
        raise UsageError(
            f"rank {blind} cannot write, or does not see what rank 0 writes, in {folder}; put it on a file system that "
            "all machines share, under the same path",
            code="checkpoint-folder-not-shared",
        )


def _touch(file: Path) -> None:
    try:
        file.touch()
    except OSError as error:
        raise cannot_write(file.parent, error, "folder") from error


def _sees(file: Path, timeout_seconds: float) -> bool:
    """Return whether this rank can write here and sees a file of rank 0, which may take its time to appear."""
    deadline = time.monotonic() + min(timeout_seconds, MOMENT_SECONDS)
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return os.access(file.parent, os.W_OK)
