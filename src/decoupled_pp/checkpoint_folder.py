"""The folder of a run's checkpoints, as all its ranks use it: agree on the newest, share it, save, commit."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

from decoupled_pp.channels import Control
from decoupled_pp.checkpoint import (
    MOMENT_SECONDS,
    Checkpoint,
    ensure_committed,
    list_checkpoints,
    open_checkpoint,
    remove_incomplete,
    save_stage,
)
from decoupled_pp.contracts import Plan, UsageError
from decoupled_pp.stage import Stage


class CheckpointFolder:
    """One folder, which all ranks must share."""

    def __init__(self, path: Path, *, keep: int, timeout_seconds: float) -> None:
        """Nothing is written yet.

        Args:
            path: The folder.
            keep: Committed checkpoints to keep.
            timeout_seconds: Longest wait for another rank.
        """
        self.path = path
        self._keep, self._timeout = keep, timeout_seconds

    def newest(self, control: Control) -> Checkpoint | None:
        """The newest that rank 0 sees, on every rank: what others see of a shared folder may lag behind."""
        newest = [path.name for path in list_checkpoints(self.path)[-1:]]
        agreed = control.gather("newest checkpoint", newest, self._timeout)[0]
        return open_checkpoint(self.path / agreed[0]) if agreed else None

    def prepare(self, control: Control, rank: int, step: int) -> None:
        """Make the folder ready for a run that begins at `step`; every rank calls this, before anything is trained.

        Raises:
            UsageError: It holds checkpoints that the run would collide with, or is not one folder for all ranks.
        """
        if rank == 0:
            self._make_room(step)
        mark = f".shared-{uuid.uuid4().hex}"
        if rank == 0:
            self._write(mark)
        mark = control.gather("mark in the checkpoint folder", mark, self._timeout)[0]
        sees = control.gather("sight of it", self._sees(mark), self._timeout + MOMENT_SECONDS)
        if rank == 0:
            (self.path / mark).unlink()
        if not all(sees):
            blind = ", ".join(str(rank) for rank, saw in enumerate(sees) if not saw)
            raise UsageError(
                f"rank {blind} cannot write, or does not see what rank 0 writes, in the checkpoint folder {self.path}; "
                "put it on a file system that all machines share, under the same path"
            )

    def save(self, stage: Stage, plan: Plan, packet: int) -> bool:
        """Save a stage; see `save_stage`."""
        return save_stage(self.path, stage, plan, packet, keep=self._keep)

    def ensure_committed(self, step: int, stages: int) -> bool:
        """See to it that a checkpoint is complete; see `checkpoint.ensure_committed`."""
        return ensure_committed(self.path, step, stages, keep=self._keep, timeout_seconds=self._timeout)

    def _make_room(self, step: int) -> None:
        later = [path for path in list_checkpoints(self.path) if path.name > f"step-{step:08d}"]
        if later:
            raise UsageError(
                f"{self.path} holds {later[-1].name}, and this run begins at step {step}; "
                "resume, or give another folder"
            )
        remove_incomplete(self.path)

    def _write(self, mark: str) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / mark).touch()
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror or error}; name another folder") from error

    def _sees(self, mark: str) -> bool:
        deadline = time.monotonic() + min(self._timeout, MOMENT_SECONDS)
        while not (self.path / mark).exists():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return os.access(self.path, os.W_OK)
