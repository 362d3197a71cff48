"""What the runs of a sweep say in numbers: per variant the median with the spread, and differences seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from decoupled_pp.commands.sweep.runs import Outcome
from decoupled_pp.core.reports import Record
from decoupled_pp.pipeline.meter import BUSY


def figures(outcomes: Sequence[Outcome], reference: str) -> dict[str, Any]:
    """Variant -> its numbers over the seeds that ended well, and the raw scores of every run.

    Accuracies are in percent. `loss_change` is in percent of the reference's loss and `accuracy_change` in points, each
    against the reference's run with the same seed, of the network's own head.
    """
    by_run = {(one.trial.variant, one.trial.seed): one.summary for one in outcomes if one.summary is not None}
    also = {(one.trial.variant, one.trial.seed): one.also for one in outcomes}
    variants = dict.fromkeys(one.trial.variant for one in outcomes)
    rows = {}
    for name in variants:
        own = {seed: summary for (variant, seed), summary in by_run.items() if variant == name}
        if own:
            pairs = [(summary, by_run.get((reference, seed))) for seed, summary in own.items()]
            rows[name] = {
                "seeds": len(own),
                "loss": _spread(_loss(one) for one in own.values()),
                "accuracy": _spread(_accuracy(one["final"]) for one in own.values()),
                "loss_change": _spread(_loss_change(a, b) for a, b in pairs),
                "accuracy_change": _spread(_accuracy_change(a, b) for a, b in pairs),
                "exits": _exits(list(own.values())),
                "also": {
                    key: {
                        "loss": _spread(also[name, seed][key]["val_loss"] for seed in own),
                        "loss_change": _spread(_change(also, name, reference, seed, key) for seed in own),
                    }
                    for key in also[name, next(iter(own))]
                },
                "critic_share": max(critic_share(row) for one in own.values() for row in one["per_stage"]),
                "critic_parameters": next(
                    sum(r["critic_parameters"] for r in one["per_stage"]) for one in own.values()
                ),
                "training_seconds": _spread(one["training_seconds"] for one in own.values()),
            }
    runs = [
        {"variant": o.trial.variant, "seed": o.trial.seed, "overrides": list(o.trial.overrides), "failure": o.failure}
        | ({"exits": o.summary["exits"], "final": o.summary["final"]} if o.summary is not None else {})
        | ({"also": dict(o.also)} if o.also else {})
        for o in outcomes
    ]
    return {"reference": reference, "variants": rows, "runs": runs}


def critic_share(stage: Record) -> float:
    """The critic's share of the time in which a stage computes: its passes, and its part of the optimizer step.

    The step is divided by parameters, which is right for optimizers that treat all alike.
    """
    if not stage["critic_time_fraction"]:  # no critic: the phase is the loss of the network itself
        return 0.0
    seconds, critic = stage["phase_seconds"], stage["critic_parameters"]
    step = seconds["step"] * critic / max(1, critic + stage["parameters"])
    return float((seconds["critic"] + step) / sum(seconds[phase] for phase in BUSY))


def table(found: dict[str, Any], outcomes: Sequence[Outcome], title: str, reference: str) -> str:
    """The numbers as a Markdown table; failures below it."""
    titles = ["variant", "seeds", "held-out loss", "accuracy, %", f"loss against {reference}, %"]
    others = next((list(row["also"]) for row in found["variants"].values()), [])
    titles += [one for key in others for one in (f"loss on {key}", f"against {reference}, %")]
    titles += [f"accuracy against {reference}", "by exit", "critic's share of time", "critic parameters", "seconds"]
    lines = [f"# {title}", "", "Medians (least .. greatest) over the seeds; differences are taken seed by seed.", ""]
    lines += ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    for name, row in found["variants"].items():
        cells = [name, str(row["seeds"]), _shown(row["loss"], ".4f"), _shown(row["accuracy"], ".2f")]
        cells += [_shown(row["loss_change"], "+.2f")]
        for other in row["also"].values():
            cells += [_shown(other["loss"], ".4f"), _shown(other["loss_change"], "+.2f")]
        cells += [_shown(row["accuracy_change"], "+.2f"), " / ".join(row["exits"])]
        cells += [f"{row['critic_share']:.2f}", f"{row['critic_parameters']:,}", _shown(row["training_seconds"], ".0f")]
        lines.append("| " + " | ".join(cells) + " |")
    failed = [f"- {one.trial.name} failed: {one.failure}" for one in outcomes if one.failure]
    return "\n".join([*lines, *(["", *failed] if failed else []), ""])


def _loss(summary: Record) -> float:
    loss = summary["final"]["val_loss"]
    return math.inf if loss is None else loss


def _accuracy(score: Record) -> float | None:
    accuracy = score["val_accuracy"]
    return None if accuracy is None else 100 * accuracy


def _loss_change(ours: Record, theirs: Record | None) -> float | None:
    return None if theirs is None else 100 * (_loss(ours) / _loss(theirs) - 1)


def _change(
    also: Mapping[tuple[str, int], Mapping[str, Record]], name: str, reference: str, seed: int, key: str
) -> float | None:
    """Of the loss on other data, in percent of the reference's run of the same seed."""
    ours, theirs = also[name, seed][key]["val_loss"], also.get((reference, seed), {}).get(key, {}).get("val_loss")
    return None if ours is None or theirs is None else 100 * (ours / theirs - 1)


def _accuracy_change(ours: Record, theirs: Record | None) -> float | None:
    pair = (_accuracy(ours["final"]), _accuracy(theirs["final"]) if theirs is not None else None)
    return None if pair[0] is None or pair[1] is None else pair[0] - pair[1]


def _exits(summaries: Sequence[Record]) -> list[str]:
    """Median score of every exit: accuracy in percent, else the loss."""
    columns = list(zip(*(summary["exits"] for summary in summaries), strict=True))
    scores = []
    for column in columns:
        accuracies = [value for value in map(_accuracy, column) if value is not None]
        losses = [one["val_loss"] for one in column if one["val_loss"] is not None]
        form, values = (".2f", accuracies) if accuracies else (".4f", losses)
        scores.append(format(statistics.median(values), form) if values else "-")
    return scores


def _spread(values: Any) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {"median": statistics.median(known), "min": min(known), "max": max(known)} if known else None


def _shown(spread: dict[str, float] | None, form: str) -> str:
    if spread is None:
        return "-"
    middle, low, high = (format(spread[key], form) for key in ("median", "min", "max"))
    return middle if low == high else f"{middle} ({low} .. {high})"
