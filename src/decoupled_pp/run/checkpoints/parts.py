"""Writes and lists checkpoints: a consistent cut of all stages, written stage by stage, committed by a rename.

    checkpoints/step-00000200.incomplete/          every stage writes its own part after the same packet, alone
        stage-0/*.safetensors                      tensors, by torch.distributed.checkpoint (safetensors format)
        stage-0.json                               written last: numbers, file checksums
        stage-1/ ...
    checkpoints/step-00000200/                     renamed by whichever stage finds all parts there

Nothing is pickled: DCP's own metadata file is a pickle, its safetensors format is not. Tensors are keyed by name
(`model.*`, `critic.<cut>.*`, `optimizer.<parameter>.<key>`, `groups.stage<k>.*`, `rule.stage<k>.*`, ...), so any number
of stages can load them (`opened.py`, `resume.py`).
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from decoupled_pp.core.errors import TrainingError, UsageError
from decoupled_pp.core.extra_state import extra_state, tensor_state
from decoupled_pp.core.plans import Plan
from decoupled_pp.core.structures import memory_of
from decoupled_pp.pipeline.optimizer_state import changed_entries, named_state, owners
from decoupled_pp.pipeline.stage import Stage
from decoupled_pp.run.checkpoints.files import (
    checksum,
    checksum_of,
    reason_of,
    sync,
    sync_folder,
    write_atomically,
)

FORMAT = 2
TO_TRAIN = "train."
"""Before the name of a parameter: the weights to train with, of an optimizer that keeps others to evaluate."""
_PARTIAL = ".incomplete"


def name_of_critic(stage: Stage, plan: Plan) -> str:
    """Return the name of a stage's critic ("" if it has none): the layer it follows, the same in all cuts."""
    return "" if stage.critic is None else f"after_{plan.layer_names[plan.boundaries[stage.index + 1] - 1]}"


@dataclass(frozen=True)
class Keep:
    """Says which checkpoints are kept."""

    newest: int
    every: int | None = None  # keeps the newest multiple of this step as well: tied weights are taken from it

    def superfluous(self, paths: list[Path]) -> list[Path]:
        """Return those of the checkpoints (oldest first) that need not be kept."""
        regular: list[Path] = []
        if self.every is not None:
            regular = [path for path in paths if step_of(path) % self.every == 0]
        kept = {*paths[-self.newest :], *regular[-1:]}
        return [path for path in paths if path not in kept]


# Copies that users keep beside them, such as `step-best` or `step-00000020.bak`, are no checkpoints of the run.
NAME = re.compile(r"step-(\d{8,})")


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def save_stage(folder: Path, stage: Stage, plan: Plan, packet: int, *, keep: Keep) -> bool:
    """Write a stage's part of the checkpoint after `packet` packets; return whether this part completed it."""
    _refuse_not_finite(stage, plan, packet)
    final = final_path(folder, stage.updates)
    with _written(final):
        _write_part(partial_path(final), stage, plan, packet)
        return commit(folder, stage.updates, plan.stages, keep)


def _write_part(partial: Path, stage: Stage, plan: Plan, packet: int) -> None:
    """Write the tensors of a stage, and then its record."""
    part = partial / f"stage-{stage.index}"
    shutil.rmtree(part, ignore_errors=True)  # of a save that was killed
    part.mkdir(parents=True, exist_ok=True)
    tensors, scalars = _stage_state(stage, plan)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single process.*")
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(part), save_distributed=True), no_dist=True)
    sync_folder(part)
    trained_by = owners(stage.all_optimizers, _names(stage, plan))
    record = {
        "format": FORMAT,
        "stage": stage.index,
        "stages": plan.stages,
        "boundaries": list(plan.boundaries),
        "packet": packet,
        "step": stage.updates,
        "samples": stage.samples,
        "scalars": scalars,
        "accumulate": stage.update.accumulate,
        "threads": torch.get_num_threads(),
        "owners": {key: type(optimizer).__name__ for key, optimizer in trained_by.items()},
        "checksums": {file.name: checksum(file) for file in sorted(part.iterdir())},
    }
    # Written last: who sees the record of a stage may rely on its tensors.
    write_atomically(record_path(partial, stage.index), json.dumps({**record, "checksum": checksum_of(record)}))


@contextmanager
def _written(final: Path) -> Iterator[None]:
    """Turn what the file system refuses while a checkpoint is written into one line that names it."""
    try:
        yield
    except (CheckpointException, OSError, SafetensorError) as error:
        raise TrainingError(
            f"cannot write the checkpoint {final}: {reason_of(error)}; free or mend the disk, then resume",
            code="checkpoint-not-written",
        ) from error


def refuse_unsavable_tensors(stage: Stage, plan: Plan) -> None:
    """Raise UsageError if a parameter or buffer has a dtype that the files of checkpoints do not know."""
    for key, tensor in _stage_state(stage, plan)[0].items():
        try:
            save({key: torch.empty(0, dtype=tensor.dtype)})
        except KeyError:
            raise UsageError(
                f"stage {stage.index}: {key} is {tensor.dtype}, which no checkpoint can hold; convert it, register a "
                "buffer with persistent=False, or train without checkpoints",
                code="dtype-not-savable",
                key="checkpoint",
            ) from None


def _refuse_not_finite(stage: Stage, plan: Plan, packet: int) -> None:
    """Raise TrainingError if a parameter is not finite: such a checkpoint is not worth keeping."""
    for name, parameter in stage.named_parameters(name_of_critic(stage, plan)).items():
        values = list(memory_of(parameter).values())[-1]
        if parameter.requires_grad and not bool(values.isfinite().all()):
            raise TrainingError(
                f"stage {stage.index}: {name} is not finite after packet {packet - 1}; lower `optimizer.lr`, or set "
                "`training.clip_norm`",
                code="parameter-not-finite",
                key="optimizer.lr",
            )


def commit(folder: Path, step: int, stages: int, keep: Keep) -> bool:
    """Commit a checkpoint if all its parts are there, and delete superfluous ones; return whether it was done."""
    final = final_path(folder, step)
    partial = partial_path(final)
    if not all(record_path(partial, k).exists() for k in range(stages)):
        return False
    try:
        # A rename is atomic, but a loss of power may leave it on the disk without the files, unless they are synced
        # first. The folder that holds the name is synced after it.
        sync_folder(partial)
        partial.rename(final)
        sync(folder)
    except OSError:
        if not partial.exists():  # another stage found all parts there at the same moment
            return False
        raise
    for old in keep.superfluous(list_checkpoints(folder)):
        shutil.rmtree(old, ignore_errors=True)
    return True


def final_path(folder: Path, step: int) -> Path:
    """Return the path of the committed checkpoint of a step."""
    return folder / f"step-{step:08d}"


def partial_path(final: Path) -> Path:
    """Return where the parts of a checkpoint are written before it is committed."""
    return final.with_name(final.name + _PARTIAL)


def record_path(checkpoint: Path, stage: int) -> Path:
    """Return the JSON record of a stage."""
    return checkpoint / f"stage-{stage}.json"


def _stage_state(stage: Stage, plan: Plan) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return everything of a stage that training changes: its tensors, and the values that fit into JSON."""
    stage.update.show_weights_to_train()
    state = _optimizer_state(stage, plan)
    # The weights that are exported; where training goes on with others, these are kept beside them.
    stage.update.show_weights_to_evaluate()
    for parameter, weights in (stage.update.weights_to_train or {}).items():
        state[f"{TO_TRAIN}{_names(stage, plan)[parameter]}"] = weights
    parts = {"model": stage.trunk, f"critic.{name_of_critic(stage, plan)}": stage.critic}
    for prefix, module in parts.items():
        if module is not None:
            found = tensor_state(module) | extra_state(module)
            state |= {f"{prefix}.{key}": tensor for key, tensor in found.items()}
    if stage.update.plateau is not None:
        state |= {f"plateau.stage{stage.index}.{key}": value for key, value in stage.update.plateau.state().items()}
    state[f"rng.stage{stage.index}"] = stage.body.random.state
    state |= {f"rule.stage{stage.index}.{key}": value for key, value in stage.rule.state().items()}
    tensors = _apart({key: value.detach().contiguous() for key, value in state.items() if isinstance(value, Tensor)})
    return tensors, {key: value for key, value in state.items() if key not in tensors}


def _optimizer_state(stage: Stage, plan: Plan) -> dict[str, Any]:
    """Return what the optimizers keep of parameters and groups."""
    state: dict[str, Any] = {}
    for parameter, field, value in named_state(stage.all_optimizers, _names(stage, plan)):
        state[f"optimizer.{parameter}.{field}"] = value
    changed = changed_entries(stage.all_optimizers, stage.first_groups, scheduled=bool(stage.update.schedules))
    return state | {f"groups.stage{stage.index}.{key}": value for key, value in changed.items()}


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, those copied that share memory with an earlier one: the file format refuses shared memory."""
    seen: set[int] = set()
    found = {}
    for key, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        found[key] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


def _names(stage: Stage, plan: Plan) -> dict[Tensor, str]:
    return {parameter: key for key, parameter in stage.named_parameters(name_of_critic(stage, plan)).items()}


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the committed checkpoints, oldest first."""
    return sorted((p for p in folder.glob("step-*") if NAME.fullmatch(p.name) and p.is_dir()), key=step_of)


def list_incomplete(folder: Path) -> list[Path]:
    """Return the folders of parts that killed saves left behind."""
    return [p for p in folder.glob(f"step-*{_PARTIAL}") if NAME.fullmatch(p.name.removesuffix(_PARTIAL))]


def remove_incomplete(folder: Path) -> None:
    """Delete the parts that killed saves left behind."""
    for partial in list_incomplete(folder):
        shutil.rmtree(partial, ignore_errors=True)
