"""Who is to blame: what a rank raises when it is told to end, and who hears of Ctrl-C."""

import threading

import pytest

from decoupled_pp.core.errors import Fault, LinkError, PeerError, TrainingError, UsageError
from decoupled_pp.core.reports import NoteRecord
from decoupled_pp.core.topology import Topology
from decoupled_pp.links import LocalControl
from decoupled_pp.training.watch import Terminated, Watcher, explain_failure, is_termination

LOSS_OF_STAGE_0 = Fault("stage 0: the loss is nan at packet 3", 0, usage=False, code="loss-not-finite")
RANK_0_TERMINATED = Fault("rank 0 got SIGTERM", 0, usage=False, code="terminated")


def terminated(rank):
    return Terminated(f"rank {rank} got SIGTERM", code="terminated")


def reported(control, fault, seconds):
    """Start a timer that reports a fault a little later."""
    late = threading.Timer(seconds, control.report_fault, [fault])
    late.start()
    return late


def test_a_rank_that_is_told_to_end_waits_for_the_reason():
    control = LocalControl()  # speaks for rank 0
    late = reported(control, LOSS_OF_STAGE_0, 0.2)
    cause = explain_failure(terminated(1), control, 1)
    late.join()
    assert isinstance(cause, PeerError) and "packet 3" in str(cause)


def test_ranks_that_are_all_told_to_end_blame_no_rank():
    control, error = LocalControl(), terminated(1)
    late = reported(control, RANK_0_TERMINATED, 0.2)
    assert explain_failure(error, control, 1) is error
    late.join()


def test_a_rank_that_is_told_to_end_because_another_was_blames_that_one():
    control = LocalControl()
    control.report_fault(RANK_0_TERMINATED)
    cause = explain_failure(terminated(1), control, 1)
    assert isinstance(cause, PeerError) and is_termination(cause.fault)


def test_what_is_not_finite_behind_a_stage_that_failed_is_its_echo():
    control = LocalControl()
    error = TrainingError("stage 1: the loss is nan at packet 3", code="loss-not-finite")
    late = reported(control, LOSS_OF_STAGE_0, 0.1)
    cause = explain_failure(error, control, 1, Topology(stages=2, ranks=2))
    late.join()
    assert isinstance(cause, PeerError) and "stage 0" in str(cause)


def test_a_rank_whose_link_broke_says_so_though_it_was_told_to_end():
    control = LocalControl()
    fault = Fault("stage 1 (rank 1) is gone", 0, usage=False, code="peer-gone")
    control.report_fault(fault)  # by a thread of the link
    cause = explain_failure(terminated(0), control, 0)
    assert type(cause) is LinkError
    assert (str(cause), cause.code) == (fault.text, fault.code)


def test_a_rank_that_knows_nothing_better_says_that_it_was_told_to_end():
    control, error = LocalControl(), terminated(0)
    assert explain_failure(error, control, 0) is error
    assert control.fault().text == "rank 0 got SIGTERM"


def test_bad_input_is_of_the_rank_that_reported_it_first():
    control, first = LocalControl(), UsageError("`critic`: does not fit", code="critic-shape-mismatch")
    assert explain_failure(first, control, 0) is first
    cause = explain_failure(UsageError("`critic`: does not fit", code="critic-shape-mismatch"), control, 1)
    assert isinstance(cause, PeerError) and cause.fault.usage


def test_who_asks_about_ctrl_c_finds_it_in_the_control_plane_at_once():
    control, interrupted = LocalControl(), threading.Event()
    watcher = Watcher(control, None, interrupted, period_seconds=3600.0)
    assert watcher.stop_requested() is None
    interrupted.set()
    assert watcher.stop_requested() == control.stop_requested() == "interrupted"
    watcher.close()


@pytest.mark.parametrize("error", [ZeroDivisionError("in a layer"), LinkError("no room", code="wait-too-long")])
def test_an_error_of_its_own_stays(error):
    assert explain_failure(error, LocalControl(), 0) is error


class FlowingControl(LocalControl):
    def collect(self):
        return [NoteRecord(stage=0, text="one more")]


def test_a_failing_run_does_not_wait_for_the_last_of_records_that_never_end(monkeypatch):
    monkeypatch.setattr("decoupled_pp.training.watch._LAST_RECORDS_SECONDS", 0.2)
    seen = []
    with pytest.raises(ZeroDivisionError), Watcher(FlowingControl(), seen.extend, threading.Event()):
        raise ZeroDivisionError
    assert seen
