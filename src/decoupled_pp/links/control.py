"""The control plane: JSON records, the first fault and a stop request, in one process or over the launcher's store."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.distributed as dist

from decoupled_pp.core.channels import Control
from decoupled_pp.core.errors import (
    LAUNCHER_GONE,
    STORE_SILENT,
    Fault,
    LinkError,
    PeerError,
    ReportedError,
    waited_too_long,
)
from decoupled_pp.core.records import write_message
from decoupled_pp.core.reports import Record, read_record
from decoupled_pp.core.waiting import wait_for

_COLLECT_SECONDS = 1.0
"""Longest time for taking records: they are shown from time to time, however many there are."""

_LEAST_BOUND_SECONDS = 5.0
"""Shorter bounds of links do not hold for the store: on a busy machine a good one may take seconds to answer."""


class LocalControl(Control):
    """The control plane of a run in one process."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._fault: Fault | None = None
        self._stop: str | None = None
        self._lock = threading.Lock()  # a stage posts while the watching thread collects

    def post(self, record: Record) -> None:
        """Keep the record for the next `collect`."""
        with self._lock:
            self._records.append(record)

    def collect(self) -> list[Record]:
        """Hand over the records."""
        with self._lock:
            records = self._records
            self._records = []
        return records

    def report_fault(self, fault: Fault) -> bool:
        """Keep the first fault."""
        is_first = self._fault is None
        if is_first:
            self._fault = fault
        return is_first

    def fault(self) -> Fault | None:
        """Return the first fault."""
        return self._fault

    def request_stop(self, reason: str) -> None:
        """Keep the first reason."""
        self._stop = self._stop or reason

    def stop_requested(self) -> str | None:
        """Return the reason, if any."""
        return self._stop

    def gather(self, name: str, value: Any, timeout_seconds: float) -> list[Any]:
        """Return the one value, as it would arrive from another process: parsed JSON."""
        return [json.loads(write_message(value))]

    def from_rank_0(self, name: str, make: Callable[[], Any], timeout_seconds: float) -> Any:
        """Make the value: this process is rank 0."""
        return make()


class StoreControl(Control):
    """One rank's access to the store that torchrun (or any launcher) gave the process group.

    If the store is gone (its host, the launcher, died, or the cable to it is cut), records vanish and faults
    stay unknown, and the run is to stop. Packets need no store, so the run can still save and end in order. Only
    `gather` and `from_rank_0` raise.
    """

    # Only calls that the store answers at once are used: `wait` would hold the store's one connection, and all other
    # threads of this process would wait with it. Each has a bound all the same: behind a cut cable none is answered.

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_seconds: float) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._bound = max(timeout_seconds, _LEAST_BOUND_SECONDS)
        self._posted = 0
        self._collected = [0] * size
        self._lock = threading.Lock()
        self._lost: str | None = None

    def post(self, record: Record) -> None:
        """Put the record into the store under the next number of this rank."""
        # Locked, because two threads with one number would overwrite each other's record.
        with self._lock:
            self._set(f"record/{self._rank}/{self._posted}", write_message(record))
            self._posted += 1

    def collect(self) -> list[Record]:
        """Take every rank's new records out of the store, in turn, as many as a moment allows."""
        records: list[list[Record]] = [[] for _ in range(self._size)]
        deadline = time.monotonic() + _COLLECT_SECONDS  # ranks may post faster than this, and for days
        waiting = list(range(self._size))
        while waiting and time.monotonic() < deadline:
            waiting = [rank for rank in waiting if self._take_record(rank, records[rank])]
        return [record for of_rank in records for record in of_rank]

    def _take_record(self, rank: int, records: list[Record]) -> bool:
        """Move the next record of a rank from the store into the list; return whether there was one."""
        text = self._get(key := f"record/{rank}/{self._collected[rank]}")
        if text is None:
            return False
        records.append(read_record(json.loads(text)))
        # Deleted, because the store's host keeps all keys in memory for as long as the run lasts.
        self._try(partial(self._store.delete_key, key))
        self._collected[rank] += 1
        return True

    def report_fault(self, fault: Fault) -> bool:
        """Set the fault if there is none yet."""
        mine = json.dumps([fault.text, fault.rank, fault.usage, fault.code])
        # With "" as the expected value, `compare_set` sets only a key that is absent, and returns what is there then:
        # the store decides which of two ranks was first.
        kept = self._try(lambda: self._store.compare_set("fault", "", mine))
        return kept is None or _text(kept) == mine

    def fault(self) -> Fault | None:
        """Return the first fault of any rank."""
        kept = self._get("fault")
        return None if kept is None else Fault(*json.loads(kept))

    def request_stop(self, reason: str) -> None:
        """Ask rank 0, which looks at this from time to time."""
        self._try(lambda: self._store.compare_set("stop", "", reason))

    def stop_requested(self) -> str | None:
        """Return the reason if any rank asked, or that the store is gone."""
        return self._get("stop") or self._lost

    def lost(self) -> str | None:
        """Return in words that the store is gone; None while it answers."""
        self._get("fault")  # any call finds out
        return self._lost

    def from_rank_0(self, name: str, make: Callable[[], Any], timeout_seconds: float) -> Any:
        """Let rank 0 make a value for all; it may take as long as it needs (to tokenise) while it shows life."""
        if self._rank != 0:
            return json.loads(self._await(f"share/{name}", timeout_seconds, f"{name} from rank 0", f"alive/{name}"))
        try:
            with self._showing_life(f"alive/{name}", timeout_seconds / 10):
                value = make()
        except Exception as error:
            self.report_fault(Fault.of(error, self._rank))
            raise
        self._set(f"share/{name}", json.dumps(value))
        return value

    def gather(self, name: str, value: Any, timeout_seconds: float) -> list[Any]:
        """Exchange the values through the store, one key per rank."""
        self._set(f"gather/{name}/{self._rank}", write_message(value))
        return [
            json.loads(self._await(f"gather/{name}/{rank}", timeout_seconds, f"{name} from rank {rank}"))
            for rank in range(self._size)
        ]

    @contextmanager
    def _showing_life(self, key: str, period_seconds: float) -> Iterator[None]:
        """Change the key from time to time, from a thread, while something else goes on."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(period_seconds):
                self._set(key, str(time.monotonic()))

        thread = threading.Thread(target=beat, name="dpp-life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _await(self, key: str, timeout_seconds: float, what: str, life: str | None = None) -> str:
        """Wait for a key, no longer than the bound after the last change of the key `life`."""
        start = time.monotonic()
        deadline = start + timeout_seconds
        pause = 0.001
        last_sign = None
        while (text := self._get(key)) is None:
            sign = self._get(life) if life is not None else None
            if sign != last_sign:  # compared with itself only: the clocks of two machines differ
                deadline = time.monotonic() + timeout_seconds
                last_sign = sign
            if self._lost is not None:
                raise LinkError(f"rank {self._rank} cannot get {what}: {self._lost}", code="launcher-gone")
            if (fault := self.fault()) is not None:
                raise PeerError(fault)
            if time.monotonic() > deadline:
                raise waited_too_long(f"rank {self._rank}", what, time.monotonic() - start, timeout_seconds)
            time.sleep(pause)
            pause = min(0.05, pause * 1.5)  # short at first, because most waits are; then easy on the store
        return text

    def _set(self, key: str, text: str) -> None:
        self._try(lambda: self._store.set(key, text))

    def _get(self, key: str) -> str | None:
        """Return what is under a key now, or None."""
        # Checked first: `get` alone would wait for the key.
        found = self._try(lambda: self._store.get(key) if self._store.check([key]) else None)
        return None if found is None else _text(found)

    def _try(self, call: Callable[[], Any]) -> Any:
        """Call the store; None, now and from now on, if it is gone."""
        if self._lost is not None:  # each further call would make torch print a trace of its own
            return None
        try:
            return wait_for(call, self._bound)
        except ReportedError:  # of a signal handler, while this thread waited
            raise
        except TimeoutError as error:
            self._lost = f"{STORE_SILENT}: {error}"
        except (RuntimeError, OSError):  # DistStoreError and its kin, all RuntimeErrors: the store's host is gone
            self._lost = LAUNCHER_GONE
        return None


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
