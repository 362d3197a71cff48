"""The folder of a run's checkpoints, as all its ranks use it: agree on the newest, share it, save, commit.

Tied weights are kept in step through it, forward-only. Where a weight was one and is two (a token embedding and the
output projection), the stage of the later one owns it. At every regular checkpoint after the first, the stage of the
earlier one takes the owner's as it was in the checkpoint before:

    stage 0   ... save 1 ......... save 2 (table = projection of save 1) ......... save 3 (of save 2)
    stage K           ... save 1 ......... save 2 ......... save 3

A checkpoint is one consistent cut, whole long before the next one is due: nobody waits, no tensor goes back over a
link, and what is taken depends on the number of the packet alone, not on timing (law 3).
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from decoupled_pp.core.channels import Control
from decoupled_pp.core.errors import LinkError, PeerError, UsageError
from decoupled_pp.core.plans import Layers, Plan
from decoupled_pp.pipeline.stage import Stage
from decoupled_pp.run.checkpoints.parts import (
    MOMENT_SECONDS,
    Checkpoint,
    Keep,
    ensure_committed,
    final_path,
    list_checkpoints,
    open_checkpoint,
    remove_incomplete,
    save_stage,
)


def tied_weights(plan: Plan) -> Mapping[str, str]:
    """Key of a parameter that was tied and has become one of its own -> key of the one that it was.

    Raises:
        UsageError: The plan's network has none.
    """
    tied = plan.module.tied if isinstance(plan.module, Layers) else {}
    if not tied:
        raise UsageError("refresh_tied: no weight of the network was tied and is two now (Layers.tied); leave it out")
    return tied


def _owners(tied: Mapping[str, str]) -> dict[str, str]:
    """Every copy of a tied weight but the last -> the last one, which owns it."""
    users: dict[str, list[str]] = {}
    for later, first in tied.items():
        users.setdefault(first, [first]).append(later)
    return {key: copies[-1] for copies in users.values() for key in copies[:-1]}


@dataclass(frozen=True)
class _Course:
    """When a run saves, and how it hears of faults."""

    every: int
    control: Control


class CheckpointFolder:
    """One folder, which all ranks must share."""

    def __init__(self, path: Path, *, keep: int, timeout_seconds: float, tied: Mapping[str, str] | None = None) -> None:
        """Nothing is written yet.

        Args:
            path: The folder.
            keep: Committed checkpoints to keep.
            timeout_seconds: Longest wait for another rank.
            tied: Weights to keep in step: key of the later one -> key of the earlier; None: none.
        """
        self.path = path
        self._keep, self._timeout, self._owners = keep, timeout_seconds, _owners(tied or {})
        self._course: _Course | None = None

    def newest(self, control: Control) -> Checkpoint | None:
        """The newest that rank 0 sees, on every rank: what others see of a shared folder may lag behind."""
        newest = [path.name for path in list_checkpoints(self.path)[-1:]]
        agreed = control.gather("newest checkpoint", newest, self._timeout)[0]
        return open_checkpoint(self.path / agreed[0]) if agreed else None

    def prepare(self, control: Control, rank: int, step: int, every: int | None) -> None:
        """Make the folder ready; every rank calls this, before anything is trained.

        Args:
            control: Of the run.
            rank: Of this process.
            step: Optimizer steps already done.
            every: Optimizer steps between checkpoints; None: only at the end.

        Raises:
            UsageError: It holds checkpoints that the run would collide with, is not one folder for all ranks, or lacks
                the checkpoint that tied weights are taken from next.
        """
        if self._owners:
            self._course = _Course(self._regular(step, every), control)
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
        """Refresh its copies of tied weights if that is asked for, and save a stage; see `save_stage`."""
        if self._course is not None:
            self._refresh(stage, self._course)
        return save_stage(self.path, stage, plan, packet, keep=self._kept)

    def ensure_committed(self, step: int, stages: int) -> bool:
        """See to it that a checkpoint is complete; see `checkpoint.ensure_committed`."""
        return ensure_committed(self.path, step, stages, keep=self._kept, timeout_seconds=self._timeout)

    @property
    def _kept(self) -> Keep:
        return Keep(self._keep, self._course.every if self._course is not None else None)

    def _regular(self, step: int, every: int | None) -> int:
        if every is None:
            raise UsageError("refresh_tied takes weights from checkpoints: give save_every (checkpoint.every)")
        before = final_path(self.path, step // every * every)
        if step >= every and not before.is_dir():
            raise UsageError(
                f"refresh_tied: {before} is gone, from which tied weights are taken next; go on with the interval "
                "between checkpoints of before, or without refresh_tied"
            )
        return every

    def _refresh(self, stage: Stage, course: _Course) -> None:
        """Copy what later stages own and this one has a copy of, as of the regular checkpoint before this one."""
        state, before = stage.trunk.state_dict(), stage.updates - course.every
        wanted = {key: owner for key, owner in self._owners.items() if key in state}
        if stage.updates % course.every or before <= 0 or not wanted:
            return
        path, deadline = final_path(self.path, before), time.monotonic() + self._timeout
        while not path.is_dir():
            if (fault := course.control.fault()) is not None:
                raise PeerError(fault)
            if time.monotonic() > deadline:
                raise LinkError(
                    f"stage {stage.index} waited {self._timeout:g} s for {path} to be complete, to take tied weights "
                    "from it: the bound is over"
                )
            time.sleep(0.01)
        checkpoint = open_checkpoint(path, verify=False)
        for key, owner in wanted.items():
            checkpoint.fill({f"model.{owner}": state[key]})

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
