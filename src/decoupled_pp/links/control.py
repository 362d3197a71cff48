"""The control plane: JSON records, the first fault and a stop request, in one process or over the launcher's store."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from decoupled_pp.core.channels import Control
from decoupled_pp.core.errors import LAUNCHER_GONE, Fault, LinkError, PeerError, ReportedError, UsageError
from decoupled_pp.core.records import write_message
from decoupled_pp.core.reports import Record, read_record


class LocalControl(Control):
    """All stages live in this process."""

    def __init__(self) -> None:
        """Start with nothing posted."""
        self._records: list[Record] = []
        self._fault: Fault | None = None
        self._stop: str | None = None
        self._lock = threading.Lock()

    def post(self, record: Record) -> None:
        """Keep the record for the next `collect`."""
        with self._lock:
            self._records.append(record)

    def collect(self) -> list[Record]:
        """Hand over the records."""
        with self._lock:
            records, self._records = self._records, []
        return records

    def report_fault(self, text: str, *, usage: bool = False, code: str = "link-broken") -> bool:
        """Keep the first fault."""
        first = self._fault is None
        self._fault = self._fault or Fault(text, 0, usage, code)
        return first

    def fault(self) -> Fault | None:
        """The first fault."""
        return self._fault

    def request_stop(self, reason: str) -> None:
        """Keep the reason."""
        self._stop = self._stop or reason

    def stop_requested(self) -> str | None:
        """The reason, if any."""
        return self._stop

    def gather(self, name: str, value: Any, timeout_seconds: float) -> list[Any]:
        """Return the one value; the way through JSON makes it what it is among several processes."""
        return [json.loads(write_message(value))]

    def from_rank_0(self, name: str, make: Callable[[], Any], timeout_seconds: float) -> Any:
        """Make the value: this process is rank 0."""
        return make()


class StoreControl(Control):
    """One rank's access to the store that torchrun (or any launcher) gave the process group.

    Only non-blocking calls are used, because a blocking call would hold the store's connection from other threads.
    A store that is gone (its host, the launcher, died) makes records vanish and faults unknown, and is a reason to
    stop: packets need no store, so the run can still save and end in order. Only `gather` and `from_rank_0` raise.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        """Wrap `store`; every rank makes one with the same prefix."""
        self._store, self._rank, self._size = store, rank, size
        self._posted = 0
        self._collected = [0] * size
        self._lock = threading.Lock()
        self._lost: str | None = None

    def post(self, record: Record) -> None:
        """Put the record into the store under the next number of this rank."""
        with self._lock:
            self._try(lambda: self._store.set(f"record/{self._rank}/{self._posted}", write_message(record)))
            self._posted += 1

    def collect(self) -> list[Record]:
        """Take every rank's new records out of the store."""
        records: list[Record] = []
        for rank in range(self._size):
            while (text := self._get(f"record/{rank}/{self._collected[rank]}")) is not None:
                records.append(read_record(json.loads(text)))
                self._try(lambda key=f"record/{rank}/{self._collected[rank]}": self._store.delete_key(key))
                self._collected[rank] += 1
        return records

    def report_fault(self, text: str, *, usage: bool = False, code: str = "link-broken") -> bool:
        """Set the fault if there is none yet."""
        mine = json.dumps([text, self._rank, usage, code])
        kept = self._try(lambda: self._store.compare_set("fault", "", mine))
        return kept is None or _text(kept) == mine

    def fault(self) -> Fault | None:
        """The first fault of any rank."""
        kept = self._get("fault")
        return None if kept is None else Fault(*json.loads(kept))

    def request_stop(self, reason: str) -> None:
        """Ask rank 0, which looks at this from time to time."""
        self._try(lambda: self._store.compare_set("stop", "", reason))

    def stop_requested(self) -> str | None:
        """The reason, if any rank asked, or that the store is gone."""
        return self._get("stop") or self._lost

    def lost(self) -> str | None:
        """That the store is gone, in words, or None while it answers."""
        self._get("fault")
        return self._lost

    def from_rank_0(self, name: str, make: Callable[[], Any], timeout_seconds: float) -> Any:
        """Let rank 0 make a JSON-able value and give it to every rank; what fails there fails everywhere.

        How long rank 0 needs (to tokenise, to measure) is its own affair: the bound is for how long it gives no sign of
        life.

        Raises:
            LinkError: Nothing was heard of rank 0 within the bound.
            PeerError: Rank 0 could not make it (rank 0 itself raises its own error).
        """
        if self._rank != 0:
            return json.loads(self._await(f"share/{name}", timeout_seconds, f"{name} from rank 0", f"alive/{name}"))
        try:
            with self._showing_life(f"alive/{name}", timeout_seconds / 10):
                value = make()
        except Exception as error:
            reported = error if isinstance(error, ReportedError) else ReportedError(str(error), code="unexpected-error")
            self.report_fault(reported.text, usage=isinstance(error, UsageError), code=reported.code)
            raise
        self._try(lambda: self._store.set(f"share/{name}", json.dumps(value)))
        return value

    def gather(self, name: str, value: Any, timeout_seconds: float) -> list[Any]:
        """Through the store, one key per rank."""
        self._try(lambda: self._store.set(f"gather/{name}/{self._rank}", write_message(value)))
        keys = [f"gather/{name}/{rank}" for rank in range(self._size)]
        return [json.loads(self._await(k, timeout_seconds, f"{name} from rank {r}")) for r, k in enumerate(keys)]

    @contextmanager
    def _showing_life(self, key: str, period_seconds: float) -> Iterator[None]:
        """Change the key from time to time, from a thread, while something else goes on."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(period_seconds):
                self._try(lambda: self._store.set(key, str(time.monotonic())))

        thread = threading.Thread(target=beat, name="dpp-life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _await(self, key: str, timeout_seconds: float, what: str, life: str | None = None) -> str:
        """Wait for a key, no longer than the bound after the last change of the key `life`."""
        deadline, pause, last = time.monotonic() + timeout_seconds, 0.001, None
        while (text := self._get(key)) is None:
            if life is not None and (sign := self._get(life)) != last:
                deadline, last = time.monotonic() + timeout_seconds, sign
            if self._lost is not None:
                raise LinkError(f"rank {self._rank} cannot get {what}: {self._lost}")
            if (fault := self.fault()) is not None:
                raise PeerError(fault)
            if time.monotonic() > deadline:
                raise LinkError(f"rank {self._rank} waited {timeout_seconds:g} s for {what}: the bound is over")
            time.sleep(pause)
            pause = min(0.05, pause * 1.5)
        return text

    def _get(self, key: str) -> str | None:
        found = self._try(lambda: self._store.get(key) if self._store.check([key]) else None)
        return None if found is None else _text(found)

    def _try(self, call: Any) -> Any:
        if self._lost is not None:  # each further call would print torch's own trace
            return None
        try:
            return call()
        except (RuntimeError, OSError):  # DistStoreError and its kin are RuntimeErrors: the store's host is gone
            self._lost = LAUNCHER_GONE
            return None


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
