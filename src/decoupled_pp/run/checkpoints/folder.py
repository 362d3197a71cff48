"""Manages the folder of a run's checkpoints for all its ranks: agree on the newest, share it, save, commit.

Tied weights are kept in step through it, forward-only. Where splitting made two weights out of one (a token embedding
and the output projection), the stage of the later one owns it. At every regular checkpoint after the first, the stage
of the earlier one takes the owner's as it was in the checkpoint before:

    stage 0   ... save 1 ......... save 2 (table = projection of save 1) ......... save 3 (of save 2)
    stage K           ... save 1 ......... save 2 ......... save 3

A checkpoint is one consistent cut, whole long before the next one is due: nobody waits, no tensor goes back over a
link, and what is taken depends on the number of the packet alone, not on timing (law 3).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from decoupled_pp.core.channels import Control
from decoupled_pp.core.errors import PeerError, TrainingError, UsageError, waited_too_long
from decoupled_pp.core.plans import Layers, Plan
from decoupled_pp.pipeline.stage import Stage
from decoupled_pp.run.checkpoints.files import cannot_write
from decoupled_pp.run.checkpoints.opened import Checkpoint, newest_whole, open_checkpoint, set_aside
from decoupled_pp.run.checkpoints.parts import (
    Keep,
    commit,
    final_path,
    list_checkpoints,
    partial_path,
    record_path,
    remove_incomplete,
    save_stage,
    step_of,
)
from decoupled_pp.run.checkpoints.sharing import MOMENT_SECONDS, refuse_unshared
from decoupled_pp.run.in_progress import JOB_FILE, RunLock, run_in_progress, running


def tied_weights(plan: Plan) -> Mapping[str, str]:
    """Return the parameters that splitting untied: key of the copy -> key of the one that it was tied to."""
    tied = plan.module.tied if isinstance(plan.module, Layers) else {}
    if not tied:
        raise UsageError(
            "`checkpoint.refresh_tied` has nothing to do: splitting this network untied no weights (Layers.tied); "
            "leave it out",
            code="nothing-to-refresh",
            key="checkpoint.refresh_tied",
        )
    return tied


def _owners(tied: Mapping[str, str]) -> dict[str, str]:
    """Return the owner of every copy of a tied weight: the last copy."""
    users: dict[str, list[str]] = {}
    for later, first in tied.items():
        users.setdefault(first, [first]).append(later)
    owners: dict[str, str] = {}
    for *copies, last in users.values():
        owners |= dict.fromkeys(copies, last)
    return owners


class CheckpointFolder:
    """The folder of checkpoints, which all ranks must share."""

    def __init__(
        self,
        path: Path,
        *,
        keep: int,
        timeout_seconds: float,
        tied: Mapping[str, str] | None = None,
        is_claimed: bool = False,
    ) -> None:
        """Take over the path; nothing is written yet.

        Args:
            path: The folder.
            keep: Number of checkpoints that are kept.
            timeout_seconds: Longest wait for another rank.
            tied: What `tied_weights` returns, if tied weights are to be refreshed.
            is_claimed: True if all ranks share the folder for certain, and it is locked by its run folder.
        """
        self.path = path
        self._lock = None if is_claimed else RunLock(path)
        self._keep = Keep(keep)
        self._timeout = timeout_seconds
        self._owners = _owners(tied or {})
        self._damaged: dict[str, str] = {}  # newer than the one that the run goes on from -> why it cannot be read
        self._control: Control | None = None  # tells a stage that waits for others whether one has failed

    def newest(self, control: Control) -> Checkpoint | None:
        """Return the newest whole checkpoint, on every rank the one that rank 0 sees; None if there is none."""
        agreed = control.from_rank_0("newest checkpoint", self._newest_name, self._timeout)
        return open_checkpoint(self.path / agreed) if agreed is not None else None

    def _newest_name(self) -> str | None:
        """Return the name of the newest whole checkpoint; newer ones that cannot be read are set aside in `prepare`."""
        newest, self._damaged = newest_whole(self.path)
        return newest.path.name if newest is not None else None

    def prepare(self, control: Control, rank: int, step: int, every: int | None) -> None:
        """Make the folder ready; every rank calls this, before anything is trained."""
        if self._owners:
            self._keep = replace(self._keep, every=self._regular(step, every))
            self._control = control
        if self._lock is not None:
            control.from_rank_0("checkpoint folder", self._take, self._timeout)
            if rank != 0:
                self._lock.share()
            refuse_unshared(self.path, control, rank, self._timeout)
        if rank == 0:  # nothing has been removed so far
            self._make_room(step)
        control.gather("room in the checkpoint folder", True, self._timeout)

    def leave(self, *, is_over: bool) -> None:
        """Let others use the folder; `is_over` unless this rank has failed."""
        if self._lock is not None:
            self._lock.release(is_over=is_over)

    def save(self, stage: Stage, plan: Plan, packet: int) -> bool:
        """Refresh its copies of tied weights if that is asked for, and save a stage; see `save_stage`."""
        if self._keep.every is not None:
            self._refresh(stage, self._keep.every)
        return save_stage(self.path, stage, plan, packet, keep=self._keep)

    def ensure_committed(self, step: int, stages: int) -> bool:
        """Commit a checkpoint whose parts are all written, unless a stage has; return whether this call did it."""
        # On a shared file system the last stage to write may not have seen the others' parts at once.
        final = final_path(self.path, step)
        deadline = time.monotonic() + min(self._timeout, MOMENT_SECONDS)
        while not final.exists():
            if commit(self.path, step, stages, self._keep):
                return True
            if time.monotonic() > deadline:
                lost = ", ".join(str(k) for k in range(stages) if not record_path(partial_path(final), k).exists())
                raise TrainingError(
                    f"the checkpoint {final} is not complete: the parts of stages {lost} do not appear here; give all "
                    "ranks one folder on a file system that they share",
                    code="checkpoint-incomplete",
                )
            time.sleep(0.05)
        return False

    def _regular(self, step: int, every: int | None) -> int:
        """Return the interval between regular checkpoints, once it is certain that tied weights can be taken."""
        if every is None:
            raise UsageError(
                "`checkpoint.refresh_tied` takes weights from checkpoints: set `checkpoint.every`",
                code="refresh-needs-checkpoints",
                key="checkpoint.every",
            )
        before = final_path(self.path, step // every * every)
        if step >= every and not before.is_dir():
            raise UsageError(
                f"`checkpoint.refresh_tied` takes tied weights from {before} next, which is gone; keep "
                "`checkpoint.every` as it was, or leave `checkpoint.refresh_tied` out",
                code="checkpoint-to-refresh-from-gone",
                key="checkpoint.every",
            )
        return every

    def _refresh(self, stage: Stage, every: int) -> None:
        """Copy weights that later stages own and this one has a copy of, as of the regular checkpoint before."""
        state = stage.trunk.state_dict()
        wanted = {key: owner for key, owner in self._owners.items() if key in state}
        before = stage.updates - every
        if stage.updates % every or before <= 0 or not wanted:
            return
        path = final_path(self.path, before)
        start = time.monotonic()
        while not path.is_dir():  # complete long ago, unless the last stage lags by a whole interval
            fault = self._control.fault() if self._control is not None else None
            if fault is not None:
                raise PeerError(fault)
            waited = time.monotonic() - start
            if waited > self._timeout:
                what = f"{path} to be complete, to take tied weights from it"
                raise waited_too_long(f"stage {stage.index}", what, waited, self._timeout)
            time.sleep(0.01)
        checkpoint = open_checkpoint(path, verify=False)  # written by this run: no need to read it all
        for key, owner in wanted.items():
            checkpoint.fill({f"model.{owner}": state[key]})  # in place: it is the stage's own tensor

    def _make_room(self, step: int) -> None:
        for name, why in self._damaged.items():
            aside = set_aside(self.path / name)
            warnings.warn(f"{why}; it is kept as {aside.name}", stacklevel=2)
        self._damaged = {}
        later = [path for path in list_checkpoints(self.path) if step_of(path) > step]
        if later:
            raise UsageError(
                f"{self.path} holds {later[-1].name}, and this run begins at step {step}; resume, or give another "
                "folder",
                code="checkpoint-folder-in-use",
            )
        remove_incomplete(self.path)

    def _take(self) -> None:
        """Make the folder, and take it for this run."""
        assert self._lock is not None, "only called with one"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            who = running(self.path)
            if who is None and (self.path.parent / JOB_FILE).exists():  # of `dpp train`, which locks its run folder
                who = running(self.path.parent)
            if who is None and not self._lock.take():
                who = running(self.path) or "it has just begun"
        except OSError as error:
            raise cannot_write(self.path, error, "folder") from error
        if who is not None:
            raise run_in_progress(self.path, who, "give another `checkpoints`", key="checkpoints")
