"""Writes a network out of a checkpoint, one stage in memory at a time: safetensors shards, for `from_pretrained`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from decoupled_pp.core.errors import UsageError
from decoupled_pp.run.checkpoints.parts import Checkpoint, latest_checkpoint

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
        checkpoints: The folder of checkpoints, of which the newest counts, or one of them.
        output: Folder to write.
        names: Key in the layers -> name in the files (`Split.names`).
        instead: Name in the files -> another one whose tensor is written for it; that one is left out (tied weights).

    Returns:
        The shards.

    Raises:
        UsageError: There is no checkpoint, it is of another network, or the folder cannot be written.
    """
    found = checkpoints if isinstance(checkpoints, Checkpoint) else latest_checkpoint(Path(checkpoints))
    if found is None:
        raise UsageError(f"{checkpoints} has no checkpoint")
    sources = {source: name for name, source in (instead or {}).items()}
    stages = len(found.parts)
    output, shards, size = Path(output), [], 0
    placed: dict[str, str] = {}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for stage in range(stages):
            tensors = _of_stage(found, stage, names)
            tensors = {sources.get(name, name): t for name, t in tensors.items() if name not in (instead or {})}
            shard = output / (
                "model.safetensors" if stages == 1 else f"model-{stage + 1:05}-of-{stages:05}.safetensors"
            )
            save_file(tensors, shard, metadata={"format": "pt"})
            shards.append(shard)
            placed |= dict.fromkeys(tensors, shard.name)
            size += sum(tensor.nbytes for tensor in tensors.values())
        for stale in output.glob("model*.safetensors*"):  # a reader takes the first of these that it finds
            if _WEIGHTS.fullmatch(stale.name) and stale not in shards:
                stale.unlink()
        if stages > 1:
            listed = {"metadata": {"total_size": size}, "weight_map": placed}
            (output / INDEX).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror or error}; name another folder") from error
    return shards


def _of_stage(checkpoint: Checkpoint, stage: int, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The network's tensors that a stage has saved."""
    tensors: dict[str, Tensor] = {}
    for key, (folder, shape, dtype) in checkpoint.places.items():
        if folder.name == f"stage-{stage}" and key.startswith("model."):
            name = key.removeprefix("model.")
            if name not in names:
                raise UsageError(f"checkpoint {checkpoint.path} is of another network: it has {name}")
            tensors[key] = torch.empty(shape, dtype=dtype)
    checkpoint.fill(tensors)
    return {names[key.removeprefix("model.")]: tensor for key, tensor in tensors.items()}
