"""The trace: Chrome's format, relative times, and back again."""

import json

import pytest

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.reports import PHASES, Span
from decoupled_pp.run.trace import read_trace, write_trace
from kit import refused

START = 1_790_000_000.25


def spans_of(stage):
    """Two packets, phases of 1 ms each, every stage 0.5 ms after the one before; not in order."""
    spans = [
        Span(phase, START + 0.0005 * stage + 0.001 * (6 * packet + index), 0.001, packet)
        for packet in range(2)
        for index, phase in enumerate(PHASES)
    ]
    return spans[::-1]


def test_trace_is_chrome_trace_event_json(tmp_path):
    path = tmp_path / "new" / "trace.json"
    write_trace(path, {1: spans_of(1), 0: spans_of(0)})
    events = json.loads(path.read_text())["traceEvents"]
    metadata = [(event["name"], event["tid"], event["args"]) for event in events if event["ph"] == "M"]
    assert metadata == [
        ("process_name", 0, {"name": "decoupled_pp"}),
        ("thread_name", 0, {"name": "stage 0"}),
        ("thread_sort_index", 0, {"sort_index": 0}),
        ("thread_name", 1, {"name": "stage 1"}),
        ("thread_sort_index", 1, {"sort_index": 1}),
    ]
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == 24
    assert {event["ph"] for event in events} == {"M", "X"}
    assert all(event["pid"] == 0 for event in events)
    assert len({event["cname"] for event in complete}) == len(PHASES)
    for stage in range(2):
        row = [event for event in complete if event["tid"] == stage]
        assert [event["name"] for event in row] == list(PHASES) * 2
        assert [event["args"]["packet"] for event in row] == [0] * 6 + [1] * 6
        assert [event["ts"] for event in row] == pytest.approx([500 * stage + 1000 * i for i in range(12)], abs=1)
        assert [event["dur"] for event in row] == pytest.approx([1000] * 12, abs=1)


def test_slices_of_a_row_never_overlap(tmp_path):
    path = tmp_path / "trace.json"
    jitter = [
        Span("forward", START, 0.0010004, 0),
        Span("critic", START + 0.001, 0.002, 0),
        Span("step", START + 0.0029, 0.001, 0),
    ]
    write_trace(path, {0: jitter})
    row = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    ends = [event["ts"] + event["dur"] for event in row]
    assert all(end <= following["ts"] + 1e-9 for end, following in zip(ends, row[1:], strict=False))


def test_reading_returns_what_was_written_from_time_0(tmp_path):
    path = tmp_path / "trace.json"
    write_trace(path, {0: spans_of(0), 1: spans_of(1), 2: []})
    spans = read_trace(path)
    assert list(spans) == [0, 1, 2]
    assert spans[2] == []
    for stage in range(2):
        for span, expected in zip(spans[stage], spans_of(stage)[::-1], strict=True):
            assert (span.phase, span.packet) == (expected.phase, expected.packet)
            assert span.start == pytest.approx(expected.start - START, abs=1e-6)
            assert span.seconds == pytest.approx(0.001, abs=1e-6)


def test_no_spans_make_a_valid_empty_trace(tmp_path):
    path = tmp_path / "trace.json"
    write_trace(path, {})
    assert read_trace(path) == {}


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"events": []}', '{"traceEvents": [{"ph": "X"}]}'])
def test_other_files_are_refused_by_name(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with refused("trace-damaged", UsageError, "other.json"):
        read_trace(path)
