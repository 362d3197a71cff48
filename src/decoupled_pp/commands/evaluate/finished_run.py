"""Reads the folder of a finished run: scores its exits, builds the network of one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch import nn

from decoupled_pp.commands.depth import Pair, measure
from decoupled_pp.commands.evaluate.exits import Evaluation, ensemble, exit_costs, progressive
from decoupled_pp.commands.evaluate.gradient_probe import gradient_cosines
from decoupled_pp.commands.terminal import say
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.reports import NoteRecord, Record
from decoupled_pp.core.structures import spec_of
from decoupled_pp.core.threads import choose_threads
from decoupled_pp.run import folder as run_folder
from decoupled_pp.run.checkpoints.opened import Checkpoint, latest_checkpoint
from decoupled_pp.run.early_exit import EarlyExit, ended_by
from decoupled_pp.settings.load import load_settings
from decoupled_pp.settings.run import STAGES_ALONE, Settings
from decoupled_pp.training.job import make_decoupled
from decoupled_pp.training.prepare import prepare


def open_run(folder: Path, overrides: tuple[str, ...] = ()) -> tuple[Settings, Checkpoint | None]:
    """Returns the settings of a run with the cut of its newest checkpoint, and that checkpoint.

    A baseline saves no checkpoint. The settings of such a run are those of one stage that starts from the exported
    weights.
    """
    config = folder / run_folder.CONFIG_FILE
    if not config.is_file():
        raise UsageError(f"{folder} is not a run folder: it has no {run_folder.CONFIG_FILE}", code="not-a-run-folder")
    checkpoint = latest_checkpoint(folder / run_folder.CHECKPOINTS)
    if checkpoint is not None:
        sizes = [end - first for first, end in pairwise(checkpoint.boundaries)]
        as_saved = (f"stages={len(sizes)}", f"cut={sizes}", "start_from=null", "balance.speeds=null")
        return load_settings(config, (*as_saved, *overrides)), checkpoint
    if load_settings(config).strategy == "decoupled":
        raise UsageError(
            f"{folder} has no checkpoint yet; train on until `checkpoint.every` steps are done",
            code="no-checkpoint",
            key="checkpoint.every",
        )
    as_one_stage = [f"{key}={json.dumps(value)}" for key, value in STAGES_ALONE.items()]
    as_one_stage += ["strategy=decoupled", "stages=1", "cut=uniform", f"start_from={folder}"]
    return load_settings(config, (*as_one_stage, *overrides)), None


def evaluate_run(
    folder: Path,
    overrides: tuple[str, ...] = (),
    *,
    thresholds: Sequence[float] = (),
    together: bool = False,
    gradients: int = 0,
    plain: Path | None = None,
) -> Evaluation:
    """Scores every exit of a run, in this process, on as much held-out data as `validation.batches` says.

    Further: early exit at each of the thresholds, the sum of all exits' logits if `together`, local against true
    gradients on this many training micro-batches, and what depth is worth beside the run `plain` of the same network,
    trained by backpropagation.
    """
    beside = None if plain is None else _plain_evaluation(plain, folder, overrides)
    settings, checkpoint = open_run(folder, overrides)
    torch.set_num_threads(choose_threads(settings.threads, 1).count)
    data, _, plan = prepare(settings)
    if data is None:
        raise UsageError(
            "dpp evaluate runs in one process; run it without a launcher such as torchrun", code="launcher-refused"
        )
    trainer = make_decoupled(settings, plan)
    trainer.observe(_say_notes)
    held_out = list(islice(data.validation.batches(), settings.validation.batches))
    exits = trainer.evaluate(held_out, resume=checkpoint)
    stages = trainer.stages
    costs = exit_costs(stages, trainer.plan.sample)
    probed = islice(data.train.batches(), gradients)
    return Evaluation(
        exits=exits,
        costs=costs,
        progressive=progressive(stages, held_out, costs, thresholds) if thresholds else (),
        ensemble=ensemble(stages, held_out) if together else None,
        cosines=tuple(gradient_cosines(trainer.plan.module, stages, probed)) if gradients else (),
        depth=None if beside is None else measure([Pair(exits, beside.exits[-1])]),
    )


def _plain_evaluation(plain: Path, folder: Path, overrides: tuple[str, ...]) -> Evaluation:
    """Scores a run that trained the same network as a whole, on the same data; raises UsageError if it is another."""
    mine, theirs = (open_run(one, overrides)[0] for one in (folder, plain))
    for key in ("model", "data", "loss", "validation"):
        if getattr(mine, key) != getattr(theirs, key):
            raise UsageError(
                f"--plain {plain}: its `{key}` is not that of {folder}, so their scores cannot be compared; give a run "
                "of the same settings with --strategy backprop",
                code="another-task",
                key=key,
            )
    if theirs.stages > 1:
        raise UsageError(
            f"--plain {plain}: it was trained in {theirs.stages} stages; give a run with --strategy backprop",
            code="not-plain",
            key="strategy",
        )
    return evaluate_run(plain, overrides)


def _say_notes(records: Sequence[Record]) -> None:
    """Says what could not be taken over from the checkpoint (a critic that starts anew)."""
    for record in records:
        if isinstance(record, NoteRecord):
            say(record.text)


def exit_module(folder: str | Path, exit: int) -> nn.Sequential:
    """Builds a smaller network: the layers of the stages up to an exit by their own names, then its critic, `exit`.

    Args:
        folder: The run folder; its data must be there, because critics are built to fit them.
        exit: Index of the stage after which to leave; the last one gives the whole network, without a critic.

    Raises:
        UsageError: It is no run folder, or has no such exit.
    """
    return open_exit(Path(folder), exit)[1]


def open_exit(folder: Path, exit: int) -> tuple[EarlyExit, nn.Sequential]:
    """Returns the place of an exit, and the smaller network that ends there."""
    settings, checkpoint = open_run(folder)
    last = settings.stages - 1
    if not 0 <= exit <= last:
        raise UsageError(f"--exit {exit}: the run {folder} has exits 0 to {last}", code="unknown-exit")
    _, _, plan = prepare(settings)
    trainer = make_decoupled(settings, plan)
    trainer.build(checkpoint)
    place = EarlyExit(exit, settings.stages, trainer.plan.boundaries[exit + 1], spec_of(trainer.plan.sample))
    layers = [pair for stage in trainer.stages[: exit + 1] for pair in stage.trunk.named_children()]
    critic = None if place.is_last else trainer.stages[exit].critic
    return place, ended_by(layers, critic).cpu().eval()
