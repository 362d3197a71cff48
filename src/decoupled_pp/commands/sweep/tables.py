"""Writes the numbers of a sweep as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence

from decoupled_pp.commands import depth
from decoupled_pp.commands.spread import Column
from decoupled_pp.commands.sweep.figures import SweepFigures
from decoupled_pp.commands.sweep.runs import Outcome


def table(found: SweepFigures, outcomes: Sequence[Outcome], title: str) -> str:
    """Returns the numbers as a Markdown table; failures below it."""
    columns = _columns(found)
    titles = ["variant", *(column.title for column in columns)]
    lines = [f"# {title}", "", "Medians (least .. greatest) over the seeds; differences are taken seed by seed.", ""]
    lines += [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for name, row in found.variants.items():
        cells = [name]
        for column in columns:
            value, span = column.cell(row)
            cells.append(f"{value} ({span})" if span else value)
        lines.append(f"| {' | '.join(cells)} |")
    notes = [
        *(f"- {name} beside {row.plain}: {row.depth.text}" for name, row in found.variants.items() if row.depth),
        *_notes_on_tuning(found),
        *(f"- {one.trial.name} failed: {one.failure}" for one in outcomes if one.failure),
    ]
    if notes:
        lines += ["", *notes]
    return "\n".join([*lines, ""])


def _notes_on_tuning(found: SweepFigures) -> list[str]:
    """Returns how every variant was tuned, and whose best value lies at an end of the range."""
    if not found.tune:
        return []
    ranges = "; ".join(f"{key} of {', '.join(map(str, values))}" for key, values in found.tune.items())
    notes = [f"- every variant was tuned alike: {ranges}, the best on the first seed by held-out score"]
    for name, row in found.variants.items():
        ends = [key for key, value in row.tuned.items() if value in (found.tune[key][0], found.tune[key][-1])]
        notes += [f"- {name}: the best {key}, {row.tuned[key]}, is at an end of its range: widen it" for key in ends]
    return notes


def _columns(found: SweepFigures) -> list[Column]:
    against = f"against {found.reference}"
    points = any(row.depth.points for row in found.variants.values() if row.depth)
    first = [
        Column("seeds", lambda row: row.seeds),
        *map(_tuned_column, found.tune),
        Column("held-out loss", lambda row: row.loss, ".4f"),
        Column("accuracy, %", lambda row: row.accuracy, ".2f"),
        Column(f"loss {against}, %", lambda row: row.loss_change, "+.2f"),
    ]
    for name in next((row.also for row in found.variants.values()), {}):
        first += _other_columns(name, against)
    return [
        *first,
        Column(f"accuracy {against}", lambda row: row.accuracy_change, "+.2f"),
        Column("by exit", lambda row: " / ".join(row.exits)),
        *depth.columns(points),
        Column("critic's share of time", lambda row: row.critic_share, ".2f"),
        Column("critic parameters", lambda row: row.critic_parameters, ","),
        Column("seconds", lambda row: row.training_seconds, ".0f"),
    ]


def _tuned_column(key: str) -> Column:
    return Column(key, lambda row: str(row.tuned.get(key, "-")))


def _other_columns(name: str, against: str) -> list[Column]:
    return [
        Column(f"loss on {name}", lambda row: row.also[name].loss, ".4f"),
        Column(f"{against}, %", lambda row: row.also[name].loss_change, "+.2f"),
    ]
