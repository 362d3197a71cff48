"""The threads, waits and errors that both ends of a link between two ranks share, and how such a link works.

Credits bound the link, and receives posted ahead hide its latency:

        sending rank                                              receiving rank
        ------------                                              --------------
        stage --send()---------------- message ---------------> receiver thread --> [arrivals] --receive()--> stage
                 ^                                                                                |
                 | one credit each                                                                | taken
              credits <--- listener thread <-------------- credit --------------------------------+

A packet needs a credit before it is sent (`sending_end.py`), and its credit comes back once the receiving stage has
taken it (`receiving_end.py`; on CUDA: once the device has reached it). So wire + arrivals never hold more than
`capacity` packets, a slow consumer slows its producer, and no send is ever posted that its peer has no room for. The
receiver keeps `capacity` receives posted: with enough capacity throughput does not depend on the round trip.

Between CPUs a packet is one message: header, activations, target, rider. The first packet sets the size of posted
receives; a larger one, once the link is empty, sends one RESIZE message for each of them. Smaller ones are padded;
several in a row that fill less than half resize too.

Between GPUs the message is the header alone, sent once the activations are computed, and tensors follow over a group
of their own (NCCL). What has to wait for the device there is done by two more threads, the sender and the returner.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from decoupled_pp.core.channels import LinkEnd, LinkTerms
from decoupled_pp.core.device import own_stream
from decoupled_pp.core.errors import LinkError, TrainingError, first_line, waited_too_long
from decoupled_pp.links.wire import Wire

# Parts of gloo's texts when the other process is gone; gloo raises one class, RuntimeError, for everything.
_CLOSED_BY_PEER = ("Connection closed", "Connection reset", "Broken pipe", "closure")


class GroupEnd(LinkEnd):
    """Base of both ends: its threads end with the stream of packets, or with the first error of the link."""

    def __init__(self, wire: Wire, terms: LinkTerms) -> None:
        self._wire = wire
        self._capacity = terms.capacity
        self._timeout = terms.timeout_seconds
        self._changed = threading.Condition()  # guards all that the stage and the threads share
        self._error: LinkError | None = None
        self._ended = False  # the stage has sent, or taken, the END packet
        self._closing = False
        self._progress = 0  # changes whenever a thread has got something done, or ends
        self._threads: list[threading.Thread] = []

    @property
    def sender(self) -> int:
        """Index of the sending stage."""
        return self._wire.sender

    def _start(self, loop: Callable[[], None]) -> None:
        """Run a loop in a thread of its own."""
        # A daemon, because a thread that waits for a dead peer must not keep the process from ending.
        name = f"dpp-link-{loop.__name__}"
        thread = threading.Thread(target=self._guard, args=(loop,), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _guard(self, loop: Callable[[], None]) -> None:
        """Run a loop; its first error becomes the link's."""
        try:
            # A stream of its own: on the stage's, transfers would queue behind its kernels instead of beside them.
            with own_stream(self._wire.device):
                loop()
        except Exception as error:
            self._fail(error)
        with self._changed:
            self._progress += 1
            self._changed.notify_all()

    def _transport(self, call: Callable[[], None]) -> None:
        """Call the transport in the stage's own thread; its errors are the link's."""
        try:
            call()
        except TrainingError:  # raised by a signal handler in the middle of the call: no fault of the link
            raise
        except RuntimeError as error:
            raise self._fail(error) from error

    def _fail(self, error: Exception) -> LinkError:
        """Keep the first error of this end, wake who waits, tell the run, and end NCCL kernels that wait."""
        with self._changed:
            # The threads of a broken link fail one after the other; only the first error says why.
            is_first = self._error is None
            kept = self._error or self._explain(error)
            self._error = kept
            self._changed.notify_all()
        # Outside of the lock: telling the run goes through the store, which may be slow.
        if is_first and not self._closing:
            self._wire.failed(kept)
            if self._wire.payload is not None:
                self._wire.payload.break_off()
        return kept

    def _explain(self, error: Exception) -> LinkError:
        """Return the error of the transport in words that name both ends."""
        here = self._wire.here
        there = self._wire.there
        if isinstance(error, LinkError):  # of a message, which does not know where it comes from
            return LinkError(f"{here} {error.text}, from {there}", code=error.code)
        text = first_line(error)
        if any(part in text for part in _CLOSED_BY_PEER):
            return LinkError(
                f"{there} is gone: its end of the link closed without an END packet (killed?), seen by {here}",
                code="peer-gone",
            )
        return LinkError(f"{there} cannot be reached: {text}, seen by {here}", code="peer-unreachable")

    def _wait(self, ready: Callable[[], bool], what: str, bounds: int = 1) -> None:
        """Wait under `_changed` until ready, an error, or `bounds` times the bound."""
        start = time.monotonic()
        bound = bounds * self._timeout
        self._changed.wait_for(lambda: ready() or self._error is not None, bound)
        if self._error is not None:
            raise self._error
        if ready():
            return
        raise waited_too_long(self._wire.here, f"{what} {self._wire.there}", time.monotonic() - start, bound)

    def _finish(self) -> None:
        """Join the threads if the stream ended in order and the peer goes on taking packets, else break it off."""
        self._closing = not self._ended  # a peer that dies with the last packets is still a fault of the run
        threads = self._threads
        self._threads = []  # a second `close` finds nothing to do
        with self._changed:
            while self._ended and self._error is None and any(thread.is_alive() for thread in threads):
                if not self._advances(self._progress):
                    break
        # A thread that has told of its last progress may still be alive for a moment.
        for thread in threads:
            thread.join(1.0 if self._ended else 0.0)
        self._closing = True  # from here on, errors are those that breaking off makes
        if any(thread.is_alive() for thread in threads):
            self._wire.break_off()
            for thread in threads:
                thread.join(1.0)

    def _advances(self, before: int) -> bool:
        """Wait under `_changed` until a thread gets something done; False if none does within the bound."""
        return self._changed.wait_for(lambda: self._progress != before or self._error is not None, self._timeout)
