"""Writes files that survive a loss of power, and checks what was written."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from decoupled_pp.core.errors import UsageError, first_line


def reason_of(error: BaseException) -> str:
    """Return in one line why a file cannot be written or read, the cause alone where torch has wrapped it."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


def cannot_write(path: Path, error: Exception, kind: str) -> UsageError:
    """Return the error of a file or folder (`kind`) that cannot be written."""
    return UsageError(f"cannot write {path}: {reason_of(error)}; name another {kind}", code=f"{kind}-not-writable")


def sync_folder(folder: Path) -> None:
    """Wait until a folder, with what is in it, would survive a loss of power."""
    for path in (*folder.iterdir(), folder):
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names that a folder is, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            found = zlib.crc32(chunk, found)
    return found


def checksum_of(record: dict[str, Any]) -> int:
    """Return the CRC-32 of a JSON record."""
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def write_atomically(path: Path, text: str) -> None:
    """Replace a file; one that is killed, or loses its power, leaves the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else the new name could be on the disk before its content
    temporary.replace(path)
