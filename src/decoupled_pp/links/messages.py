"""Carries messages of one size between two ranks on the host (gloo); receives are posted ahead, sends not waited for.

gloo moves data only once the receive is posted: a message that meets no posted receive costs a round trip more. With as
many receives posted as messages can be under way, the link's latency is hidden.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from decoupled_pp.core.torch_private import backend_of

FOREVER = timedelta(days=365)
"""Timeout of waits in helper threads. The bounded waits are those of the stage, whose errors can say who waited."""

_SPARE_TAG = 99  # no message has this tag


class Way(NamedTuple):
    """One direction of a link, as both its ends know it."""

    tag: int  # tells its messages from those of the other direction
    size: int  # bytes of every message: gloo wants to know it before the message comes
    ahead: int  # messages that may be under way


def _backend(group: dist.ProcessGroup) -> dist.ProcessGroup:
    # Calls through the group itself pass torch's dispatcher, at 10 to 50 microseconds each.
    return backend_of(group, torch.device("cpu"))


class MessageSender:
    """Sends messages to the peer (0 or 1) of a two-rank gloo group.

    Attributes:
        size: Bytes of a message; the receiver must expect the same.
        payload_bytes: Bytes sent that were not declared as control.
        control_bytes: Bytes sent of headers, credits and padding.
    """

    def __init__(self, group: dist.ProcessGroup, peer: int, way: Way, timeout_seconds: float) -> None:
        self._backend = _backend(group)
        self._peer = peer
        self._tag = way.tag
        self._ahead = way.ahead
        self._timeout = timedelta(seconds=timeout_seconds)
        self._in_flight: deque[tuple[Tensor, dist.Work]] = deque()  # a buffer stays referenced until its send is over
        self.size = way.size
        self.payload_bytes = 0
        self.control_bytes = 0

    def send(self, message: Tensor, *, control_bytes: int = 0) -> None:
        """Hand a message, uint8 (size,), to the transport; it must not change afterwards."""
        self.payload_bytes += message.numel() - control_bytes
        self.control_bytes += control_bytes
        self._in_flight.append((message, self._backend.send([message], self._peer, self._tag)))
        # gloo finishes a send only in its `wait`, so one that nobody waits for keeps its buffer for ever. When the
        # bound is over, gloo closes the pair: the link is broken.
        while len(self._in_flight) > self._ahead:
            self._in_flight.popleft()[1].wait(self._timeout)

    def break_off(self) -> None:
        """Close the connection now, so that both ends' waiting threads wake with an error."""
        # A gloo wait that expires closes the pair. Aborting a gloo group would leave its waiting threads asleep.
        spare = torch.empty(1, dtype=torch.uint8)
        with suppress(RuntimeError):
            self._backend.recv([spare], self._peer, _SPARE_TAG).wait(timedelta(milliseconds=1))


class MessageReceiver:
    """Receives messages from the peer of a two-rank group; `size` holds for receives posted from now on."""

    def __init__(self, group: dist.ProcessGroup, peer: int, way: Way) -> None:
        self._backend = _backend(group)
        self._peer = peer
        self._tag = way.tag
        self._posted: deque[tuple[Tensor, dist.Work]] = deque()
        self.size = way.size
        for _ in range(way.ahead):
            self.post()

    def post(self) -> None:
        """Post one more receive, into a new buffer."""
        # New each time: the packet that comes lives in this memory for as long as the stage needs it.
        buffer = torch.empty(self.size, dtype=torch.uint8)
        self._posted.append((buffer, self._backend.recv([buffer], self._peer, self._tag)))

    def receive(self) -> Tensor:
        """Wait for the oldest posted receive and return its buffer, uint8 (size,), which is the caller's to keep."""
        buffer, work = self._posted.popleft()
        work.wait(FOREVER)
        return buffer
