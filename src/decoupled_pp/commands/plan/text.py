"""Writes predictions and scaling curves as plain text: tables, and every assumption beside them. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from decoupled_pp.commands.plan.costs import Profile, StageCosts, stage_costs
from decoupled_pp.commands.plan.predict import Prediction, RankMemory, Setting, Traffic
from decoupled_pp.commands.plan.scaling import Point, Scale
from decoupled_pp.commands.plan.simulate import Link

MIB = 2.0**20


def describe_plan(
    profile: Profile, setting: Setting, predictions: Mapping[str, Prediction], refused: Mapping[str, str]
) -> str:
    """Returns the output of `dpp plan CONFIG`, from strategy -> prediction, and strategy -> why there is none."""
    memory = [[kind, *map(_memory, one.memory)] for kind, one in predictions.items()]
    links = [[kind, *_links(one.traffic)] for kind, one in predictions.items() if one.traffic]
    cuts = []
    for kind, one in predictions.items():
        stages = stage_costs(profile, one.boundaries, critics=False)
        cuts.append([kind, *(stage.span for stage in stages)])
    lines = [
        f"Predicted, not run: {setting.ranks} ranks, {setting.micro_batches} micro-batches of {profile.samples} "
        "samples per optimizer step",
        f"profile: {profile.source}",
        "",
        *_columns(_plan_rows(predictions, setting.micro_batches)),
        "",
        "Memory of every rank, MiB: states (parameters, gradients, optimizer) + saved activations + link buffers",
        *_columns(memory),
        "",
        "Bytes per sample over every link: activations forward / gradients backward (/ credits)",
        *_columns(links),
        "",
    ]
    if "decoupled" in predictions:
        boundaries = predictions["decoupled"].boundaries
        lines += _cut_lines(stage_costs(profile, boundaries, critics=True, speeds=setting.speeds))
    lines += ["Cuts (layers of every stage)", *_columns(cuts)]
    lines += [f"{kind}: not predicted: {reason}" for kind, reason in refused.items()]
    lines += ["", "Assumptions (docs/planner.md)", *(f"- {line}" for line in _plan_assumptions(setting))]
    return "\n".join(lines) + "\n"


def _plan_rows(predictions: Mapping[str, Prediction], micro_batches: int) -> list[list[str]]:
    rows = [["strategy", "ms/step", "ms/micro-batch", "samples/s", "of 1f1b", "share of ideal", "bubble", "MiB"]]
    base = predictions["1f1b"].samples_per_second if "1f1b" in predictions else math.nan
    for kind, one in predictions.items():
        rows.append(
            [
                kind,
                f"{one.step_seconds * 1e3:.3f}",
                f"{one.step_seconds * 1e3 / micro_batches:.3f}",
                f"{one.samples_per_second:,.0f}",
                f"{one.samples_per_second / base:.2f}" if math.isfinite(base) else "-",
                f"{one.share_of_ideal:.3f}",
                f"{one.bubble:.3f}",
                f"{max(memory.total for memory in one.memory) / MIB:.1f}",
            ]
        )
    return rows


def _memory(one: RankMemory) -> str:
    return f"{one.states / MIB:.1f}+{one.activations / MIB:.1f}+{one.buffers / MIB:.1f}"


def _cut_lines(stages: Sequence[StageCosts]) -> list[str]:
    """Returns the decoupled cut, stage by stage, and an empty line."""
    times = ("forward", "backward", "critic", "step")
    rows = [["stage", "layers", "parameters", *(f"{name} ms" for name in times), "states MiB", "saved MiB"]]
    for index, stage in enumerate(stages):
        rows.append(
            [
                str(index),
                stage.span if stage.depth == 1 else f"{stage.span} ({stage.depth})",
                f"{stage.parameter_bytes // 4:,}",
                *(f"{getattr(stage, name) * 1e3:.3f}" for name in times),
                f"{stage.memory / MIB:.1f}",
                f"{(stage.saved + stage.critic_saved) / MIB:.1f}",
            ]
        )
    return ["The decoupled cut: seconds and bytes of one micro-batch, critics included", *_columns(rows), ""]


def _links(traffic: Sequence[Traffic]) -> list[str]:
    """Returns a cell for every pair of ranks, both directions together: zbv sends activations either way."""
    there: dict[tuple[int, int], list[float]] = {}
    for one in traffic:
        sums = there.setdefault((min(one.source, one.target), max(one.source, one.target)), [0.0, 0.0, 0.0])
        for index, value in enumerate((one.activations, one.gradients, one.credits)):
            sums[index] += value
    return [
        f"{low}-{high}: {sums[0]:,.0f} / {sums[1]:,.0f}" + (f" / {sums[2]:,.1f}" if sums[2] else "")
        for (low, high), sums in sorted(there.items())
    ]


def _plan_assumptions(setting: Setting) -> list[str]:
    devices = []
    if setting.speeds:
        devices.append(
            f"devices of speed {list(setting.speeds)} relative to the measured one (balance.speeds), known to every cut"
        )
    if setting.memory:
        sizes = ", ".join(f"{size / MIB:.1f}" for size in setting.memory)
        devices.append(
            f"devices have {sizes} MiB (balance.memory): the decoupled cut fits them, another must happen to"
        )
    return [
        *_link_assumptions(setting.link),
        *devices,
        "every pass of a layer always takes its median time; nothing else runs on the ranks; no jitter",
        f"decoupled: an optimizer step every {setting.accumulate} micro-batches (--set training.accumulate), links of "
        f"{setting.capacity} packets; the others: one step per flush; a step is the sum of its "
        "layers' steps, each measured alone",
        "ideal: the busiest rank's own compute back to back; bubble: share of all ranks' time without compute",
        "deepspeed: TrainSchedule with blocking sends; its engine's own overhead is not in it",
        "zero_bubble, zbv: the backward pass splits into input and weight parts at no extra cost",
        "data_parallel: a ring all-reduce that the last backward pass hides as far as it is long enough",
        "saved activations are kept until the weights' gradients are done; link buffers as the libraries allocate them",
    ]


def _link_assumptions(link: Link) -> list[str]:
    if link == Link():
        return ["links are free (--link, --latency, --message-time set them)"]
    rate = "without limit" if math.isinf(link.bandwidth) else f"{link.bandwidth / 1e9:g} GB/s"
    return [
        f"every pair of ranks has a link of its own, {rate} in each direction, latency {link.latency * 1e6:g} us; "
        f"handing over a message keeps its rank busy for {link.host * 1e6:g} us; a message leaves once word of its "
        "receive is there"
    ]


def describe_curves(scale: Scale, devices: Sequence[int], curves: Mapping[str, Sequence[Point | str]]) -> str:
    """Returns the output of `dpp plan --devices`."""
    rows = [
        ["strategy", "devices", "depth x replicas", "micro-batches", "s/step", "tokens/s", "efficiency", "GiB/device"]
    ]
    notes: list[str] = []
    for kind, points in curves.items():
        for count, one in zip(devices, points, strict=True):
            if isinstance(one, str):
                notes.append(f"{kind} on {count} devices: {one}")
                continue
            shape = [kind, str(count), f"{one.depth} x {one.replicas}", str(one.micro_batches)]
            figures = [f"{one.step_seconds:.3f}", f"{one.tokens_per_second:,.0f}", f"{one.efficiency:.3f}"]
            rows.append([*shape, *figures, f"{one.memory / 2**30:.1f}"])
    assumed = [f"- {line}" for line in _scaling_assumptions(scale)]
    head = "Predicted by counting and simulation; nothing was measured"
    return "\n".join([head, "", *_columns(rows), *notes, "", "Assumptions (docs/planner.md)", *assumed]) + "\n"


def _scaling_assumptions(scale: Scale) -> list[str]:
    if scale.weak:
        batch = (
            f"weak scaling: every replica takes {scale.micro_batches} micro-batches per step, so the batch grows with "
            "the replicas, and so may the samples that a loss needs"
        )
    else:
        batch = (
            f"strong scaling: {scale.micro_batches} micro-batches per step, whatever the devices, so that all points "
            "learn alike; replicas share them, and a pipeline gets few where there are many"
        )
    deepest = f", but no deeper than {scale.depth}" if scale.depth else ""
    return [
        *scale.model.assumptions(),
        *_link_assumptions(scale.link),
        batch,
        f"devices = depth x replicas: pipelines as deep as there are blocks{deepest}, then replicas; they add up "
        "gradients in a ring, which begins with the last backward pass",
        "decoupled stages take an optimizer step as often as the others (equal updates), each at its own time",
        "efficiency: forward and backward of the network, critics left out, over all devices' time",
        "memory is not limited: see GiB/device for what would have to fit",
    ]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligns rows: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=False)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines
