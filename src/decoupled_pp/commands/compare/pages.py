"""Writes a comparison down: `compare.json`, `compare.md`, and `report.html`, which opens without a network."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from decoupled_pp.commands.compare import pictures
from decoupled_pp.commands.compare.contenders import Contender
from decoupled_pp.commands.compare.figures import Spread, expected_speed_up, run_figures, summarize, targets
from decoupled_pp.commands.compare.runs import Failure, Run
from decoupled_pp.core import environment
from decoupled_pp.run.log import finite


@dataclass(frozen=True)
class Comparison:
    """All that a report is made of.

    Attributes:
        config: The configuration file.
        command: The command line that made it.
        ranks: Ranks of every contender but `backprop`.
        micro_batches: Per flush.
        batch_size: Samples per micro-batch.
        tokens_per_sample: For text; None otherwise.
        threads: CPU threads of every rank.
        contenders: Everybody who was to run.
        runs: Those that did.
        failures: Those that did not, and why.
    """

    config: str
    command: str
    ranks: int
    micro_batches: int
    batch_size: int
    tokens_per_sample: int | None
    threads: int
    contenders: Sequence[Contender]
    runs: Sequence[Run]
    failures: Sequence[Failure]

    def rows(self) -> dict[str, dict[str, Any]]:
        """Contender -> its numbers (`figures.summarize`), of those that ran."""
        names = {run.contender.name for run in self.runs}
        measured = [contender for contender in self.contenders if contender.name in names]
        return {one.name: summarize(one, self.runs, self.micro_batches, self.ranks) for one in measured}


COLUMNS = (
    ("tokens_per_second", "tokens/s", ",.0f", 1.0),
    ("samples_per_second", "samples/s", ",.0f", 1.0),
    ("ratio_to_1f1b", "x 1f1b", ".2f", 1.0),
    ("ratio_to_backprop", "x backprop", ".2f", 1.0),
    ("samples_per_update", "samples/update", ".0f", 1.0),
    ("step_p50", "update p50, ms", ".1f", 1e3),
    ("step_p95", "update p95, ms", ".1f", 1e3),
    ("share_of_ideal", "share of ideal", ".3f", 1.0),
    ("bubble", "bubble", ".3f", 1.0),
    ("textbook_bubble", "bubble by the book", ".3f", 1.0),
)
"""Key, title, format and unit of the speed table."""

QUALITY = (
    ("val_loss", "final held-out loss", ".4f", 1.0),
    ("val_accuracy", "accuracy, %", ".2f", 100.0),
    ("training_seconds", "training, s", ".1f", 1.0),
    ("seconds_to_target", "s to target", ".1f", 1.0),
    ("reached_target", "reached", "", 1.0),
)

MEMORY = (
    ("activation_bytes", "saved activations, MiB (worst rank)", ".2f", 2**-20),
    ("memory_bytes", "peak memory, MiB (worst rank)", ".0f", 2**-20),
)


def write_pages(folder: Path, comparison: Comparison) -> list[Path]:
    """Write the three files; returns their paths."""
    content = _content(comparison)
    loader = Environment(
        loader=PackageLoader("decoupled_pp.commands.compare"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    paths = [folder / name for name in ("compare.json", "compare.md", "report.html")]
    paths[0].write_text(json.dumps(finite(_raw(comparison)), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    for path, template in zip(paths[1:], ("compare.md.j2", "report.html.j2"), strict=True):
        path.write_text(loader.get_template(template).render(**content) + "\n", encoding="utf-8")
    return paths


def table(
    rows: dict[str, dict[str, Any]],
    columns: Sequence[tuple[str, str, str, float]],
    missing: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Titles and cells; a column nobody has a value for is left out. `missing`: key -> what stands for no value."""
    used = [column for column in columns if any(row[column[0]] is not None for row in rows.values())]
    none = missing or {}
    cells = {
        name: [_cell(row[key], form, unit, none.get(key, "-")) for key, _, form, unit in used]
        for name, row in rows.items()
    }
    return {"titles": [title for _, title, _, _ in used], "rows": cells}


def _cell(value: Any, form: str, unit: float, none: str = "-") -> tuple[str, str]:
    """A value (or what stands for none), and the range of the repeats if they differ."""
    if value is None:
        return none, ""
    if isinstance(value, Spread):
        middle, low, high = (format(x * unit, form) for x in (value.median, value.low, value.high))
        return middle, f"{low} .. {high}" if low != high else ""
    return (format(value * unit, form) if form else str(value)), ""


def _content(comparison: Comparison) -> dict[str, Any]:
    rows, goals = comparison.rows(), targets(comparison.runs)
    speed = {name: row for name, row in rows.items() if row["samples_per_second"] is not None}
    for row in speed.values():
        row["tokens_per_second"] = _tokens(row["samples_per_second"], comparison.tokens_per_sample)
    return {
        "comparison": comparison,
        "machine": f"{environment.cores()} CPU cores, torch {torch.__version__}, Python {platform.python_version()}",
        "speed": table(speed, COLUMNS),
        "quality": table(rows, QUALITY, {"seconds_to_target": "not reached"} if goals else None),
        "updates": _updates(comparison),
        "memory": table(rows, MEMORY),
        "activations": {name: row["activation_bytes_by_rank"] for name, row in rows.items()},
        "traffic": {name: row["traffic"] for name, row in rows.items()},
        "target": goals.get(0),
        "theory": _theory(comparison, rows),
        "pictures": {
            "timelines": pictures.timelines(comparison.runs, comparison.micro_batches),
            "quality": pictures.quality(comparison.runs, comparison.contenders, goals.get(0)),
            "speed": pictures.bars(rows, "samples_per_second", "samples per second", lambda x: f"{x:,.0f}"),
            "memory": pictures.bars(
                rows, "activation_bytes", "saved activations, bytes (worst rank)", lambda x: f"{x / 2**20:.2f} MiB"
            ),
        },
    }


def _updates(comparison: Comparison) -> dict[str, Any]:
    """Updates and samples per update of every contender."""
    size = comparison.batch_size
    cells = {one.name: [(f"{one.steps:,}", ""), (f"{one.accumulate * size:,}", "")] for one in comparison.contenders}
    return {"titles": ["updates", "samples per update"], "rows": cells}


def _tokens(samples: Spread, tokens_per_sample: int | None) -> Spread | None:
    if tokens_per_sample is None:
        return None
    return Spread(*(value * tokens_per_sample for value in (samples.median, samples.low, samples.high)))


def _theory(comparison: Comparison, rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """What decoupled over 1F1B should be, beside what it was; None unless both ran."""
    name = next((one for one in ("decoupled_per_flush", "decoupled") if one in rows), None)
    if name is None or "1f1b" not in rows or rows[name]["critic_ratio"] is None:
        return None
    critic = rows[name]["critic_ratio"].median
    return {
        "name": name,
        "critic": critic,
        "expected": expected_speed_up(critic, comparison.ranks, comparison.micro_batches),
        "measured": _cell(rows[name]["ratio_to_1f1b"], ".3f", 1.0),
    }


def _raw(comparison: Comparison) -> dict[str, Any]:
    rows = comparison.rows()
    return {
        **{key: value for key, value in vars(comparison).items() if key not in ("contenders", "runs", "failures")},
        "strategies": {
            name: {key: asdict(value) if isinstance(value, Spread) else value for key, value in row.items()}
            for name, row in rows.items()
        },
        "own_settings": {one.name: list(one.own) for one in comparison.contenders if one.own},
        "not_measured": {failure.contender.name: failure.reason for failure in comparison.failures},
        "targets": targets(comparison.runs),
        "runs": [
            {
                "name": run.contender.name,
                "repeat": run.repeat,
                "figures": run_figures(run),
                "validations": run.validations,
                "summary": run.summary,
            }
            for run in comparison.runs
        ],
    }
