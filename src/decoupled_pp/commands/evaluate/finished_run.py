"""What can be done with the folder of a run afterwards: score its exits, export its network."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch import nn

from decoupled_pp.commands.evaluate.exits import Evaluation, ensemble, exit_costs, progressive
from decoupled_pp.commands.evaluate.gradient_probe import gradient_cosines
from decoupled_pp.core import environment
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.plans import Layers
from decoupled_pp.core.reports import NoteRecord, Record
from decoupled_pp.models import build_model
from decoupled_pp.models.transformers_export import export_transformers
from decoupled_pp.run import folder as run_folder
from decoupled_pp.run.checkpoints.parts import Checkpoint, export_safetensors, latest_checkpoint
from decoupled_pp.run.checkpoints.resume import load_model
from decoupled_pp.run.checkpoints.shards import write_shards
from decoupled_pp.settings.load import load_settings
from decoupled_pp.settings.run import STAGES_ALONE, Settings
from decoupled_pp.settings.sections import HuggingFaceModel
from decoupled_pp.training.job import make_decoupled
from decoupled_pp.training.prepare import prepare


def open_run(folder: Path, overrides: tuple[str, ...] = ()) -> tuple[Settings, Checkpoint | None]:
    """A run folder's settings, with the cut of its newest checkpoint unless an override says otherwise, and that one.

    A baseline saves none: of such a run the settings are those of one stage that starts from its exported weights.

    Raises:
        UsageError: It is no run folder, or holds no good checkpoint.
    """
    config = folder / run_folder.CONFIG_FILE
    if not config.is_file():
        raise UsageError(f"{folder} is not a run folder: it has no {run_folder.CONFIG_FILE}")
    checkpoint = latest_checkpoint(folder / run_folder.CHECKPOINTS)
    if checkpoint is None and load_settings(config).strategy != "decoupled":
        left_out = (f"{key}={json.dumps(value)}" for key, value in STAGES_ALONE.items())
        whole = ("strategy=decoupled", "stages=1", "cut=uniform", f"start_from={folder}", *left_out)
        return load_settings(config, (*whole, *overrides)), None
    if checkpoint is None:
        raise UsageError(f"{folder} has no checkpoint yet")
    sizes = [b - a for a, b in pairwise(checkpoint.boundaries)]
    return load_settings(config, (f"stages={len(sizes)}", f"cut={sizes}", "start_from=null", *overrides)), checkpoint


def evaluate_run(
    folder: Path,
    overrides: tuple[str, ...] = (),
    note: Callable[[str], None] = print,
    *,
    thresholds: Sequence[float] = (),
    together: bool = False,
    gradients: int = 0,
) -> Evaluation:
    """Held-out scores of every exit of a run, in this process, on as much data as its `validation.batches` says.

    Args:
        folder: The run folder.
        overrides: `key.sub=value`, on top of its settings.
        note: Is told what could not be taken over from the checkpoint (a critic that starts anew).
        thresholds: Confidences at which samples leave early.
        together: Score the sum of all exits' logits too.
        gradients: Training micro-batches on which local gradients are compared with the true ones.

    Raises:
        UsageError: It is no run folder, or what is asked for does not fit its data.
    """
    settings, checkpoint = open_run(folder, overrides)
    torch.set_num_threads(settings.threads or environment.cores())
    data, _, plan = prepare(settings)
    if data is None:
        raise UsageError("evaluate runs in one process, not under torchrun")
    trainer = make_decoupled(settings, plan)

    def observe(records: list[Record]) -> None:
        for record in records:
            if isinstance(record, NoteRecord):
                note(record.text)

    trainer.observe(observe)
    held_out = list(islice(data.validation.batches(), settings.validation.batches))
    exits = trainer.evaluate(held_out, resume=checkpoint)
    costs = exit_costs(trainer.stages, trainer.plan.sample)
    probed = islice(data.train.batches(), gradients)
    return Evaluation(
        exits,
        costs,
        progressive(trainer.stages, held_out, costs, thresholds) if thresholds else (),
        ensemble(trainer.stages, held_out) if together else None,
        tuple(gradient_cosines(trainer.plan.module, trainer.stages, probed)) if gradients else (),
    )


def export_folder(folder: Path, output: Path, *, tied: bool = False) -> None:
    """Write the newest checkpoint of a run as plain safetensors; the data need not be there any more.

    A `transformers` model becomes a folder for `from_pretrained`, unless `output` is called `*.safetensors`.

    Args:
        folder: The run folder.
        output: File or folder to write.
        tied: Make one weight again of those that were (a `transformers` model, as a folder).

    Raises:
        UsageError: It is no run folder, or nothing was tied.
    """
    settings, checkpoint = open_run(folder)
    info = run_folder.read_info(folder)

    def load(module: nn.Module) -> None:
        if checkpoint is None:
            run_folder.load_weights(folder, module)
        else:
            if any(parameter.is_meta for parameter in module.parameters()):
                module.to_empty(device="cpu")
            load_model(checkpoint, module)

    def write(target: Path, names: Mapping[str, str], instead: Mapping[str, str]) -> object:
        return write_shards(checkpoint or folder / run_folder.CHECKPOINTS, target, names, instead)

    if isinstance(settings.model, HuggingFaceModel) and output.suffix != ".safetensors":
        tokenizer = getattr(settings.data, "tokenizer", None)
        export_transformers(settings.model, info, load, write, output, tied=tied, tokenizer=tokenizer)
        return
    if tied:
        raise UsageError("--tied: only the folder of a transformers model has a place that says so; leave it out")
    module = build_model(settings.model, info)
    load(module)
    export_safetensors(module, output)


def exit_module(folder: str | Path, exit: int) -> nn.Sequential:
    """A smaller plain network: the layers of the stages up to an exit, under their own names, then its critic, `exit`.

    Args:
        folder: The run folder; its data must be there, for critics are built to fit them.
        exit: Index of the stage after which to leave; the last one is the whole network, without a critic.

    Raises:
        UsageError: It is no run folder, or has no such exit.
    """
    settings, checkpoint = open_run(Path(folder))
    if not 0 <= exit < settings.stages:
        raise UsageError(f"--exit {exit}: the run {folder} has exits 0 to {settings.stages - 1}")
    _, _, plan = prepare(settings)
    trainer = make_decoupled(settings, plan)
    trainer.build(checkpoint)
    kept = trainer.stages[: exit + 1]
    layers = {name: layer for stage in kept for name, layer in stage.trunk.named_children()}
    critic = trainer.stages[exit].critic
    if critic is not None and exit < settings.stages - 1:
        layers[_unused("exit", layers)] = critic
    return Layers(layers.items()).cpu().eval()


def _unused(name: str, taken: Container[str]) -> str:
    return name if name not in taken else _unused(f"{name}_", taken)
