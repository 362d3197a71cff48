"""`dpp sweep FILE`: train variants of one configuration over several seeds, and say how they differ, seed by seed."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from decoupled_pp.commands.sweep.figures import figures, table
from decoupled_pp.commands.sweep.picture import draw
from decoupled_pp.commands.sweep.runs import Trial, run_trials
from decoupled_pp.core import environment
from decoupled_pp.core.errors import TrainingError, UsageError
from decoupled_pp.run.log import finite
from decoupled_pp.settings.load import load_settings
from decoupled_pp.settings.sections import Section
from decoupled_pp.settings.yaml_text import read_yaml


class SweepSettings(Section):
    """A sweep file."""

    config: str
    """The configuration that all variants share; a path from the working directory."""
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name -> what it changes, as `key.sub: value`."""
    reference: str | None = None
    """The variant that all others are set against, seed by seed; default: the first."""
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    """Seeds of the runs, the same for all variants."""
    also: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name -> other held-out data (`data.key: value`) that every finished run is scored on, too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("file", help="YAML file: config, variants, reference, seeds (docs/sweep.md)")
    parser.add_argument("--output", help="folder of the table and of all runs; default: runs/<name of the file>")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own; default: 1")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are finished, do the others")
    parser.add_argument("--overwrite", action="store_true", help="clear the folder if it exists")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override for all variants")
    parser.set_defaults(run=run_command)


def run_command(chosen: argparse.Namespace) -> int:
    """Check every variant, run all, write `sweep.json`, `sweep.md` and `sweep.png`."""
    if environment.world_size() > 1:
        raise UsageError("dpp sweep starts the runs itself: run it without torchrun")
    if chosen.jobs < 1:
        raise UsageError(f"--jobs {chosen.jobs} must be at least 1")
    sweep = load_sweep(Path(chosen.file))
    reference = sweep.reference or next(iter(sweep.variants))
    if reference not in sweep.variants:
        raise UsageError(f"{chosen.file}: reference {reference!r} is no variant; of {', '.join(sweep.variants)}")
    overrides = {name: [f"{k}={json.dumps(v)}" for k, v in one.items()] for name, one in sweep.variants.items()}
    also = {name: [f"{k}={json.dumps(v)}" for k, v in one.items()] for name, one in sweep.also.items()}
    checked = {name: load_settings(sweep.config, (*chosen.set, *own)) for name, own in overrides.items()}
    for own in also.values():
        load_settings(sweep.config, (*chosen.set, *own))
    folder = Path(chosen.output or f"runs/{Path(chosen.file).stem}")
    _claim(folder, Path(chosen.file), resume=chosen.resume, overwrite=chosen.overwrite)
    share = max(1, environment.cores() // chosen.jobs)
    trials = [
        Trial(name, seed, sweep.config, [*chosen.set, *own], folder, checked[name].threads or share, also)
        for seed in sweep.seeds
        for name, own in overrides.items()
    ]
    outcomes = run_trials(trials, jobs=chosen.jobs, resume=chosen.resume, say=_say)
    if all(outcome.failure for outcome in outcomes):
        raise TrainingError(f"none of the runs ended well: {outcomes[0].failure}")
    found = figures(outcomes, reference)
    text = table(found, outcomes, f"{chosen.file}: {sweep.config}", reference)
    (folder / "sweep.json").write_text(json.dumps(finite(found), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "sweep.md").write_text(text, encoding="utf-8")
    draw(found, folder / "sweep.png")
    _say(text)
    return 0


def load_sweep(path: Path) -> SweepSettings:
    """Read and check a sweep file; its variants are not looked into.

    Raises:
        UsageError: One line with the file, the fault and the remedy.
    """
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
        found: SweepSettings = SweepSettings.model_validate(raw)
    except OSError as error:
        raise UsageError(f"cannot read the sweep {path}: {error.strerror}; give the path of a YAML file") from None
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise UsageError(f"{path}: {place}: {fault['msg']}; a sweep has config, variants, reference, seeds") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return found


def _claim(folder: Path, file: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the folder, or take over the one of an earlier sweep, which has a copy of its file in it.

    Raises:
        UsageError: It exists and neither is allowed, or is no sweep's folder.
    """
    marker = folder / "sweep.yaml"
    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other; give one")
    if folder.exists() and any(folder.iterdir()):
        if not resume and not overwrite:
            raise UsageError(f"{folder} exists; --resume goes on, --overwrite starts anew, or give another --output")
        if not marker.is_file():
            raise UsageError(f"{folder} holds no sweep.yaml, so it is no sweep's folder and is left alone")
        if overwrite:
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
