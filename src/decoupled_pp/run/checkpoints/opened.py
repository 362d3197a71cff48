"""Opens checkpoints: checks all their parts, and reads tensors out of them."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.structures import write
from decoupled_pp.run.checkpoints.files import checksum, checksum_of, reason_of
from decoupled_pp.run.checkpoints.parts import FORMAT, NAME, list_checkpoints, step_of

CORRUPT = "checkpoint-corrupt"


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
    if NAME.fullmatch(path.name) and step_of(path) != step:  # a copy under a name of its own may have any
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
    return UsageError(f"checkpoint {path} is corrupt: {why}; {remedy}", code=CORRUPT)


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
            if error.code != CORRUPT:
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
