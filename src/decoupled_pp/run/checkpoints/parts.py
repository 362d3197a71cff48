"""Saves, finds and exports checkpoints: a consistent cut of all stages, written stage by stage, committed by a rename.

    checkpoints/step-00000200.incomplete/          every stage writes its own part after the same packet, alone
        stage-0/*.safetensors                      tensors, by torch.distributed.checkpoint (safetensors format)
        stage-0.json                               written last: numbers, file checksums
        stage-1/ ...
    checkpoints/step-00000200/                     renamed by whichever stage finds all parts there

Nothing is pickled: DCP's own metadata file is a pickle, its safetensors format is not. Tensors are keyed by name
(`model.*`, `critic.<cut>.*`, `optimizer.<parameter>.<key>`, `groups.stage<k>.*`, `rule.stage<k>.*`, ...), so any number
of stages can load them (`resume.py`).
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from decoupled_pp.core.errors import TrainingError, UsageError
from decoupled_pp.core.extra_state import exported_state, extra_state, tensor_state
from decoupled_pp.core.plans import Plan
from decoupled_pp.core.structures import memory_of, stored, write
from decoupled_pp.pipeline.optimizer_state import changed_entries, named_state, owners
from decoupled_pp.pipeline.stage import Stage
from decoupled_pp.run.checkpoints.files import (
    cannot_write,
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
_CORRUPT = "checkpoint-corrupt"


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
_NAME = re.compile(r"step-(\d{8,})")


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
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()), key=step_of)


def list_incomplete(folder: Path) -> list[Path]:
    """Return the folders of parts that killed saves left behind."""
    return [p for p in folder.glob(f"step-*{_PARTIAL}") if _NAME.fullmatch(p.name.removesuffix(_PARTIAL))]


def remove_incomplete(folder: Path) -> None:
    """Delete the parts that killed saves left behind."""
    for partial in list_incomplete(folder):
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, opened and checked."""

    path: Path
    boundaries: tuple[int, ...]
    packet: int
    step: int
    samples: int
    parts: tuple[dict[str, Any], ...]  # the JSON record of every stage
    places: dict[str, tuple[Path, torch.Size, torch.dtype]]  # where each tensor is: name -> (part folder, shape, dtype)

    def merged(self, key: str) -> dict[str, Any]:
        """Return an entry of the records of all stages, `owners` or `scalars`, as one."""
        merged: dict[str, Any] = {}
        for part in self.parts:
            merged |= part[key]
        return merged

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Read the tensors of these names in place; all must be in the checkpoint, in these shapes."""
        by_folder: dict[Path, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            # An expanded tensor is no place to read into, and `contiguous` copies it; else it returns it if it can.
            by_folder.setdefault(self.places[key][0], {})[key] = tensor.detach().contiguous()
        with warnings.catch_warnings():
            # `no_dist`: every stage reads and writes alone, whatever process group there is.
            warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
            for folder, part in by_folder.items():
                try:
                    dcp.load(part, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
                except CheckpointException as error:  # a BaseException, which nobody else expects
                    raise _corrupt(self.path, f"{folder.name}: {reason_of(error)}") from error
                for key, read in part.items():
                    if read.data_ptr() != tensors[key].data_ptr():
                        write(tensors[key].detach(), read)


def open_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint; `verify` reads every file, which one that this run has just written can go without."""
    try:
        first = json.loads((path / "stage-0.json").read_text())
        if first["format"] != FORMAT:
            raise UsageError(
                f"checkpoint {path} has format {first['format']}, and this version reads {FORMAT}; use the version "
                "that wrote it",
                code="checkpoint-of-another-format",
            )
        parts = tuple(json.loads((path / f"stage-{k}.json").read_text()) for k in range(first["stages"]))
        for part in parts:
            if part.pop("checksum") != checksum_of(part):
                raise _corrupt(path, f"stage-{part['stage']}.json was altered")
        _refuse_mixed(path, parts)
        places: dict[str, tuple[Path, torch.Size, torch.dtype]] = {}
        for part in parts:
            folder = path / f"stage-{part['stage']}"
            if verify:
                _verify(path, folder, part["checksums"])
            for key, entry in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
                places[key] = (folder, entry.size, entry.properties.dtype)  # type: ignore[union-attr]
    except UsageError:
        raise
    except json.JSONDecodeError as error:
        raise _corrupt(path, "the record of a stage is no JSON") from error
    except (OSError, KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        # whatever a damaged JSON or safetensors file leads to
        raise _corrupt(path, f"{type(error).__name__}: {error}") from error
    return Checkpoint(path, tuple(first["boundaries"]), first["packet"], first["step"], first["samples"], parts, places)


def _refuse_mixed(path: Path, parts: Sequence[dict[str, Any]]) -> None:
    """Raise UsageError unless all parts are of the cut, the packet and the step that the first one is of."""
    for number, part in enumerate(parts):
        if part["stage"] != number:
            raise _corrupt(path, f"stage-{number}.json is the record of stage {part['stage']}")
        for key in ("step", "packet", "boundaries"):
            if part[key] != parts[0][key]:
                raise _corrupt(path, f"stage 0 was saved at {key} {parts[0][key]}, stage {number} at {part[key]}")
    step = parts[0]["step"]
    if _NAME.fullmatch(path.name) and step_of(path) != step:  # a copy under a name of its own may have any
        raise _corrupt(path, f"its parts were saved at step {step}")


def _verify(path: Path, folder: Path, checksums: dict[str, int]) -> None:
    # The reader opens whatever is called so.
    strangers = {file.name for file in folder.glob("*.safetensors")} - checksums.keys()
    if strangers:
        raise UsageError(
            f"checkpoint {path} was saved without {folder.name}/{min(strangers)}; take that file away",
            code="checkpoint-with-strange-file",
        )
    for name, expected in checksums.items():
        if checksum(folder / name) != expected:
            raise _corrupt(path, f"{folder.name}/{name} does not match its checksum")


def _corrupt(path: Path, why: str) -> UsageError:
    """Return the error of a damaged checkpoint, with the checkpoint before it as the remedy."""
    before = list_checkpoints(path.parent)
    before = before[: before.index(path)] if path in before else []
    remedy = "it is the first: start anew (--overwrite)"
    if before:
        remedy = f"delete {path} to go on from {before[-1].name}"
    return UsageError(f"checkpoint {path} is corrupt: {why}; {remedy}", code=_CORRUPT)


def newest_whole(folder: Path) -> tuple[Checkpoint | None, dict[str, str]]:
    """Return the newest checkpoint that can be read, and of each newer one the name and why it cannot.

    Raises:
        UsageError: There are only damaged ones, or one of another format, which is not damaged.
    """
    damaged: dict[str, UsageError] = {}
    for path in reversed(list_checkpoints(folder)):
        try:
            newest = open_checkpoint(path)
        except UsageError as error:
            if error.code != _CORRUPT:
                raise
            damaged[path.name] = error
        else:
            return newest, {name: error.text.partition("; ")[0] for name, error in damaged.items()}
    if damaged:
        raise next(iter(damaged.values()))
    return None, {}


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is none any more and its user can look at it; return the new path."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    return aside


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest committed checkpoint of a run, opened and checked; None if there is none."""
    found = list_checkpoints(folder)
    return open_checkpoint(found[-1]) if found else None


def export_safetensors(module: torch.nn.Module, path: Path) -> None:
    """Write a plain module's state as one safetensors file (atomically), under the names of the user's own model."""
    try:
        write_weights(module, path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error, "file") from error


def write_weights(module: torch.nn.Module, path: Path) -> None:
    """Do so, and let through what the file system raises (safetensors has an error of its own for it)."""
    state = exported_state(module)
    own_names = getattr(module, "own_names", {}) or {name: name for name in state}
    # Clones, because the format refuses tied weights, which share memory.
    tensors = stored({own: state[name] for own, name in own_names.items()})
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # by the user's umask; safetensors would make a file for its owner alone
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
