"""`dpp sweep FILE`: trains variants of one configuration over several seeds, and says how they differ seed by seed."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from decoupled_pp.commands.arguments import add_overrides, check_at_least
from decoupled_pp.commands.child import Trial, check_entry, say
from decoupled_pp.core import environment
from decoupled_pp.core.errors import TrainingError, UsageError
from decoupled_pp.core.paths import expanded
from decoupled_pp.core.records import write_json
from decoupled_pp.core.suggestions import did_you_mean
from decoupled_pp.core.threads import choose_threads
from decoupled_pp.settings.load import load_settings
from decoupled_pp.settings.sections import Section
from decoupled_pp.settings.yaml_text import read_yaml_file

_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")
"""Matches characters of a variant's name that the name of a run cannot hold."""


class SweepSettings(Section):
    """The content of a sweep file."""

    config: str
    """The configuration that all variants share; a path from the working directory."""
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name -> what it changes, as `key.sub: value`."""
    reference: str | None = None
    """The variant that all others are set against, seed by seed; default: the first."""
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    """Seeds of the runs, the same for all variants."""
    tune: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Setting -> values that every variant is tried with on the first seed; the best held-out score goes on."""
    also: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name -> other held-out data (`data.key: value`) that every finished run is scored on, too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dpp sweep`."""
    parser.add_argument("file", help="YAML file: config, variants, reference, seeds (docs/sweep.md)")
    parser.add_argument("--output", help="folder of the table and of all runs; default: runs/<name of the file>")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own; default: 1")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are finished, do the others")
    parser.add_argument("--overwrite", action="store_true", help="clear the folder if it exists")
    add_overrides(parser, "override for all variants")
    parser.set_defaults(run=run_command)


def run_command(chosen: argparse.Namespace) -> int:
    """Checks every variant, runs all, writes `sweep.json`, `sweep.md` and `sweep.png`."""
    if environment.world_size() > 1:
        raise UsageError("dpp sweep starts the runs itself: run it without torchrun", code="under-torchrun")
    check_at_least(chosen, jobs=1)
    file = Path(expanded(chosen.file))
    sweep = load_sweep(file)
    reference = sweep.reference or next(iter(sweep.variants))
    if reference not in sweep.variants:
        raise UsageError(
            f"{file}: reference {reference!r} is no variant; give one of {', '.join(sweep.variants)}",
            code="unknown-reference",
        )
    folder = Path(expanded(chosen.output or f"runs/{file.stem}"))
    also = {name: _overrides(changes) for name, changes in sweep.also.items()}
    trials = _trials(sweep, folder, chosen.set, chosen.jobs)
    to_try: dict[str, Sequence[str]] = {name: [*chosen.set, *own] for name, own in also.items()}
    to_try |= {own[0].name: own[0].overrides for own in trials.values() if _to_do(own, chosen.resume)}
    _try_all(sweep.config, to_try)
    from decoupled_pp.commands.results_folder import SWEEP

    text = file.read_text(encoding="utf-8")  # it may lie in the folder that is cleared
    advice = "--resume goes on, --overwrite starts anew, or give another --output"
    SWEEP.claim(folder, advice, resume=chosen.resume, overwrite=chosen.overwrite)
    (folder / SWEEP.marker).write_text(text, encoding="utf-8")
    from decoupled_pp.commands.sweep.figures import figures
    from decoupled_pp.commands.sweep.picture import draw
    from decoupled_pp.commands.sweep.tables import table
    from decoupled_pp.commands.sweep.tuning import run_tuned

    outcomes, tuning = run_tuned(trials, choices_of(sweep), also, jobs=chosen.jobs, resume=chosen.resume)
    if all(outcome.failure for outcome in outcomes):
        raise TrainingError(f"none of the runs ended well: {outcomes[0].failure}", code="nothing-ran")
    found = figures(outcomes, reference, sweep.tune, tuning)
    text = table(found, outcomes, f"{file}: {sweep.config}")
    (folder / "sweep.json").write_text(write_json(found, indent=2) + "\n", encoding="utf-8")
    (folder / "sweep.md").write_text(text, encoding="utf-8")
    draw(found, folder / "sweep.png")
    say(text)
    return 0


def choices_of(sweep: SweepSettings) -> list[dict[str, Any]]:
    """Returns every combination of the values of `tune`, as setting -> value; an empty one where there is none."""
    return [dict(zip(sweep.tune, values, strict=True)) for values in product(*sweep.tune.values())]


def _trials(sweep: SweepSettings, folder: Path, common: list[str], jobs: int) -> dict[tuple[str, int], list[Trial]]:
    """Returns (variant, number of a choice of `tune`) -> its runs by seed; the settings of all have been checked."""
    share = choose_threads(None, jobs).count
    found = {}
    for name, changes in sweep.variants.items():
        _refuse_tuned(name, changes, sweep.tune)
        for number, choice in enumerate(choices_of(sweep)):
            overrides = [*common, *_overrides(changes), *_overrides(choice)]
            threads = load_settings(sweep.config, tuple(overrides)).threads or share
            words = "-".join([name, *map(str, choice.values())])
            found[name, number] = [
                Trial(
                    entry=name,
                    name=f"{_UNFIT.sub('_', words)}-{seed}",
                    folder=folder,
                    config=sweep.config,
                    overrides=overrides,
                    seed=seed,
                    threads=threads,
                )
                for seed in sweep.seeds
            ]
    _refuse_equal_names(found.values())
    return found


def _refuse_tuned(name: str, changes: Mapping[str, Any], tune: Mapping[str, Any]) -> None:
    """Raises UsageError if a variant has a value of its own for a setting that `tune` gives values to."""
    for key in tune:
        if any(f"{one}.".startswith(f"{key}.") for one in changes):
            raise UsageError(
                f"variant {name} sets `{key}`, which `tune` tries for every variant; leave it out of one of the two",
                code="tuned-twice",
                key=key,
            )


def _refuse_equal_names(trials: Iterable[Sequence[Trial]]) -> None:
    names = Counter(own[0].name for own in trials)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise UsageError(
            f"{count} variants would have the run folder {name}; rename all but one of them", code="equal-variants"
        )


def _to_do(trials: Sequence[Trial], resume: bool) -> list[Trial]:
    from decoupled_pp.run.folder import SUMMARY_FILE  # imports torch

    return [trial for trial in trials if not (resume and (trial.run / SUMMARY_FILE).is_file())]


def _try_all(config: str, entries: Mapping[str, Sequence[str]]) -> None:
    """Raises UsageError unless all would run: all settings first, because that is quick, then data and networks."""
    settings = {name: load_settings(config, tuple(overrides)) for name, overrides in entries.items()}
    for name, own in settings.items():
        check_entry(name, own)


def _overrides(changes: Mapping[str, Any]) -> list[str]:
    """Returns changes of settings as `key=value`; JSON is YAML, too."""
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def load_sweep(path: Path) -> SweepSettings:
    """Returns the content of a sweep file, or raises UsageError; its variants are not looked into."""
    try:
        return SweepSettings.model_validate(read_yaml_file(path))
    except OSError as error:
        raise UsageError(
            f"cannot read the sweep {path}: {error.strerror}; give the path of a YAML file", code="sweep-not-readable"
        ) from None
    except ValidationError as error:
        raise UsageError(f"{path}: {_explain(error)}", code="bad-sweep-file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is not YAML: {' '.join(str(error).split())}; quote or correct it", code="not-yaml"
        ) from None


def _explain(error: ValidationError) -> str:
    """Returns the first fault of a sweep file: where, and what."""
    fault = error.errors()[0]
    place = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        keys = SweepSettings.model_fields
        return f"{place}: unknown key" + (did_you_mean(place, keys) or f"; use one of {', '.join(keys)}")
    return f"{place}: {fault['msg']}; given {fault['input']!r}"
