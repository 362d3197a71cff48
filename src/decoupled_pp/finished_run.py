"""What can be done with the folder of a run afterwards: score its exits, export its network."""

from __future__ import annotations

from pathlib import Path

import torch

from decoupled_pp import environment, run_folder
from decoupled_pp.checkpoint import Checkpoint, export_safetensors, latest_checkpoint
from decoupled_pp.config import load_settings
from decoupled_pp.contracts import Exit, UsageError
from decoupled_pp.data import open_data
from decoupled_pp.job import make_trainer, prepare
from decoupled_pp.models import build_model
from decoupled_pp.resume import load_model
from decoupled_pp.settings import Settings


def open_run(folder: Path, overrides: tuple[str, ...] = ()) -> tuple[Settings, Checkpoint]:
    """A run folder's settings and newest checkpoint.

    Raises:
        UsageError: It is no run folder, or holds no good checkpoint.
    """
    if not (folder / run_folder.CONFIG_FILE).is_file():
        raise UsageError(f"{folder} is not a run folder: it has no {run_folder.CONFIG_FILE}")
    settings = load_settings(folder / run_folder.CONFIG_FILE, overrides)
    checkpoint = latest_checkpoint(folder / run_folder.CHECKPOINTS)
    if checkpoint is None:
        raise UsageError(f"{folder} has no checkpoint yet")
    return settings, checkpoint


def evaluate_run(folder: Path, overrides: tuple[str, ...] = ()) -> tuple[Exit, ...]:
    """Held-out scores of every exit of a run, in this process."""
    settings, checkpoint = open_run(folder, overrides)
    torch.set_num_threads(settings.threads or environment.cores())
    data, _, plan = prepare(settings)
    if data is None:
        raise UsageError("evaluate runs in one process, not under torchrun")
    return make_trainer(settings, plan).evaluate(data.validation, resume=checkpoint)


def export_folder(folder: Path, output: Path) -> None:
    """Write the newest checkpoint of a run as plain safetensors."""
    settings, checkpoint = open_run(folder)
    module = build_model(settings.model, open_data(settings.data, settings.seed).info)
    load_model(checkpoint, module)
    export_safetensors(module, output)
