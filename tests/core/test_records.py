"""Records come back from JSON as they were, can be read by the keys of JSON, and are written as they always were."""

import json
import math

import pytest

from decoupled_pp.core.records import write_json, write_message
from decoupled_pp.core.reports import (
    RECORDS,
    CheckpointRecord,
    Exit,
    FinalScores,
    LinkSummary,
    NoteRecord,
    Report,
    Span,
    SpansRecord,
    StepSeconds,
    TrainRecord,
    ValidationRecord,
    read_record,
)

TIMES = {"seconds": 1.5, "training_seconds": 1.25}
LINK = LinkSummary(
    sender=0, receiver=1, packets=3, payload_bytes_forward=96, payload_bytes_backward=0,
    control_bytes_forward=12, control_bytes_backward=4, training_bytes_forward=64,
)  # fmt: skip
POSTED = [
    TrainRecord(
        stage=1, packet=9, step=5, samples=320, loss=2.25, samples_per_second=100.0, busy_fraction=0.5, queue=0,
        lr=0.01, **TIMES,
    ),
    ValidationRecord(stage=1, step=5, samples=320, loss=2.5, accuracy=None, **TIMES),
    ValidationRecord(stage=1, step=5, samples=320, loss=2.5, accuracy=0.5, knn_accuracy=0.75, **TIMES),
    SpansRecord(stage=0, spans=(Span("forward", 1.0, 0.5, 7),)),
    CheckpointRecord(stage=0, step=5),
    NoteRecord(stage=0, text="half way"),
]  # fmt: skip


@pytest.mark.parametrize("record", POSTED, ids=lambda record: record.kind)
def test_a_posted_record_comes_back(record):
    assert read_record(json.loads(write_json(record))) == record
    assert read_record(json.loads(write_message(record))) == record


def test_every_kind_is_known():
    assert {record.kind for record in POSTED} == set(RECORDS)


def test_keys_and_their_order_are_those_of_the_files():
    train, plain, probed, spans, checkpoint, note = (list(record) for record in POSTED)
    assert train == [
        "kind", "stage", "packet", "step", "samples", "loss", "samples_per_second", "busy_fraction", "queue", "lr",
        "seconds", "training_seconds",
    ]  # fmt: skip
    assert plain == ["kind", "stage", "step", "samples", "loss", "accuracy", "seconds", "training_seconds"]
    assert probed == [*plain[:6], "knn_accuracy", *plain[6:]]
    assert (spans, checkpoint, note) == (
        ["kind", "stage", "spans"],
        ["kind", "stage", "step"],
        ["kind", "stage", "text"],
    )


def test_a_record_is_a_mapping_too():
    record = POSTED[0]
    assert record["kind"] == "train" and record["loss"] == record.loss and record.get("accuracy") is None
    assert "knn_accuracy" not in POSTED[1] and POSTED[2]["knn_accuracy"] == 0.75
    assert json.loads(json.dumps(dict(record))) == json.loads(write_json(record))
    with pytest.raises(KeyError):
        record["packets"]


def test_the_ends_of_a_link_are_called_from_and_to():
    assert list(LINK)[:2] == ["from", "to"]
    assert (LINK["from"], LINK["to"], LINK["payload_bytes_backward"]) == (LINK.sender, LINK.receiver, 0)
    assert LinkSummary.from_json(json.loads(write_json(LINK))) == LINK


def test_a_report_comes_back():
    report = Report(
        steps=5, seconds=2.0, training_seconds=1.0, step_seconds=StepSeconds(0.2, 0.2, 0.3), samples_per_second=9.0,
        final=FinalScores(1.0, 2.0, None), exits=(Exit(0, 3.0, None), Exit(1, 2.0, None)), per_stage=(), links=(LINK,),
    )  # fmt: skip
    assert Report.from_json(json.loads(write_json(report))) == report
    assert report.train_loss == report.final["train_loss"] == 1.0


def test_numbers_that_are_not_finite_are_null_in_files_only():
    record = ValidationRecord(stage=0, step=1, samples=8, loss=math.inf, accuracy=None, **TIMES)
    assert json.loads(write_json({"found": [record, (math.nan,)]}))["found"][1] == [None]
    assert read_record(json.loads(write_json(record))).loss is None
    assert read_record(json.loads(write_message(record))).loss == math.inf


def test_a_missing_key_is_no_record():
    with pytest.raises(KeyError, match="step"):
        CheckpointRecord.from_json({"stage": 0})
