"""The ranks of one run: joins the launcher's process group, connects neighbouring stages, leaves again."""

from __future__ import annotations

import atexit
import hashlib
import itertools
from datetime import timedelta
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from decoupled_pp.core import environment
from decoupled_pp.core.errors import LinkError, UsageError
from decoupled_pp.links.control import StoreControl
from decoupled_pp.links.header import HEADER_BYTES
from decoupled_pp.links.lane import Lane
from decoupled_pp.links.messages import MessageReceiver, MessageSender
from decoupled_pp.links.process_group import ReceivingEnd, SendingEnd
from decoupled_pp.links.returns import backward_bytes
from decoupled_pp.links.wire import Wire

Group: TypeAlias = dist.ProcessGroup
_world: list[World] = []
_GRADIENTS = 3
"""Tag of the gradients between CPUs; packets have 1 and credits 2."""


def join_world(timeout_seconds: float) -> World:
    """The World of this process; joined at the first call, left at exit.

    Raises:
        LinkError: The other ranks did not come within the bound.
    """
    if not _world:
        _world.append(World(timeout_seconds))
        atexit.register(leave_world)
    return _world[0]


def first_to_report(text: str, timeout_seconds: float) -> bool:
    """Report bad input, joined or not; whether this rank is the first of the launch to do so.

    Ranks that have not joined only use the store: joining takes all of them, and they are about to end.
    """
    if _world:
        return _world[0].control.report_fault(text, usage=True)
    try:
        store = dist.PrefixStore("early", _store_of_launch(timeout_seconds))
    except (RuntimeError, ValueError):  # the store's host is gone: nobody else can say it either
        return True
    return StoreControl(store, environment.rank(), environment.world_size()).report_fault(text, usage=True)


def _store_of_launch(timeout_seconds: float) -> dist.Store:
    """The launcher's store, without what an attempt before a restart left in it (torchrun's c10d store outlives it)."""
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
    return dist.PrefixStore(f"dpp/attempt-{environment.restart_count()}", store)


def leave_world() -> None:
    """Leave the process group, if this process joined it."""
    while _world:
        _world.pop().leave()


class World:
    """This rank among the ranks of a launch. Stage k lives on rank k.

    A process has one (`join_world`), because a process has one default process group.
    """

    def __init__(self, timeout_seconds: float) -> None:
        """Join the process group (gloo: it carries set-up only; every link has groups of its own).

        Args:
            timeout_seconds: Longest wait for the other ranks.

        Raises:
            LinkError: The other ranks did not come within the bound.
        """
        self.rank, self.size = environment.rank(), environment.world_size()
        self._joined = not dist.is_initialized()
        if self._joined:
            try:
                dist.init_process_group(
                    "gloo",
                    store=_store_of_launch(timeout_seconds),
                    rank=self.rank,
                    world_size=self.size,
                    timeout=timedelta(seconds=timeout_seconds),
                )
            except (RuntimeError, ValueError) as error:
                raise LinkError(
                    f"rank {self.rank} could not join the {self.size} ranks: {str(error).splitlines()[0]}"
                ) from error
        self._store = dist.distributed_c10d._get_default_store()
        self._channels = itertools.count()
        self._groups: list[dist.ProcessGroup] = []
        self.control = self.channel()

    def channel(self) -> StoreControl:
        """A fresh key space of the store; every rank must call this equally often."""
        prefix = f"dpp/{next(self._channels)}"
        return StoreControl(dist.PrefixStore(prefix, self._store), self.rank, self.size)

    def connect(
        self,
        control: StoreControl,
        device: torch.device,
        plan_digest: str,
        *,
        capacity: int,
        timeout_seconds: float,
        losses: int = 0,
        gradients: bool = False,
    ) -> tuple[ReceivingEnd | None, SendingEnd | None]:
        """Build all links (every rank must call this), return this rank's two ends; breaks are reported to `control`.

        Every link gets a two-rank gloo group (messages forward, credits backward), and between GPUs one of NCCL for
        the tensors, made in the same order on all ranks. Each is used once here, so that connections exist before
        training and a mismatch of plans is found at once.

        Args:
            control: Takes what breaks.
            device: Where the stages compute.
            plan_digest: What both ends must agree on.
            capacity: Packets a link may hold.
            timeout_seconds: Longest wait for a packet or for room.
            losses: Samples of the largest packet, if their losses go back (cascade targets).
            gradients: Whether gradients will go back (end-to-end steps).

        Raises:
            UsageError: The neighbour runs another plan or configuration.
            LinkError: A rank did not come.
        """
        inlet: ReceivingEnd | None = None
        outlet: SendingEnd | None = None
        for sender in range(self.size - 1):
            host = self._group(sender, "gloo", timeout_seconds)
            payload = self._group(sender, "nccl", timeout_seconds) if device.type == "cuda" else None
            # A communicator of its own: NCCL orders what one carries, and the link's sender thread uses the other.
            back = self._group(sender, "nccl", timeout_seconds) if payload is not None and gradients else None
            if self.rank not in (sender, sender + 1):
                continue
            there = sender + 1 if self.rank == sender else sender
            lane = Lane(payload, there - sender) if payload is not None else None
            self._greet(Lane(host, there - sender), lane, there, device, plan_digest)
            backward = Lane(host, there - sender, _GRADIENTS) if payload is None else None
            if back is not None:
                backward = Lane(back, there - sender)
            wire = self._wire(control, sender, host, (lane, backward), device, (capacity, timeout_seconds, losses))
            if self.rank == sender:
                outlet = SendingEnd(wire, capacity=capacity, timeout_seconds=timeout_seconds)
            else:
                inlet = ReceivingEnd(wire, capacity=capacity, timeout_seconds=timeout_seconds)
        return inlet, outlet

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Fill `tensor` on every rank with rank `source`'s values; set-up and export only, never training.

        It goes once around the ring, through host memory: ranks may hold it on different kinds of devices. Not by
        `dist.broadcast`: a gloo collective lets go of its tensors in a thread of its own, some time later, and if the
        interpreter is ending by then the process aborts.
        """
        host = tensor.detach().cpu().contiguous()
        if not host.numel():
            return
        before, after = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        if self.rank != source:
            dist.recv(host, before)
        if after != source:
            dist.send(host, after)
        if host.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(host)

    def disconnect(self) -> None:
        """Give up the groups of all links; their ends must be closed."""
        for group in self._groups:
            dist.destroy_process_group(group)
        self._groups.clear()

    def leave(self) -> None:
        """Give up the links' groups, and the process group if this object joined it."""
        self.disconnect()
        if self._joined and dist.is_initialized():
            dist.destroy_process_group()

    def _group(self, sender: int, backend: str, timeout_seconds: float) -> Group:
        try:
            # The bound is for meeting and greeting; receives that are posted ahead are waited for with their own.
            bound = timedelta(seconds=timeout_seconds)
            group: Group = dist.new_group([sender, sender + 1], backend=backend, timeout=bound)
        except (RuntimeError, ValueError) as error:
            ends = f"{_name(sender)} and {_name(sender + 1)}"
            cause = self.control.lost() or str(error).splitlines()[0]  # ranks find each other through the store
            raise LinkError(f"{ends} could not be connected: {cause}, seen by rank {self.rank}") from error
        if self.rank in (sender, sender + 1):
            self._groups.append(group)
        return group

    def _wire(  # noqa: PLR0917 - what an end is made of, each once
        self,
        control: StoreControl,
        sender: int,
        host: Group,
        lanes: tuple[Lane | None, Lane | None],
        device: torch.device,
        bounds: tuple[int, float, int],
    ) -> Wire:
        """This end's transport; posts its first receives."""
        upstream, (capacity, seconds, losses) = self.rank == sender, bounds
        peer, packets, credits = (1 if upstream else 0), 1, 2
        credit_size, header_size = backward_bytes(losses), HEADER_BYTES
        backward = 2 * capacity if losses else capacity
        out = MessageSender(
            host,
            peer,
            packets if upstream else credits,
            size=header_size if upstream else credit_size,
            ahead=capacity if upstream else backward,
            timeout_seconds=seconds,
        )
        into = MessageReceiver(
            host,
            peer,
            credits if upstream else packets,
            size=credit_size if upstream else header_size,
            ahead=backward + 1 if upstream else capacity,  # upstream: every credit (and losses), and the goodbye
        )
        return Wire(
            sender=sender,
            out=out,
            into=into,
            payload=lanes[0],
            gradients=lanes[1],
            device=device,
            here=_name(self.rank),
            there=_name(sender + peer),
            failed=control.report_fault,
        )

    def _greet(self, host: Lane, payload: Lane | None, there: int, device: torch.device, plan_digest: str) -> None:
        """Use the connections once; both ends must have the same digest."""
        digest = torch.frombuffer(bytearray(hashlib.sha256(plan_digest.encode()).digest()), dtype=torch.uint8)
        theirs, probe = torch.zeros_like(digest), torch.zeros(1, device=device)
        try:
            for lane, sent, received in ((host, digest, theirs), (payload, probe, probe)):
                if lane is None:
                    continue
                if self.rank < there:
                    lane.send(sent)
                    lane.receive(received)
                else:
                    lane.receive(received)
                    lane.send(sent)
        except RuntimeError as error:
            raise LinkError(
                f"{_name(self.rank)} could not connect to {_name(there)}: {str(error).splitlines()[0]}"
            ) from error
        if not torch.equal(digest, theirs):
            raise UsageError(
                f"{_name(self.rank)} and {_name(there)} run different plans or settings: start all ranks alike"
            )
        if payload is not None:
            payload.bytes_sent = 0


def _name(rank: int) -> str:
    return f"stage {rank} (rank {rank})"
