"""Watches a run: a side thread for records and stop requests, signals, and what a failure on one rank means for all."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from decoupled_pp.core.errors import Fault, LinkError, PeerError, TrainingError, UsageError, text_of
from decoupled_pp.core.reports import Record
from decoupled_pp.core.topology import Topology
from decoupled_pp.core.waiting import failing, told_to_end

if TYPE_CHECKING:
    from decoupled_pp.core.channels import Control  # imports torch, which the front end does without

_GRACE_SECONDS = 1.0
_GRACE_PER_STAGE_SECONDS = 0.25
"""Waits for a rank that may know more about a failure than this one."""

_LAST_RECORDS_SECONDS = 3.0
"""Time of a run that has failed for handing out what was measured before."""

INTERRUPTED = "interrupted"
"""Why a run ends early if a user, or a cluster, has asked one of its ranks to (`Report.stopped`)."""

_failing = threading.Event()
"""Set once this process ends because of a failure: the launcher's SIGTERM must not cut its last words short."""


class Terminated(TrainingError):
    """Raised when this process got SIGTERM."""


def is_termination(fault: Fault) -> bool:
    """Return whether a run ends because a rank got SIGTERM."""
    return fault.code == "terminated"


class Watcher:
    """Forwards an interrupt of this process to the run, and on rank 0 hands out records and notices stop requests."""

    def __init__(
        self,
        control: Control,
        observer: Callable[[list[Record]], None] | None,
        interrupted: threading.Event,
        *,
        period_seconds: float = 0.2,
    ) -> None:
        """Start watching."""
        self._control = control
        self._observer = observer
        self._interrupted = interrupted
        self._stop_reason: str | None = None
        self._period_seconds = period_seconds
        self._ending = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="dpp-watch", daemon=True)
        self._thread.start()

    def stop_requested(self) -> str | None:
        """Return why the run is to end early, or None; the control plane is told as well."""
        self._pass_on_interrupt()
        return self._stop_reason

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close(_LAST_RECORDS_SECONDS if kind is not None else None)
        except Exception:
            if kind is None:  # else the error that the run ends with has come first: a full disk spares no log
                raise

    def close(self, seconds: float | None = None) -> None:
        """Stop watching, and hand out the last records: all, or as many as can be taken in these seconds."""
        if not self._ending.is_set():
            self._ending.set()
            self._thread.join()
            deadline = time.monotonic() + seconds if seconds is not None else None
            while self._look() and (deadline is None or time.monotonic() < deadline):
                pass
            if self._error is not None:
                raise self._error

    def _loop(self) -> None:
        while not self._ending.wait(self._period_seconds):
            self._look()

    def _pass_on_interrupt(self) -> None:
        # The signal handler only sets an event: it may run in the middle of any call of the store.
        if self._interrupted.is_set() and self._stop_reason is None:
            self._control.request_stop(INTERRUPTED)
            self._stop_reason = INTERRUPTED

    def _look(self) -> bool:
        """Hand out new records; return whether there were any."""
        self._pass_on_interrupt()
        if self._observer is None or self._error is not None:
            return False
        self._stop_reason = self._stop_reason or self._control.stop_requested()
        try:
            records = self._control.collect()
            if records:
                self._observer(records)
            return bool(records)
        except BaseException as error:  # a full disk under the log must end the run, not this thread alone
            self._error = error
            self._stop_reason = f"the run log failed: {text_of(error)}"
            self._control.request_stop(self._stop_reason)
            return False


def explain_failure(error: Exception, control: Control, rank: int, topology: Topology | None = None) -> Exception:
    """Tell the other ranks, and return what this rank should raise: its own error, or the fault behind it.

    A broken link, a SIGTERM from the launcher, or a loss that is not finite behind another stage is usually the echo of
    a fault elsewhere, so those wait a moment for a rank that knows more. Behind a cut cable nobody answers: this rank
    has waited for as long as it may, and does not do so again.
    """
    _failing.set()
    with failing():
        return _explained(error, control, rank, topology)


def _explained(error: Exception, control: Control, rank: int, topology: Topology | None) -> Exception:
    if isinstance(error, PeerError):
        return error
    told_by_itself = isinstance(error, Terminated) and control.fault() is None
    deadline = time.monotonic() + _grace(error, rank, topology)
    while control.fault() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if control.report_fault(Fault.of(error, rank)):
        return error
    fault = control.fault()
    if fault is None or (told_by_itself and is_termination(fault)):  # all ranks were told to end; none is at fault
        return error
    return _behind(error, fault, rank, topology)


def _grace(error: Exception, rank: int, topology: Topology | None) -> float:
    """Return the seconds to wait for the reason behind an error; a later stage lets an earlier one speak first."""
    if isinstance(error, LinkError | Terminated):
        return _GRACE_SECONDS
    if topology is None or not isinstance(error, TrainingError):
        return 0.0
    return topology.places_of(rank)[0].stage * _GRACE_PER_STAGE_SECONDS


def _behind(error: Exception, fault: Fault, rank: int, topology: Topology | None) -> Exception:
    """Return what this rank should raise for `error`, given the fault that the run ends for."""
    if fault.rank == rank:  # a thread of this rank saw its link break before the launcher's SIGTERM came
        return LinkError(fault.text, code=fault.code) if isinstance(error, Terminated) else error
    found_by_all = isinstance(error, UsageError)
    # A value that is not finite travels forward: the earliest stage that found one is at fault.
    is_upstream = topology is not None and topology.is_upstream(fault.rank, rank)
    came_from_before = isinstance(error, TrainingError) and is_upstream
    echo = isinstance(error, LinkError | Terminated)
    return PeerError(fault) if found_by_all or came_from_before or echo else error


@contextmanager
def told_to_all(control: Control, rank: int, topology: Topology | None = None) -> Iterator[None]:
    """Tell the other ranks what fails in here, as `explain_failure` does."""
    try:
        yield
    except SystemExit as error:  # nothing of this package raises it in here
        failure = _exit_of_user_code(error)
        raise explain_failure(failure, control, rank, topology) from error
    except Exception as error:
        cause = explain_failure(error, control, rank, topology)
        if cause is error:
            raise
        raise cause from error
    except BaseException as error:  # such as a second Ctrl-C: to the others this rank would only be gone
        control.report_fault(Fault.of(error, rank))
        raise


def _exit_of_user_code(error: SystemExit) -> TrainingError:
    """Return the error of user code that called `sys.exit`: the process would end as if all had gone well."""
    where = "; ".join(getattr(error, "__notes__", [])) or "while the run was prepared"
    return TrainingError(
        f"{where}: the code of a layer, a loss or the data called sys.exit({text_of(error)}); let it raise an error",
        code="user-code-exited",
    )


@contextmanager
def sigterm_ends(rank: int) -> Iterator[None]:
    """Make SIGTERM raise `Terminated` in the main thread, unless this process already ends because of a failure.

    Either way nothing is waited for any longer than last words take: behind a cut cable no other rank answers.
    """

    def terminate(_number: int, _frame: FrameType | None) -> None:
        told_to_end(True)
        if not _failing.is_set():
            raise Terminated(f"rank {rank} got SIGTERM", code="terminated")

    _failing.clear()
    told_to_end(False)
    with _handler(signal.SIGTERM, terminate):
        yield


@contextmanager
def sigint_stops(interrupted: threading.Event) -> Iterator[None]:
    """Make Ctrl-C ask for an orderly end, and a second one end at once."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    with _handler(signal.SIGINT, interrupt):
        yield


@contextmanager
def _handler(
    number: signal.Signals, handle: Callable[[int, FrameType | None], None] | signal.Handlers
) -> Iterator[None]:
    before = signal.signal(number, handle)
    try:
        yield
    finally:
        signal.signal(number, before)
