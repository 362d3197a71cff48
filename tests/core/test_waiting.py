"""Waits for calls that block: a bound, what the call raises, and signals that are heard meanwhile."""

import os
import signal
import threading
import time

import pytest

from decoupled_pp.core import waiting
from decoupled_pp.core.waiting import failing, told_to_end, wait_for


@pytest.fixture(autouse=True)
def _nothing_given_up(monkeypatch):
    monkeypatch.setattr(waiting, "_given_up", [])
    yield
    told_to_end(False)


@pytest.fixture
def stuck():
    """A call that goes on until the test is over."""
    over = threading.Event()
    yield over.wait
    over.set()


def test_results_and_errors_are_those_of_the_call():
    assert wait_for(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        wait_for(lambda: 1 / 0, 60.0)


def test_a_call_that_never_returns_is_given_up(stuck):
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.3 s"):
        wait_for(stuck, 0.3)
    assert 0.3 <= time.monotonic() - begun < 60.0


def test_a_signal_is_heard_while_a_call_goes_on(stuck):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    begun = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            wait_for(stuck)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun < 60.0


def test_who_was_told_to_end_waits_no_longer_than_for_last_words(stuck):
    threading.Timer(0.2, told_to_end, [True]).start()
    with pytest.raises(TimeoutError):
        wait_for(stuck, 3600.0)
    assert wait_for(lambda: "an answer") == "an answer"


def test_who_has_failed_waits_but_for_a_moment_more(stuck, monkeypatch):
    """Whatever the bound in good times: one that has passed already is not waited for a second time."""
    monkeypatch.setattr(waiting, "_FAILING_SECONDS", 0.2)
    for bound in (None, 3600.0):
        with failing(), pytest.raises(TimeoutError, match=r"no answer within 0\.2 s"):
            wait_for(stuck, bound)
    with failing(), pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        wait_for(stuck, 0.1)
    with pytest.raises(TimeoutError, match=r"no answer within 0\.3 s"):
        wait_for(stuck, 0.3)


def test_a_process_with_a_call_that_it_gave_up_ends_at_once(stuck, monkeypatch):
    """At its end the interpreter would wait for what the call holds."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    wait_for(lambda: None)
    waiting.end_at_once(1)
    assert ended == []
    with pytest.raises(TimeoutError):
        wait_for(stuck, 0.01)
    waiting.end_at_once(1)
    assert ended == [1]
