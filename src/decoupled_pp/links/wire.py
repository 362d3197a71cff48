"""One end of the transport of a link between two ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from decoupled_pp.core.errors import LinkError
from decoupled_pp.links.lane import Lane
from decoupled_pp.links.messages import MessageReceiver, MessageSender


@dataclass(frozen=True)
class Wire:
    """One end of a link's transport.

    Attributes:
        sender: Index of the sending stage.
        out: Sends packets (upstream end) or credits (downstream end).
        into: Receives credits or packets.
        payload: The lane of the tensors between GPUs; None between CPUs, where they are in the messages.
        device: Where the tensors are.
        here: Name of this end, e.g. "stage 0 (rank 0)".
        there: Name of the other end.
        failed: Called once with the error, from whichever thread finds the link broken.
        back: The lane on which tensors as large as activations come back; None if none do.
    """

    sender: int
    out: MessageSender
    into: MessageReceiver
    payload: Lane | None
    device: torch.device
    here: str
    there: str
    failed: Callable[[LinkError], object]
    back: Lane | None = None

    @property
    def payload_bytes(self) -> int:
        """The bytes of tensors that this end has sent."""
        return self.out.payload_bytes + sum(lane.bytes_sent for lane in self._lanes)

    def break_off(self) -> None:
        """Close the connection now, so that whoever waits at either end wakes."""
        self.out.break_off()
        if self.payload is not None:
            for lane in self._lanes:
                lane.break_off()

    @property
    def _lanes(self) -> list[Lane]:
        return [lane for lane in (self.payload, self.back) if lane is not None]
