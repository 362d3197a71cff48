"""Writes a comparison down: `compare.json`, `compare.md`, and `report.html`, which opens without a network."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from decoupled_pp.commands import depth
from decoupled_pp.commands.compare import pictures
from decoupled_pp.commands.compare.contenders import Contender
from decoupled_pp.commands.compare.figures import (
    ContenderFigures,
    expected_speed_up,
    run_figures,
    summarize,
    targets,
)
from decoupled_pp.commands.compare.runs import Run
from decoupled_pp.commands.spread import Column
from decoupled_pp.core.records import JsonRecord, write_json
from decoupled_pp.core.threads import cores
from decoupled_pp.run.plots import STYLE


@dataclass(frozen=True, kw_only=True)
class Setup(JsonRecord):
    """The settings that all entries of a comparison share; `compare.json` begins with them."""

    config: str
    command: str
    ranks: int  # of every contender but `backprop`
    micro_batches: int  # per flush
    batch_size: int  # samples per micro-batch
    tokens_per_sample: int | None  # None if the data are no text
    threads: int  # of every rank


@dataclass(frozen=True)
class Comparison:
    """All that a report is made of."""

    setup: Setup
    contenders: Sequence[Contender]
    runs: Sequence[Run]  # those that ended well
    failures: Mapping[str, str]  # contender -> why it did not run


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

REACHED = Column("reached", lambda row: row.reached_target)

MEMORY = (
    Column("saved activations, MiB (worst rank)", lambda row: row.activation_bytes, ".2f", 2**-20),
    Column("peak memory, MiB (worst rank)", lambda row: row.memory_bytes, ".0f", 2**-20),
)


def write_pages(folder: Path, comparison: Comparison) -> list[Path]:
    """Writes the three files; returns their paths."""
    setup = comparison.setup
    names = {run.contender.name for run in comparison.runs}
    entries = [one for one in comparison.contenders if one.name in names]
    rows = {one.name: summarize(one, comparison.runs, setup.micro_batches, setup.ranks) for one in entries}
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


def _table(rows: Mapping[str, Any], columns: Sequence[Column]) -> dict[str, Any]:
    """Returns titles and cells; a column nobody has a value for is left out."""
    used = [column for column in columns if any(column.read(row) is not None for row in rows.values())]
    return {
        "titles": [column.title for column in used],
        "rows": {name: [column.cell(row) for column in used] for name, row in rows.items()},
    }


def _depth_columns(rows: Mapping[str, ContenderFigures]) -> list[Column]:
    return depth.columns(any(row.depth.points for row in rows.values() if row.depth))


def _content(comparison: Comparison, rows: Mapping[str, ContenderFigures]) -> dict[str, Any]:
    """Returns what the templates show."""
    setup = comparison.setup
    goals = targets(comparison.runs)
    measured = {name: row for name, row in rows.items() if row.samples_per_second is not None}
    tokens = [SPEED[0]._replace(title="tokens/s", unit=setup.tokens_per_sample)] if setup.tokens_per_sample else []
    to_target = Column("s to target", lambda row: row.seconds_to_target, ".1f", missing="not reached" if goals else "-")
    updates = [
        Column("updates", lambda one: one.steps, ","),
        Column("samples per update", lambda one: one.accumulate, ",", setup.batch_size),
    ]
    return {
        "setup": setup,
        "contenders": comparison.contenders,
        "failures": comparison.failures,
        "machine": f"{cores()} CPU cores, torch {torch.__version__}, Python {platform.python_version()}",
        "speed": _table(measured, [*tokens, *SPEED]),
        "quality": _table(rows, [*QUALITY, *_depth_columns(rows), to_target, REACHED]),
        "depth": {name: row.depth.text for name, row in rows.items() if row.depth},
        "updates": _table({one.name: one for one in comparison.contenders}, updates),
        "memory": _table(rows, MEMORY),
        "activations": {name: row.activation_bytes_by_rank for name, row in rows.items()},
        "traffic": {name: row.traffic for name, row in rows.items()},
        "target": goals.get(0),
        "theory": _theory(setup, rows),
        "pictures": _pictures(comparison, rows, goals.get(0)),
    }


def _pictures(comparison: Comparison, rows: Mapping[str, ContenderFigures], target: float | None) -> dict[str, str]:
    """Returns the pictures of the HTML page as SVG."""
    memory = MEMORY[0]._replace(title="saved activations, bytes (worst rank)")
    with matplotlib.rc_context(STYLE):
        return {
            "timelines": pictures.timelines(comparison.runs, comparison.setup.micro_batches),
            "quality": pictures.quality(comparison.runs, comparison.contenders, target),
            "speed": pictures.bars(rows, SPEED[0]._replace(title="samples per second")),
            "memory": pictures.bars(rows, memory, " MiB"),
        }


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
        "measured": Column("", lambda row: row.ratio_to_1f1b, ".3f").cell(rows[name]),
    }


def _raw(comparison: Comparison, rows: Mapping[str, ContenderFigures]) -> dict[str, Any]:
    """Returns the content of `compare.json`."""
    return {
        **comparison.setup,
        "strategies": rows,
        "own_settings": {one.name: one.own for one in comparison.contenders if one.own},
        "not_measured": comparison.failures,
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
