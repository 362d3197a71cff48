"""Writes a comparison down: `compare.json`, `compare.md`, and `report.html`, which opens without a network."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from decoupled_pp.commands.compare import pictures
from decoupled_pp.commands.compare.contenders import Contender
from decoupled_pp.commands.compare.figures import (
    ContenderFigures,
    expected_speed_up,
    run_figures,
    summarize,
    targets,
)
from decoupled_pp.commands.compare.runs import Failure, Run
from decoupled_pp.commands.spread import Spread
from decoupled_pp.core import environment
from decoupled_pp.core.records import JsonRecord, write_json


@dataclass(frozen=True, kw_only=True)
class Setup(JsonRecord):
    """The settings that all entries of a comparison share.

    Attributes:
        config: The configuration file.
        command: The command line that made it.
        ranks: Ranks of every contender but `backprop`.
        micro_batches: Micro-batches per flush.
        batch_size: Samples per micro-batch.
        tokens_per_sample: Tokens per sample of text; None otherwise.
        threads: CPU threads of every rank.
    """

    config: str
    command: str
    ranks: int
    micro_batches: int
    batch_size: int
    tokens_per_sample: int | None
    threads: int


@dataclass(frozen=True)
class Comparison:
    """All that a report is made of.

    Attributes:
        setup: The settings that all share.
        contenders: Everybody who was to run.
        runs: The runs that ended well.
        failures: The contenders that did not run, and why.
    """

    setup: Setup
    contenders: Sequence[Contender]
    runs: Sequence[Run]
    failures: Sequence[Failure]

    def rows(self) -> dict[str, ContenderFigures]:
        """Returns contender -> its numbers, of those that ran."""
        names = {run.contender.name for run in self.runs}
        return {
            one.name: summarize(one, self.runs, self.setup.micro_batches, self.setup.ranks)
            for one in self.contenders
            if one.name in names
        }


class Column(NamedTuple):
    """One column of a table.

    Attributes:
        title: Its title.
        read: Returns the value of a contender.
        form: How a number is formatted.
        unit: Factor by which a number is multiplied before.
        missing: Text that stands for no value.
    """

    title: str
    read: Callable[[ContenderFigures], Spread | float | str | None]
    form: str = ""
    unit: float = 1.0
    missing: str = "-"


SPEED = (
    Column("samples/s", lambda row: row.samples_per_second, ",.0f"),
    Column("x 1f1b", lambda row: row.ratio_to_1f1b, ".2f"),
    Column("x backprop", lambda row: row.ratio_to_backprop, ".2f"),
    Column("samples/update", lambda row: row.samples_per_update, ".0f"),
    Column("update p50, ms", lambda row: row.step_p50, ".1f", 1e3),
    Column("update p95, ms", lambda row: row.step_p95, ".1f", 1e3),
    Column("share of ideal", lambda row: row.share_of_ideal, ".3f"),
    Column("bubble", lambda row: row.bubble, ".3f"),
    Column("bubble by the book", lambda row: row.textbook_bubble, ".3f"),
)

QUALITY = (
    Column("final held-out loss", lambda row: row.val_loss, ".4f"),
    Column("accuracy, %", lambda row: row.val_accuracy, ".2f", 100.0),
    Column("training, s", lambda row: row.training_seconds, ".1f"),
)

MEMORY = (
    Column("saved activations, MiB (worst rank)", lambda row: row.activation_bytes, ".2f", 2**-20),
    Column("peak memory, MiB (worst rank)", lambda row: row.memory_bytes, ".0f", 2**-20),
)


def write_pages(folder: Path, comparison: Comparison) -> list[Path]:
    """Write the three files; returns their paths."""
    rows = comparison.rows()
    data = folder / "compare.json"
    data.write_text(write_json(_raw(comparison, rows), indent=2) + "\n", encoding="utf-8")
    content = _content(comparison, rows)
    templates = Environment(
        loader=PackageLoader("decoupled_pp.commands.compare"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages = [folder / "compare.md", folder / "report.html"]
    for page in pages:
        text = templates.get_template(f"{page.name}.j2").render(**content)
        page.write_text(text + "\n", encoding="utf-8")
    return [data, *pages]


def table(rows: Mapping[str, ContenderFigures], columns: Sequence[Column]) -> dict[str, Any]:
    """Returns titles and cells; a column nobody has a value for is left out."""
    used = [column for column in columns if any(column.read(row) is not None for row in rows.values())]
    return {
        "titles": [column.title for column in used],
        "rows": {name: [_cell(column, row) for column in used] for name, row in rows.items()},
    }


def _cell(column: Column, row: ContenderFigures) -> tuple[str, str]:
    """Returns a value (or what stands for none), and the range of the repeats if they differ."""
    value = column.read(row)
    if value is None:
        return column.missing, ""
    if isinstance(value, str):
        return value, ""
    if not isinstance(value, Spread):
        return format(value * column.unit, column.form), ""
    spread = value.scaled(column.unit)
    low, high = format(spread.low, column.form), format(spread.high, column.form)
    return format(spread.median, column.form), f"{low} .. {high}" if low != high else ""


def _content(comparison: Comparison, rows: Mapping[str, ContenderFigures]) -> dict[str, Any]:
    """Returns what the templates show."""
    goals = targets(comparison.runs)
    measured = {name: row for name, row in rows.items() if row.samples_per_second is not None}
    return {
        "setup": comparison.setup,
        "contenders": comparison.contenders,
        "failures": comparison.failures,
        "machine": f"{environment.cores()} CPU cores, torch {torch.__version__}, Python {platform.python_version()}",
        "speed": table(measured, [_tokens_column(comparison.setup.tokens_per_sample), *SPEED]),
        "quality": table(rows, [*QUALITY, *_target_columns("not reached" if goals else "-")]),
        "updates": _updates(comparison),
        "memory": table(rows, MEMORY),
        "activations": {name: row.activation_bytes_by_rank for name, row in rows.items()},
        "traffic": {name: row.traffic for name, row in rows.items()},
        "target": goals.get(0),
        "theory": _theory(comparison.setup, rows),
        "pictures": _pictures(comparison, rows, goals.get(0)),
    }


def _tokens_column(tokens_per_sample: int | None) -> Column:
    """Returns the throughput in tokens; a column without values if the data are no text."""

    def read(row: ContenderFigures) -> Spread | None:
        if tokens_per_sample is None or row.samples_per_second is None:
            return None
        return row.samples_per_second.scaled(tokens_per_sample)

    return Column("tokens/s", read, ",.0f")


def _target_columns(missing: str) -> list[Column]:
    return [
        Column("s to target", lambda row: row.seconds_to_target, ".1f", missing=missing),
        Column("reached", lambda row: row.reached_target),
    ]


def _pictures(comparison: Comparison, rows: Mapping[str, ContenderFigures], target: float | None) -> dict[str, str]:
    """Returns the pictures of the HTML page as SVG."""
    speeds = {name: row.samples_per_second for name, row in rows.items()}
    activations = {name: row.activation_bytes for name, row in rows.items()}
    return {
        "timelines": pictures.timelines(comparison.runs, comparison.setup.micro_batches),
        "quality": pictures.quality(comparison.runs, comparison.contenders, target),
        "speed": pictures.bars(speeds, "samples per second", lambda x: f"{x:,.0f}"),
        "memory": pictures.bars(activations, "saved activations, bytes (worst rank)", lambda x: f"{x / 2**20:.2f} MiB"),
    }


def _updates(comparison: Comparison) -> dict[str, Any]:
    """Returns a table of updates and samples per update of every contender."""
    size = comparison.setup.batch_size
    cells = {one.name: [(f"{one.steps:,}", ""), (f"{one.accumulate * size:,}", "")] for one in comparison.contenders}
    return {"titles": ["updates", "samples per update"], "rows": cells}


def _theory(setup: Setup, rows: Mapping[str, ContenderFigures]) -> dict[str, Any] | None:
    """Returns what decoupled over 1F1B should be, beside what it was; None unless both ran."""
    name = next((one for one in ("decoupled_per_flush", "decoupled") if one in rows), None)
    if name is None or "1f1b" not in rows:
        return None
    critic = rows[name].critic_ratio
    if critic is None:
        return None
    return {
        "name": name,
        "critic": critic.median,
        "expected": expected_speed_up(critic.median, setup.ranks, setup.micro_batches),
        "measured": _cell(Column("", lambda row: row.ratio_to_1f1b, ".3f"), rows[name]),
    }


def _raw(comparison: Comparison, rows: Mapping[str, ContenderFigures]) -> dict[str, Any]:
    """Returns the content of `compare.json`."""
    return {
        **comparison.setup,
        "strategies": rows,
        "own_settings": {one.name: one.own for one in comparison.contenders if one.own},
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
