"""Claims the folder of one run, and fills it with summary, pictures and weights at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from decoupled_pp.core import environment
from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import TrainingError, UsageError
from decoupled_pp.core.extra_state import exported_state, is_extra, load_exported
from decoupled_pp.core.records import write_json
from decoupled_pp.core.reports import Report, Span
from decoupled_pp.core.structures import stored
from decoupled_pp.run.checkpoints.files import reason_of, write_atomically
from decoupled_pp.run.checkpoints.opened import set_aside
from decoupled_pp.run.checkpoints.parts import list_checkpoints, list_incomplete, remove_incomplete
from decoupled_pp.run.in_progress import JOB_FILE, LOCK_FILE, RunLock, run_in_progress, running
from decoupled_pp.run.log import METRICS_FILE, TENSORBOARD_FOLDER, read_records
from decoupled_pp.run.output_folder import OutputFolder, mapping_in
from decoupled_pp.run.plots import plot_losses, plot_timeline
from decoupled_pp.run.trace import write_trace
from decoupled_pp.settings.run import Settings
from decoupled_pp.settings.yaml_text import write_yaml

T = TypeVar("T")

CONFIG_FILE = "config.yaml"
INFO_FILE = "data.json"
SUMMARY_FILE = "summary.json"
TRACE_FILE = "trace.json"
TIMELINE_PICTURE = "timeline.png"
LOSS_PICTURE = "loss.png"
CHECKPOINTS = "checkpoints"
WEIGHTS_FILE = "model.safetensors"

SETTINGS = ("name", "stages", "model", "data", "training")
"""Keys by which a `config.yaml` is known to be of a run: the name of that file alone belongs to everybody."""

_INTERRUPTED = "interrupted"

_WRITTEN = (
    *(CONFIG_FILE, INFO_FILE, SUMMARY_FILE, TRACE_FILE, METRICS_FILE, WEIGHTS_FILE),
    *(f"{name}.tmp" for name in (CONFIG_FILE, INFO_FILE, METRICS_FILE, SUMMARY_FILE, WEIGHTS_FILE)),
    *(TIMELINE_PICTURE, LOSS_PICTURE, JOB_FILE),
)
_WRITTEN_IN_NUMBERS = (
    f"{TENSORBOARD_FOLDER}/events.out.tfevents.*",
    f"{CHECKPOINTS}/step-*.damaged*",
    f"{LOCK_FILE}-*",
    f"{CHECKPOINTS}/{LOCK_FILE}*",
    "also-*.json",  # scores of a sweep
)


def load_weights(source: Path, module: nn.Module, key: str | None = "start_from") -> None:
    """Load a finished run's weights, or a safetensors file, which the setting `key` names, into a network."""
    where = f"`{key}` " if key is not None else ""
    file = source / WEIGHTS_FILE if source.is_dir() else source
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise OSError("it is no file")
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{where}{source}: cannot read {file}: {str(error).splitlines()[0]}; give the folder of a finished "
            "run (dpp train) or a safetensors file (dpp export)",
            code="weights-not-readable",
            key=key,
        ) from error
    own_names = getattr(module, "own_names", {})
    if own_names and own_names.keys() == tensors.keys():
        state = module.state_dict(keep_vars=True)
        owns = {id(state[name]): own for own, name in own_names.items()}  # a layer used twice has two keys here
        tensors = {name: tensors[owns[id(tensor)]] for name, tensor in state.items()}
    faults = list(_differences(tensors, stored(exported_state(module))))
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UsageError(
            f"{where}{file} {faults[0]}{more}; give the `model` settings that it was trained with",
            code="weights-of-another-network",
            key=key,
        )
    load_exported(module, tensors)


def _differences(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[str]:
    """Yields what a file's tensors lack, have too many of, or have in another shape than the network."""
    for name in own:
        if name not in tensors:
            yield f"lacks {name}"
    for name in tensors:
        if name not in own:
            yield f"has {name}, which the network lacks"
    for name, tensor in own.items():
        if name in tensors and tensors[name].shape != tensor.shape and not is_extra(name):
            yield f"has {name} of shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"


def _output(folder: Path) -> OutputFolder:
    return OutputFolder(
        path=folder,
        noun="run folder",
        marker=CONFIG_FILE,
        is_one=is_run,
        written=written,
        if_it_exists="--resume goes on, --overwrite starts anew, or change `name`",
        elsewhere="change `runs`",
        key="runs",
    )


def is_run(folder: Path) -> bool:
    """True if a run has been started in the folder; one that was emptied meanwhile leaves its checkpoints alone."""
    started = (folder / JOB_FILE).is_file() or mapping_in(folder / CONFIG_FILE, SETTINGS)
    return started or bool(list_checkpoints(folder / CHECKPOINTS))


def written(folder: Path) -> list[Path]:
    """Return all that runs have written into the folder; what else is in it is its user's."""
    names = [name for name in _WRITTEN if (folder / name).exists()]
    found = [folder / name for name in names]
    for pattern in _WRITTEN_IN_NUMBERS:
        found += folder.glob(pattern)
    return [*found, *list_checkpoints(folder / CHECKPOINTS), *list_incomplete(folder / CHECKPOINTS)]


def refuse_running(folder: Path) -> None:
    """Raise UsageError if a run is in progress in the folder, or a script in its checkpoints."""
    if (who := running(folder) or running(folder / CHECKPOINTS)) is not None:
        raise _in_progress(folder, who)


def _in_progress(folder: Path, who: str) -> UsageError:
    return run_in_progress(folder, who, "change `name`", key="name")


def check(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Decide whether a run may use the folder; only looks."""
    output = _output(folder)
    output.check(resume=resume, overwrite=overwrite)
    with output.named():
        _refuse_out_of_place(folder)
    refuse_running(folder)
    with output.named():
        found = list_checkpoints(folder / CHECKPOINTS) if resume else []
    if resume and not found:
        raise UsageError(
            f"{folder} has no checkpoint to resume from; start it without --resume (--overwrite if it exists)",
            code="nothing-to-resume",
        )


def _refuse_out_of_place(folder: Path) -> None:
    """Raise UsageError for a folder where runs write a file, or the other way round: it is not theirs to replace."""
    folders = (CHECKPOINTS, TENSORBOARD_FOLDER)
    found = [name for name in (*_WRITTEN, LOCK_FILE) if (folder / name).is_dir()]
    found += [name for name in folders if (folder / name).exists() and not (folder / name).is_dir()]
    if found:
        kind = "not a folder" if found[0] in folders else "a folder"
        raise UsageError(
            f"{folder / found[0]} is {kind}, and no run has made it; move it away, or change `name`",
            code="run-folder-out-of-place",
            key="name",
        )


def take(lock: RunLock, *, resume: bool, overwrite: bool) -> None:
    """Make the run folder, or check an existing one, and lock it; nothing in it is changed."""
    folder = lock.folder
    check(folder, resume=resume, overwrite=overwrite)
    with _output(folder).named():
        folder.mkdir(parents=True, exist_ok=True)
        if not lock.take():  # another one was faster
            raise _in_progress(folder, running(folder) or "it has just begun")


def claim(folder: Path, job: str, *, resume: bool, damaged: Mapping[str, str] | None = None) -> list[str]:
    """Make the run folder, once it is taken, this run's own, which may cost what is in it.

    Args:
        folder: The folder; nothing is refused any more.
        job: Name of this launch, by which a restart of its ranks knows the folder.
        resume: Go on from what is there; else what runs have written there is deleted.
        damaged: Names of checkpoints that are set aside, and what is wrong with them.

    Returns:
        What was set aside and why, for the user.
    """
    output = _output(folder)
    output.make(empty=not resume)
    notes = []
    with output.named():
        for name, why in (damaged or {}).items():
            aside = set_aside(folder / CHECKPOINTS / name)
            notes.append(f"{why}; it is kept as {aside.name}")
        if resume:
            remove_incomplete(folder / CHECKPOINTS)
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
        (folder / JOB_FILE).write_text(job, encoding="utf-8")
    return notes


def claimed_by(folder: Path, job: str) -> bool:
    """True if this job was the last to claim the folder, perhaps before torchrun started its workers again."""
    return _job_lines(folder)[:1] == [job]


def note_interrupt(folder: Path) -> None:
    """Note that the job was asked to end: whoever restarts its workers all the same must not go on."""
    with named(folder), (folder / JOB_FILE).open("a", encoding="utf-8") as file:
        file.write(f"\n{_INTERRUPTED}")


def was_interrupted(folder: Path) -> bool:
    """True if the last job that claimed the folder was asked to end."""
    return _INTERRUPTED in _job_lines(folder)[1:]


def _job_lines(folder: Path) -> list[str]:
    file = folder / JOB_FILE
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def named(folder: Path) -> AbstractContextManager[None]:
    """Turn what the file system refuses inside the block into one line that names the run folder."""
    return _output(folder).named()


def write_config(folder: Path, settings: Settings, sizes: tuple[int, ...] | None) -> None:
    """Write the resolved settings of the run, or of the last that went on with it."""
    resolved: dict[str, Any] = settings.model_dump()
    # A baseline may have more stages than the settings name, or one: its cut would not fit them.
    if sizes is not None and len(sizes) == settings.stages:
        resolved["cut"] = list(sizes)
        resolved["balance"]["speeds"] = None  # it is in the cut now, and has no effect on a listed one
    write_atomically(folder / CONFIG_FILE, write_yaml(resolved))


def write_info(folder: Path, info: DataInfo) -> None:
    """Write what the data are like, for an export that builds the network when they are no longer there."""
    write_atomically(folder / INFO_FILE, json.dumps(info.known()) + "\n")


def read_info(folder: Path) -> DataInfo:
    """Returns what `write_info` wrote; it can neither encode nor decode."""
    return _read(folder / INFO_FILE, DataInfo.of, "a run that is resumed writes it anew", "data-info-damaged")


def write_results(
    folder: Path, report: Report, spans: Mapping[int, Sequence[Span]], about: Mapping[str, str], unit: str
) -> list[Path]:
    """Write `trace.json`, `timeline.png`, `loss.png`, and last `summary.json`: with it, the run has its results."""
    summary = {**about, "ranks": environment.world_size(), **report}
    write_trace(folder / TRACE_FILE, spans)
    timeline, losses = folder / TIMELINE_PICTURE, folder / LOSS_PICTURE
    plot_timeline(spans, timeline)
    plot_losses(read_records(folder / METRICS_FILE), losses, unit)
    write_atomically(folder / SUMMARY_FILE, write_json(summary, indent=2) + "\n")
    return [timeline, losses]


@contextmanager
def results_written(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses while results are written into one line; --resume writes them again."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"cannot write the results into {folder}: {reason_of(error)}; free or mend the disk",
            code="results-not-written",
        ) from error


def has_results(folder: Path, steps: int) -> bool:
    """True if a run of at least so many steps has left its results in the folder."""
    try:
        return read_summary(folder).steps >= steps
    except UsageError:
        return False


def read_summary(folder: Path) -> Report:
    """Returns the report in the `summary.json` of a finished run."""
    return _read(folder / SUMMARY_FILE, Report.from_json, "do the run again", "summary-damaged")


def _read(file: Path, build: Callable[[Any], T], remedy: str, code: str) -> T:
    try:
        return build(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        fault = f"is damaged: {error}"
        if isinstance(error, OSError):
            fault = f"cannot be read: {error.strerror}"
        elif isinstance(error, KeyError):
            fault = f"lacks {error}"
        raise UsageError(f"{file} {fault}; {remedy}", code=code) from error
