"""The folder of one run: made, refused or cleared first, filled with summary, pictures and weights at the end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from decoupled_pp.core import environment
from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.reports import Record, Report
from decoupled_pp.run.checkpoints.parts import list_checkpoints, remove_incomplete, write_atomically
from decoupled_pp.run.log import METRICS_FILE, finite, read_records
from decoupled_pp.run.plots import plot_losses, plot_timeline
from decoupled_pp.run.trace import write_trace
from decoupled_pp.settings.run import Settings
from decoupled_pp.settings.yaml_text import write_yaml

CONFIG_FILE = "config.yaml"
INFO_FILE = "data.json"
SUMMARY_FILE = "summary.json"
CHECKPOINTS = "checkpoints"
WEIGHTS_FILE = "model.safetensors"
JOB_FILE = ".job"


def load_weights(source: Path, module: nn.Module) -> None:
    """Load a finished run's exported weights, or a safetensors file, into a network.

    Raises:
        UsageError: It cannot be read, or holds another network's tensors.
    """
    file = source / WEIGHTS_FILE if source.is_dir() else source
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"start_from {source}: cannot read {file}: {str(error).splitlines()[0]}; give the folder of a finished run "
            "(dpp train) or a safetensors file (dpp export)"
        ) from error
    own = module.state_dict()
    faults = [f"lacks {name}" for name in own if name not in tensors]
    faults += [f"has {name}, which the network lacks" for name in tensors if name not in own]
    faults += [
        f"has {name} of shape {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UsageError(f"start_from {file} {faults[0]}{more}; give the model settings that it was trained with")
    module.load_state_dict(tensors)


def check(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Decide whether a run may use the folder; only looks.

    Raises:
        UsageError: It exists and neither is allowed, there is nothing to resume, or it cannot be written.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other; give one")
    try:
        if resume and not list_checkpoints(folder / CHECKPOINTS):
            raise UsageError(
                f"{folder} has no checkpoint to resume from; start it without --resume (--overwrite if it exists)"
            )
        if not resume and folder.exists() and any(folder.iterdir()):
            if not overwrite:
                raise UsageError(
                    f"run folder {folder} exists; --resume goes on, --overwrite starts anew, or change `name`"
                )
            if not (folder / CONFIG_FILE).exists():
                raise UsageError(f"{folder} holds no {CONFIG_FILE}, so it is no run folder and is not overwritten")
    except OSError as error:
        raise _unwritable(folder, error.strerror or str(error)) from error
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise _unwritable(folder, f"{there} is not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise _unwritable(folder, f"no permission to write {there}")


def claim(folder: Path, job: str, *, resume: bool, overwrite: bool) -> None:
    """Make the run folder or take over an existing one, which may cost what is in it; nothing is refused after this.

    Args:
        folder: The run folder.
        job: Who claims it; see `claimed_by`.
        resume: Keep what is there.
        overwrite: Clear what is there.

    Raises:
        UsageError: As `check`.
    """
    check(folder, resume=resume, overwrite=overwrite)
    try:
        if resume:
            remove_incomplete(folder / CHECKPOINTS)
        elif folder.exists():
            shutil.rmtree(folder)
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        (folder / JOB_FILE).write_text(job, encoding="utf-8")
    except OSError as error:
        raise _unwritable(folder, error.strerror or str(error)) from error


def claimed_by(folder: Path, job: str) -> bool:
    """Whether this job, perhaps before torchrun started its workers again, was the last to claim the folder."""
    file = folder / JOB_FILE
    return file.is_file() and file.read_text(encoding="utf-8") == job


def _unwritable(folder: Path, reason: str) -> UsageError:
    return UsageError(f"cannot write the run folder {folder}: {reason}; change `runs`")


def write_config(folder: Path, settings: Settings, sizes: tuple[int, ...] | None) -> None:
    """The resolved settings of the run, or of the last that went on with it.

    Its cut is written down if it has as many stages as the settings name: baselines may have more of them, or one.
    """
    resolved: dict[str, Any] = settings.model_dump()
    resolved["cut"] = list(sizes) if sizes is not None and len(sizes) == settings.stages else settings.cut
    write_atomically(folder / CONFIG_FILE, write_yaml(resolved))


def write_info(folder: Path, info: DataInfo) -> None:
    """What the data are like: the network is built from it again, for an export, when they are no longer there."""
    write_atomically(folder / INFO_FILE, json.dumps(info.known()) + "\n")


def read_info(folder: Path) -> DataInfo:
    """What `write_info` wrote; it can neither encode nor decode.

    Raises:
        UsageError: It is not there.
    """
    try:
        return DataInfo.of(json.loads((folder / INFO_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder / INFO_FILE} is missing or damaged ({error}); a run that is resumed writes it anew"
        ) from error


def write_results(folder: Path, report: Report, spans: dict[int, list[Any]], about: Record, unit: str) -> list[Path]:
    """`summary.json` (which begins with `about`), `trace.json`, `timeline.png`, `loss.png`; returns the pictures."""
    text = json.dumps(finite(about | summary(report, environment.world_size())), indent=2, allow_nan=False) + "\n"
    (folder / SUMMARY_FILE).write_text(text, encoding="utf-8")
    write_trace(folder / "trace.json", spans)
    pictures = [folder / "timeline.png", folder / "loss.png"]
    plot_timeline(spans, pictures[0])
    plot_losses(read_records(folder / METRICS_FILE), pictures[1], unit)
    return pictures


def summary(report: Report, ranks: int) -> Record:
    """The content of `summary.json`, of a run of `ranks` processes."""
    last = report.exits[-1]
    return {
        "ranks": ranks,
        "steps": report.steps,
        "seconds": report.seconds,
        "training_seconds": report.training_seconds,
        "step_seconds": report.step_seconds,
        "samples_per_second": report.samples_per_second,
        "final": {"train_loss": report.train_loss, "val_loss": last.val_loss, "val_accuracy": last.val_accuracy},
        "exits": [vars(one) for one in report.exits],
        "per_stage": list(report.per_stage),
        "links": list(report.links),
        "stopped": report.stopped,
    }


def failure_in(log: Path, code: int) -> str:
    """The first thing that `dpp` said in a log (how to go on comes last), else the log's last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("dpp: ") for line in lines if line.startswith("dpp: ")]
    return (said[:1] or lines[-1:] or ["no output"])[0] + f" (exit code {code}, {log})"
