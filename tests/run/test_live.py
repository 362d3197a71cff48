"""The live view: a table on a terminal, readable lines in a log file."""

import io
import re
import sys
import threading

import pytest
from rich.console import Console

from decoupled_pp.core.reports import CheckpointRecord, SpansRecord
from decoupled_pp.run.live import LiveView
from recorded import train_record, validation_record


def train(stage, step, loss=3.25, seconds=None):
    return train_record(
        step, stage, loss=loss, samples_per_second=812.3, busy_fraction=0.934,
        seconds=0.1 * step if seconds is None else seconds,
    )  # fmt: skip


def validation(stage, step, loss=3.5, accuracy=None):
    return validation_record(step, stage, loss=loss, accuracy=accuracy, seconds=0.1 * step)


def plain():
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=110, height=30, _environ={"TERM": "xterm"})


def lines(console):
    return console.file.getvalue().splitlines()


def last_table(console):
    """What stands below the last header the terminal was sent, without escape sequences."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    return text[text.rindex("train loss") :]


def test_plain_lines_hold_every_stage_and_no_control_characters():
    console = plain()
    view = LiveView(3, 100, console, interval_seconds=0)
    view.update([train(stage, 10, 3 + stage / 4) for stage in range(3)])
    view.close()
    assert lines(console) == [
        "values are listed per stage, stage 0 first, stage 2 last",
        "[     1.0 s] step 10/100 | loss 3.0000 3.2500 3.5000 | samples/s 812 812 812 | busy % 93 93 93 | queue 2 2 2",
    ]
    assert all(letter.isprintable() and letter.isascii() for line in lines(console) for letter in line)


def test_the_order_of_values_is_said_before_a_validation_too():
    console = plain()
    view = LiveView(2, 100, console, interval_seconds=0)
    view.update([validation(0, 10), validation(1, 10)])
    view.update([train(0, 10), train(1, 10)])
    assert [line.startswith("values are listed") for line in lines(console)] == [True, False, False]


def test_plain_lines_of_a_pipeline_that_fills_and_of_missing_values():
    console = plain()
    view = LiveView(2, 100, console, interval_seconds=0)
    view.update([train(0, 4, loss=None)])
    view.close()
    assert lines(console)[-1] == "[     0.4 s] step 0-4/100 | loss - - | samples/s 812 - | busy % 93 - | queue 2 -"


def test_plain_lines_are_limited_and_the_last_state_is_shown():
    console = plain()
    view = LiveView(1, 100, console, interval_seconds=3600)
    for step in range(1, 51):
        view.update([train(0, step)])
    assert len(lines(console)) == 1
    view.close()
    view.close()
    assert len(lines(console)) == 2
    assert "step 50/100" in lines(console)[-1]


def test_time_left_follows_the_pace_of_this_run():
    console = plain()
    view = LiveView(1, 200, console, interval_seconds=0)
    view.update([train(0, 100, seconds=1.0)])  # resumed: steps before 100 took no time in this run
    view.update([train(0, 110, seconds=11.0)])
    view.close()
    assert "left" not in lines(console)[0]
    assert lines(console)[1].endswith("| about 1 min 30 s left")


def test_one_plain_line_per_validation_once_every_stage_has_it():
    console = plain()
    view = LiveView(2, 100, console, interval_seconds=3600)
    view.update([validation(0, 50, 3.5, 0.25), validation(0, 100, 3.0, 0.5)])
    assert lines(console) == []
    view.update([validation(1, 50, 3.25, 0.375)])
    assert lines(console)[1:] == [
        "[     5.0 s] validation at step 50 | held-out loss 3.5000 3.2500 | accuracy % 25.00 37.50"
    ]
    view.close()
    assert lines(console)[2:] == ["[    10.0 s] validation at step 100 | held-out loss 3.0000 - | accuracy % 50.00 -"]


def test_plain_notes_keep_brackets_and_lose_control_characters():
    console = plain()
    view = LiveView(1, 1, console)
    view.note("saved [bold]runs/x[/bold] \x1b[31mred\x07" + "y" * 100)
    view.close()
    assert lines(console) == ["saved [bold]runs/x[/bold]  [31mred " + "y" * 100]


@pytest.mark.parametrize("accuracy", [None, 0.875])
def test_terminal_table_has_a_row_for_every_stage(accuracy):
    console = terminal()
    view = LiveView(4, 100, console, interval_seconds=0)
    view.update([train(stage, 10 + stage, 3 + stage / 4) for stage in range(3)])
    view.update([validation(0, 10, 2.75, accuracy)])
    view.close()
    table = last_table(console)
    rows = [re.findall(r"[\w./%-]+", line) for line in table.splitlines() if "/100" in line]
    extra, none = ([], []) if accuracy is None else (["87.50"], ["-"])
    assert rows == [
        ["0", "10/100", "3.0000", "2.7500", *extra, "812", "93", "2"],
        ["1", "11/100", "3.2500", "-", *none, "812", "93", "2"],
        ["2", "12/100", "3.5000", "-", *none, "812", "93", "2"],
        ["3", "0/100", "-", "-", *none, "-", "-", "-"],
    ]
    assert ("accuracy" in table) == (accuracy is not None)
    assert "1 s elapsed" in table


def test_terminal_notes_stand_above_the_table():
    console = terminal()
    view = LiveView(1, 10, console, interval_seconds=0)
    view.update([train(0, 1)])
    view.note("half way [1/2]")
    view.close()
    text = console.file.getvalue()
    assert text.index("half way [1/2]") < text.rindex("train loss")


def test_terminal_is_given_back_and_no_thread_stays():
    before, stdout = threading.active_count(), sys.stdout
    console = terminal()
    view = LiveView(2, 10, console, interval_seconds=0)
    view.update([train(0, 1)])
    assert threading.active_count() == before
    view.close()
    view.close()
    assert sys.stdout is stdout
    text = console.file.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # cursor hidden, cursor shown


def test_spans_and_checkpoints_are_not_shown():
    console = plain()
    view = LiveView(1, 10, console, interval_seconds=0)
    view.update([SpansRecord(stage=0, spans=()), CheckpointRecord(stage=0, step=1)])
    view.close()
    assert lines(console) == []
