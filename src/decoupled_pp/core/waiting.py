"""Waits for calls that block in C++ (the store, the meeting of ranks), so that signals are heard and a bound holds."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_SLICE_SECONDS = 0.1
_LAST_WORDS_SECONDS = 1.0
"""Bound of every wait of a process that was told to end."""

_FAILING_SECONDS = 5.0
"""Bound of every wait of a process that has waited too long already: a store that is there answers by then."""

_told_to_end = False
_failing = False
_given_up: list[threading.Event] = []  # of calls that nobody waits for any more; set once one returns after all


def told_to_end(value: bool) -> None:
    """Cut all waits short from now on, those that go on included (True); or no longer (False)."""
    # A plain flag, because a signal handler sets it: a lock could be held by the very code that it interrupts.
    global _told_to_end  # noqa: PLW0603
    _told_to_end = value


@contextmanager
def failing() -> Iterator[None]:
    """Cut all waits inside the block short: its process has failed, and only looks for who knows more."""
    global _failing  # noqa: PLW0603
    before = _failing
    _failing = True
    try:
        yield
    finally:
        _failing = before


def end_at_once(code: int) -> None:
    """End the process now if a call that was given up still goes on; else return.

    At its end the interpreter would wait for what that call holds (the store's connection, the process group).
    """
    if any(not done.is_set() for done in _given_up):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(call: Callable[[], T], seconds: float | None = None) -> T:
    """Return what the call returns, or raise what it raises; TimeoutError if it takes longer than the bound.

    Python runs signal handlers in the main thread, between two of its own instructions: a call that blocks in C++ would
    let none of them through. So a thread makes the call, and the waiting is done in Python. A call that never returns
    keeps its thread, a daemon, which does not keep the process from ending.
    """
    done = threading.Event()
    outcome: list[Any] = [None, None]

    def make() -> None:
        try:
            outcome[0] = call()
        except BaseException as error:
            outcome[1] = error
        finally:
            done.set()

    start = time.monotonic()
    threading.Thread(target=make, name="wait_for", daemon=True).start()
    try:
        while not done.wait(_SLICE_SECONDS):
            bound = _bound(seconds)
            if bound is not None and time.monotonic() - start > bound:
                raise TimeoutError(f"no answer within {bound:g} s")
    finally:
        if not done.is_set():
            _given_up.append(done)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def _bound(seconds: float | None) -> float | None:
    """Return how long a wait may take now that may take so long in good times."""
    if _told_to_end:
        return _LAST_WORDS_SECONDS
    if _failing:
        return _FAILING_SECONDS if seconds is None else min(seconds, _FAILING_SECONDS)
    return seconds
