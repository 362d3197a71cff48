"""Writes a network out of a checkpoint, one stage in memory at a time: safetensors shards, for `from_pretrained`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from decoupled_pp.core.arguments import expect
from decoupled_pp.core.errors import UsageError
from decoupled_pp.run.checkpoints.files import cannot_write
from decoupled_pp.run.checkpoints.opened import Checkpoint, latest_checkpoint
from decoupled_pp.run.checkpoints.resume import of_another_network

INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def write_shards(
    checkpoints: Path | str | Checkpoint,
    output: Path | str,
    names: Mapping[str, str],
    instead: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write one shard for every stage, and an index of them.

    Args:
        checkpoints: One checkpoint, or a folder of them; then the newest is used.
        output: Folder to write.
        names: Key in the layers -> name in the files (`Split.names`).
        instead: For tied weights: name in the files -> the name whose tensor is written for it, and which is left out.

    Returns:
        The shards.

    Raises:
        UsageError: There is no checkpoint, it is of another network, or the folder cannot be written.
    """
    expect("checkpoints", checkpoints, (str, Path, Checkpoint), "a checkpoint, or the `checkpoints` folder of a run")
    expect("output", output, (str, Path), "the path of a folder")
    expect("names", names, Mapping, "the names that splitting found, as a dictionary")
    found = checkpoints if isinstance(checkpoints, Checkpoint) else latest_checkpoint(Path(checkpoints))
    if found is None:
        raise UsageError(
            f"{checkpoints} has no checkpoint; name the `checkpoints` folder of a run", code="no-checkpoint"
        )
    sources = {source: name for name, source in (instead or {}).items()}
    stages = len(found.parts)
    output = Path(output)
    shards = []
    size = 0
    placed: dict[str, str] = {}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for stage in range(stages):
            tensors = _tensors_of_stage(found, stage, names)
            tensors = {sources.get(name, name): t for name, t in tensors.items() if name not in (instead or {})}
            shard = output / _shard_name(stage, stages)
            save_file(tensors, shard, metadata={"format": "pt"})
            shards.append(shard)
            placed |= dict.fromkeys(tensors, shard.name)
            size += sum(tensor.nbytes for tensor in tensors.values())
        # Shards of an earlier export must go: a reader takes the first of these files that it finds.
        for stale in output.glob("model*.safetensors*"):
            if _WEIGHTS.fullmatch(stale.name) and stale not in shards:
                stale.unlink()
        if stages > 1:
            listed = {"metadata": {"total_size": size}, "weight_map": placed}
            (output / INDEX).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise cannot_write(output, error, "folder") from error
    return shards


def _shard_name(stage: int, stages: int) -> str:
    """Return the name that `from_pretrained` expects of one of so many shards."""
    if stages == 1:
        return "model.safetensors"
    return f"model-{stage + 1:05}-of-{stages:05}.safetensors"


def _tensors_of_stage(checkpoint: Checkpoint, stage: int, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the network's tensors that a stage has saved."""
    tensors: dict[str, Tensor] = {}
    for key, (folder, shape, dtype) in checkpoint.places.items():
        if folder.name == f"stage-{stage}" and key.startswith("model."):
            name = key.removeprefix("model.")
            if name not in names:
                raise of_another_network(checkpoint, f"it has {name}")
            tensors[key] = torch.empty(shape, dtype=dtype)
    checkpoint.fill(tensors)
    return {names[key.removeprefix("model.")]: tensor for key, tensor in tensors.items()}
