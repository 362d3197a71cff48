"""Writes and reads `trace.json`: what every stage did when, for ui.perfetto.dev and chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.reports import Span
from decoupled_pp.run.checkpoints.files import write_atomically

_COLOURS = {
    "wait_in": "grey",
    "forward": "thread_state_iowait",
    "wait_out": "white",
    "critic": "yellow",
    "backward": "thread_state_running",
    "step": "rail_animation",
}
"""Phase -> one of the reserved colour names of chrome://tracing; Perfetto picks its own colour, by the name."""


def write_trace(path: Path, spans_by_stage: Mapping[int, Sequence[Span]]) -> None:
    """Write spans as Chrome Trace Event JSON: one process `decoupled_pp`, one row (thread) per stage.

    Times become relative to the earliest span. They come from the clocks of the ranks: across machines a row may be
    shifted by as much as the clocks differ.

    Source:
        "Trace Event Format" (Google, 2016), complete events ("X") and metadata events ("M").
    """
    origin = min((span.start for spans in spans_by_stage.values() for span in spans), default=0.0)
    events = [_metadata("process_name", 0, {"name": "decoupled_pp"})]
    for stage, spans in sorted(spans_by_stage.items()):
        events.append(_metadata("thread_name", stage, {"name": f"stage {stage}"}))
        events.append(_metadata("thread_sort_index", stage, {"sort_index": stage}))
        events.extend(_complete_events(stage, spans, origin))
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(event) for event in events)
    write_atomically(path, f'{{"displayTimeUnit": "ms", "traceEvents": [\n{lines}\n]}}\n')


def read_trace(path: Path) -> dict[int, list[Span]]:
    """Returns stage -> its spans by start, in seconds since the earliest span of all."""
    spans: dict[int, list[Span]] = {}
    try:
        for event in json.loads(path.read_bytes())["traceEvents"]:
            if event["ph"] == "X":
                span = Span(event["name"], event["ts"] / 1e6, event["dur"] / 1e6, event["args"]["packet"])
                spans.setdefault(event["tid"], []).append(span)
            elif event["name"] == "thread_name":
                spans.setdefault(event["tid"], [])  # a stage without spans has a row, too
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no trace of decoupled_pp; give the trace.json of a run", code="trace-damaged"
        ) from error
    return spans


def _metadata(name: str, stage: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "pid": 0, "tid": stage, "name": name, "args": arguments}


def _complete_events(stage: int, spans: Sequence[Span], origin: float) -> list[dict[str, Any]]:
    """Returns the "X" events of one row, by start, in microseconds with three decimals."""
    # Whole nanoseconds, so that touching slices touch exactly; floats of Unix time are coarser than that.
    times = sorted(
        (round((span.start - origin) * 1e9), round(span.seconds * 1e9), index) for index, span in enumerate(spans)
    )
    events = []
    for position, (start, duration, index) in enumerate(times):
        following = times[position + 1] if position + 1 < len(times) else None
        if following is not None and following[0] < start + duration < following[0] + following[1]:
            # Clock jitter: Perfetto drops a slice that overlaps its neighbour, so this one ends where the next begins.
            duration = following[0] - start  # noqa: PLW2901
        span = spans[index]
        event = {
            "ph": "X",
            "pid": 0,
            "tid": stage,
            "name": span.phase,
            "cat": "wait" if "wait" in span.phase else "work",
            "ts": start / 1e3,
            "dur": duration / 1e3,
            "args": {"packet": span.packet},
        }
        if span.phase in _COLOURS:
            event["cname"] = _COLOURS[span.phase]
        events.append(event)
    return events
