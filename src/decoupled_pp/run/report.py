"""What the ranks measured -> one report, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decoupled_pp.core.channels import LinkEnd
from decoupled_pp.core.device import peak_memory
from decoupled_pp.core.plans import Plan, count_parameters
from decoupled_pp.core.reports import Exit, Record, Report
from decoupled_pp.pipeline.meter import StageMeter
from decoupled_pp.pipeline.stage import Stage


def stage_record(stage: Stage, meter: StageMeter) -> Record:
    """Measurements of one stage."""
    summary = meter.summary()
    if stage.critic is None:
        summary["critic_time_fraction"] = 0.0  # the last stage's loss on the network's own head is no critic
    return {
        "stage": stage.index,
        "parameters": count_parameters(stage.trunk),
        "critic_parameters": count_parameters(stage.critic),
        "saved_activation_bytes_peak": stage.saved_activation_bytes_peak,
        "memory_bytes_peak": peak_memory(stage.body.device),
        **summary,
        "steps": stage.updates,
        "train_loss": meter.last_loss,
        "exit": meter.last_exit,
        "knn": meter.last_knn,
    }


def link_records(ends: Sequence[object]) -> list[Record]:
    """Counters of those of this process's inlets and outlets that are ends of links; `from` and `to` are stages."""
    links = [end for end in dict.fromkeys(ends) if isinstance(end, LinkEnd)]  # in one process a link is both its ends
    return [{"from": end.sender, "to": end.sender + 1, **vars(end.counters)} for end in links]


def make_report(gathered: list[dict[str, Any]], plan: Plan, stopped: str | None) -> Report:
    """Join what every process gathered."""
    stages = sorted((record for part in gathered for record in part["stages"]), key=lambda record: record["stage"])
    links: dict[int, Record] = {k: {"from": k, "to": k + 1} for k in range(plan.stages - 1)}
    for part in gathered:
        for record in part["links"]:
            link = links[record["from"]]
            for key, value in record.items():
                link[key] = value if key in ("from", "to") else link.get(key, 0) + value
    last = stages[-1]
    exits = tuple(
        Exit(r["stage"], r["exit"][0] if r["exit"] else None, r["exit"][1] if r["exit"] else None, r.get("knn"))
        for r in stages
    )
    hidden = ("exit", "knn", "train_loss", "steps", "seconds", "samples_per_second", "training_seconds", "step_seconds")
    return Report(
        steps=last["steps"],
        seconds=last["seconds"],
        training_seconds=last["training_seconds"],
        step_seconds=last["step_seconds"],
        samples_per_second=last["samples_per_second"],
        train_loss=last["train_loss"],
        exits=exits,
        per_stage=tuple({k: v for k, v in record.items() if k not in hidden} for record in stages),
        links=tuple(links.values()),
        stopped=stopped,
    )
