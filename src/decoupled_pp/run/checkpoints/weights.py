"""Writes the weights of a plain module to one safetensors file."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from decoupled_pp.core.extra_state import exported_state
from decoupled_pp.core.structures import stored
from decoupled_pp.run.checkpoints.files import cannot_write


def export_safetensors(module: torch.nn.Module, path: Path) -> None:
    """Write a plain module's state as one safetensors file (atomically), under the names of the user's own model."""
    try:
        write_weights(module, path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error, "file") from error


def write_weights(module: torch.nn.Module, path: Path) -> None:
    """Write it, and let through what the file system raises (safetensors has an error of its own for it)."""
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
