"""Who is to blame: what a rank raises when it is told to end, and who hears of Ctrl-C."""

import threading

import pytest

from decoupled_pp.core.errors import LinkError, PeerError, TrainingError, UsageError
from decoupled_pp.links import LocalControl
from decoupled_pp.training.watch import Terminated, Watcher, explain_failure, is_termination


def test_a_rank_that_is_told_to_end_waits_for_the_reason():
    control = LocalControl()  # speaks for rank 0
    late = threading.Timer(0.2, control.report_fault, ["stage 0: the loss is nan at packet 3"])
    late.start()
    cause = explain_failure(Terminated("rank 1 got SIGTERM"), control, 1)
    late.join()
    assert isinstance(cause, PeerError) and "packet 3" in str(cause)


def test_ranks_that_are_all_told_to_end_blame_no_rank():
    control, error = LocalControl(), Terminated("rank 1 got SIGTERM")
    late = threading.Timer(0.2, control.report_fault, ["rank 0 got SIGTERM"])
    late.start()
    assert explain_failure(error, control, 1) is error
    late.join()


def test_a_rank_that_is_told_to_end_because_another_was_blames_that_one():
    control = LocalControl()
    control.report_fault("rank 0 got SIGTERM")
    cause = explain_failure(Terminated("rank 1 got SIGTERM"), control, 1)
    assert isinstance(cause, PeerError) and is_termination(cause.fault)


def test_what_is_not_finite_behind_a_stage_that_failed_is_its_echo():
    control, error = LocalControl(), TrainingError("stage 1: the loss is nan at packet 3")
    late = threading.Timer(0.1, control.report_fault, ["stage 0: the loss is nan at packet 3"])
    late.start()
    cause = explain_failure(error, control, 1)
    late.join()
    assert isinstance(cause, PeerError) and "stage 0" in str(cause)


def test_a_rank_whose_link_broke_says_so_though_it_was_told_to_end():
    control = LocalControl()
    control.report_fault("stage 1 (rank 1) is gone")  # by a thread of the link
    cause = explain_failure(Terminated("rank 0 got SIGTERM"), control, 0)
    assert type(cause) is LinkError and str(cause) == "stage 1 (rank 1) is gone"


def test_a_rank_that_knows_nothing_better_says_that_it_was_told_to_end():
    control, error = LocalControl(), Terminated("rank 0 got SIGTERM")
    assert explain_failure(error, control, 0) is error
    assert control.fault().text == "rank 0 got SIGTERM"


def test_bad_input_is_of_the_rank_that_reported_it_first():
    control, first = LocalControl(), UsageError("critic: does not fit")
    assert explain_failure(first, control, 0) is first
    cause = explain_failure(UsageError("critic: does not fit"), control, 1)
    assert isinstance(cause, PeerError) and cause.fault.usage


def test_who_asks_about_ctrl_c_finds_it_in_the_control_plane_at_once():
    control, interrupted = LocalControl(), threading.Event()
    watcher = Watcher(control, None, interrupted, period_seconds=3600.0)
    assert watcher.stop_requested() is None
    interrupted.set()
    assert watcher.stop_requested() == control.stop_requested() == "interrupted"
    watcher.close()


@pytest.mark.parametrize("error", [ZeroDivisionError("in a layer"), LinkError("no room")])
def test_an_error_of_its_own_stays(error):
    assert explain_failure(error, LocalControl(), 0) is error
