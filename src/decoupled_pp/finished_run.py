"""What can be done with the folder of a run afterwards: score its exits, export its network."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from decoupled_pp import environment, run_folder
from decoupled_pp.checkpoint import Checkpoint, export_safetensors, latest_checkpoint
from decoupled_pp.config import load_settings
from decoupled_pp.contracts import Exit, Record, UsageError
from decoupled_pp.job import make_trainer, prepare
from decoupled_pp.models import build_model
from decoupled_pp.resume import load_model
from decoupled_pp.settings import Settings


def open_run(folder: Path, overrides: tuple[str, ...] = ()) -> tuple[Settings, Checkpoint]:
    """A run folder's settings, with the cut of its newest checkpoint unless an override says otherwise, and that one.

    Raises:
        UsageError: It is no run folder, or holds no good checkpoint.
    """
    config = folder / run_folder.CONFIG_FILE
    if not config.is_file():
        raise UsageError(f"{folder} is not a run folder: it has no {run_folder.CONFIG_FILE}")
    checkpoint = latest_checkpoint(folder / run_folder.CHECKPOINTS)
    if checkpoint is None:
        raise UsageError(f"{folder} has no checkpoint yet")
    sizes = [b - a for a, b in pairwise(checkpoint.boundaries)]
    return load_settings(config, (f"stages={len(sizes)}", f"cut={sizes}", *overrides)), checkpoint


def evaluate_run(
    folder: Path, overrides: tuple[str, ...] = (), note: Callable[[str], None] = print
) -> tuple[Exit, ...]:
    """Held-out scores of every exit of a run, in this process.

    Args:
        folder: The run folder.
        overrides: `key.sub=value`, on top of its settings.
        note: Is told what could not be taken over from the checkpoint (a critic that starts anew).
    """
    settings, checkpoint = open_run(folder, overrides)
    torch.set_num_threads(settings.threads or environment.cores())
    data, _, plan = prepare(settings)
    if data is None:
        raise UsageError("evaluate runs in one process, not under torchrun")
    trainer = make_trainer(settings, plan)

    def observe(records: list[Record]) -> None:
        for record in records:
            if record["kind"] == "note":
                note(record["text"])

    trainer.observe(observe)
    return trainer.evaluate(data.validation, resume=checkpoint)


def export_folder(folder: Path, output: Path) -> None:
    """Write the newest checkpoint of a run as plain safetensors; the data need not be there any more."""
    settings, checkpoint = open_run(folder)
    module = build_model(settings.model, run_folder.read_info(folder))
    load_model(checkpoint, module)
    export_safetensors(module, output)
