"""The run log: what is written comes back, and a resumed run replaces what it does again."""

import json
import math
import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.records import write_json
from decoupled_pp.core.reports import NoteRecord, Span, SpansRecord
from decoupled_pp.run.log import METRICS_FILE, TENSORBOARD_FOLDER, RunLog, read_records
from kit import refused
from recorded import train_record as train
from recorded import validation_record as validation


def write(folder, *records, tensorboard=False, resume_step=None):
    log = RunLog(folder, tensorboard, resume_step)
    try:
        log.write(records)
    finally:
        log.close()


def scalars(folder):
    events = EventAccumulator(str(folder / TENSORBOARD_FOLDER))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_records_come_back_without_spans(tmp_path):
    spans = SpansRecord(stage=0, spans=(Span("forward", 1.0, 0.1, 0),))
    other = NoteRecord(stage=1, text="zwölf")
    write(tmp_path / "new" / "run", train(1), spans, validation(1), other)
    assert read_records(tmp_path / "new" / "run" / METRICS_FILE) == [train(1), validation(1), other]


def test_every_write_call_is_on_disk_at_once(tmp_path):
    log = RunLog(tmp_path, False, None)
    log.write([train(1)])
    assert read_records(tmp_path / METRICS_FILE) == [train(1)]
    log.write([train(2)])
    assert read_records(tmp_path / METRICS_FILE) == [train(1), train(2)]
    log.close()
    log.close()


def test_without_resume_step_lines_are_appended(tmp_path):
    write(tmp_path, train(1))
    write(tmp_path, train(2))
    assert [record.step for record in read_records(tmp_path / METRICS_FILE)] == [1, 2]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_become_null(tmp_path, number):
    write(tmp_path, train(1, loss=number))
    text = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None
    assert read_records(tmp_path / METRICS_FILE) == [train(1, loss=None)]


def test_resume_truncates_and_drops_a_half_written_last_line(tmp_path):
    started = NoteRecord(stage=0, text="of no step")
    write(tmp_path, started, train(10), train(20), validation(20), train(30), train(25, stage=1))
    path = tmp_path / METRICS_FILE
    with path.open("ab") as file:
        file.write('{"kind": "train", "note": "zwö'.encode()[:-1])  # cut inside a character
    write(tmp_path, train(21), resume_step=20)
    assert read_records(path) == [started, train(10), train(20), validation(20), train(21)]
    assert [entry.name for entry in tmp_path.iterdir()] == [METRICS_FILE]


def test_a_half_written_last_line_does_not_spoil_what_is_appended(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text(write_json(train(1)) + '\n{"kind": "tr')
    assert read_records(path) == [train(1)]
    write(tmp_path, train(2))
    assert read_records(path) == [train(1), train(2)]


def test_a_whole_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text(write_json(train(1)))
    write(tmp_path, train(2), resume_step=1)
    assert read_records(path) == [train(1), train(2)]


@pytest.mark.parametrize("line", ["rubbish", '{"kind": "train", "step": "abc"}', '{"step": 1.5}'])
@pytest.mark.parametrize("behind", [f"{write_json(train(2))}\n", ""])
def test_a_damaged_whole_line_is_named(line, behind, tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text(f"{write_json(train(1))}\n{line}\n{behind}")
    before = path.read_bytes()
    with refused("metrics-damaged", UsageError, "line 2", line[:9]):
        RunLog(tmp_path, False, 1)
    assert path.read_bytes() == before


def test_tensorboard_events_come_back(tmp_path):
    write(tmp_path, train(10), train(20, stage=1), validation(20), validation(20, 1, accuracy=None), tensorboard=True)
    assert scalars(tmp_path) == {
        "loss/train/stage0": [(10, 1.5)],
        "throughput/samples_per_second/stage0": [(10, 100.0)],
        "busy_fraction/stage0": [(10, 0.75)],
        "queue/stage0": [(10, 2.0)],
        "lr/stage0": [(10, pytest.approx(0.001))],
        "loss/train/stage1": [(20, 1.5)],
        "throughput/samples_per_second/stage1": [(20, 100.0)],
        "busy_fraction/stage1": [(20, 0.75)],
        "queue/stage1": [(20, 2.0)],
        "lr/stage1": [(20, pytest.approx(0.001))],
        "loss/validation/stage0": [(20, 2.5)],
        "accuracy/validation/stage0": [(20, 0.5)],
        "loss/validation/stage1": [(20, 2.5)],
    }


def test_resume_hides_later_tensorboard_events(tmp_path):
    write(tmp_path, train(10), train(20), train(30), tensorboard=True)
    # Event files are read in the order of their names, which begin with the second: make the first one older.
    (first,) = (tmp_path / TENSORBOARD_FOLDER).iterdir()
    first.rename(first.with_name("events.out.tfevents.0000000001.host.1.0"))
    write(tmp_path, train(25, loss=9.0), tensorboard=True, resume_step=20)
    assert scalars(tmp_path)["loss/train/stage0"] == [(10, 1.5), (20, 1.5), (25, 9.0)]


def test_without_tensorboard_nothing_but_the_metrics_file(tmp_path):
    write(tmp_path, train(1))
    assert [entry.name for entry in tmp_path.iterdir()] == [METRICS_FILE]


def test_no_thread_outlives_the_log(tmp_path):
    before = threading.active_count()
    write(tmp_path, train(1), tensorboard=True)
    assert threading.active_count() == before


def test_a_line_of_a_later_version_outlives_a_resume_and_is_not_read(tmp_path):
    path = tmp_path / METRICS_FILE
    later = {"kind": "power", "stage": 0, "step": 1, "watts": 250.0}
    path.write_text(json.dumps(later) + "\n")
    write(tmp_path, train(1), resume_step=1)
    assert json.loads(path.read_text().splitlines()[0]) == later
    assert read_records(path) == [train(1)]


def test_a_record_that_lacks_a_key_is_damaged(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text('{"kind": "checkpoint", "stage": 0}\n')
    with refused("metrics-damaged", UsageError, "step"):
        read_records(path)
