"""Joins the ranks of one run: the launcher's process group, and links between neighbouring stages."""

from __future__ import annotations

import atexit
import hashlib
import itertools
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from decoupled_pp.core import environment
from decoupled_pp.core.channels import LinkTerms
from decoupled_pp.core.errors import Fault, LinkError, UsageError, first_line
from decoupled_pp.core.topology import Topology
from decoupled_pp.core.torch_private import default_store
from decoupled_pp.links.control import StoreControl
from decoupled_pp.links.header import HEADER_BYTES
from decoupled_pp.links.lane import Lane
from decoupled_pp.links.messages import MessageReceiver, MessageSender
from decoupled_pp.links.receiving_end import ReceivingEnd
from decoupled_pp.links.returns import backward_bytes
from decoupled_pp.links.sending_end import SendingEnd
from decoupled_pp.links.wire import Wire

Group: TypeAlias = dist.ProcessGroup
_world: list[World] = []
_PACKETS = 1
_CREDITS = 2
_BACK = 3
"""Tags that tell apart what a host group carries; the last is of large tensors that come back between CPUs."""


def join_world(timeout_seconds: float) -> World:
    """Return the World of this process; joined at the first call, left at exit.

    Raises:
        LinkError: The other ranks did not come within the bound.
    """
    if not _world:
        _world.append(World(timeout_seconds))
        atexit.register(leave_world)
    return _world[0]


def first_to_report(text: str, timeout_seconds: float) -> bool:
    """Report bad input, joined or not. Return whether this rank is the first of the launch to do so."""
    fault = Fault(text, environment.rank(), usage=True, code="bad-input")  # each rank has the code of its own error
    if _world:
        return _world[0].control.report_fault(fault)
    # Ranks that have not joined only use the store: joining takes all of them, and they are about to end.
    try:
        store = dist.PrefixStore("early", _store_of_launch(timeout_seconds))
    except (RuntimeError, ValueError):  # the store's host is gone: nobody else can say it either
        return True
    return StoreControl(store, environment.rank(), environment.world_size()).report_fault(fault)


def _store_of_launch(timeout_seconds: float) -> dist.Store:
    """Return the launcher's store, under keys of this attempt."""
    # torchrun's store outlives a restart of the workers, and so does what the attempt before has left in it.
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
    return dist.PrefixStore(f"dpp/attempt-{environment.restart_count()}", store)


def leave_world() -> None:
    """Leave the process group, if this process joined it."""
    while _world:
        _world.pop().leave()


class World:
    """This rank among the ranks of a launch. `Topology` says which stages it holds.

    A process has one (`join_world`), because a process has one default process group.
    """

    def __init__(self, timeout_seconds: float) -> None:
        """Join the process group (gloo: it carries set-up only; every link has groups of its own).

        Args:
            timeout_seconds: Longest wait for the other ranks.

        Raises:
            LinkError: The other ranks did not come within the bound.
        """
        self.rank = environment.rank()
        self.size = environment.world_size()
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
                    f"rank {self.rank} could not join the {self.size} ranks: {first_line(error)}; look at the "
                    "log of the rank that did not come",
                    code="ranks-not-connected",
                ) from error
        self._store = default_store()
        self._channels = itertools.count()
        self._groups: list[dist.ProcessGroup] = []
        self.control = self.channel()

    def channel(self) -> StoreControl:
        """Return a control plane in a fresh key space of the store; every rank must call this equally often."""
        prefix = f"dpp/{next(self._channels)}"
        return StoreControl(dist.PrefixStore(prefix, self._store), self.rank, self.size)

    def connect(
        self, control: StoreControl, topology: Topology, device: torch.device, plan_digest: str, terms: LinkTerms
    ) -> tuple[ReceivingEnd | None, SendingEnd | None]:
        """Build all links (every rank must call this); return this rank's two ends.

        Every link gets a two-rank gloo group (messages forward, credits backward), and between GPUs one of NCCL for
        the tensors. All ranks make all groups in the same order, because `new_group` is collective. Each group is
        used once here, so that connections exist before training, and a mismatch of plans is found at once.

        Args:
            control: Is told when a link breaks.
            topology: Which rank holds which stage.
            device: Where the stages compute.
            plan_digest: Text that both ends of a link must agree on.
            terms: Capacity, time-out, and what comes back.

        Raises:
            UsageError: The neighbour runs another plan or configuration.
            LinkError: A rank did not come.
        """
        inlet: ReceivingEnd | None = None
        outlet: SendingEnd | None = None
        for sender, receiver in topology.links():
            edge = _Edge(
                sender.stage,
                (topology.rank_of(sender.stage), topology.rank_of(receiver.stage)),
                (topology.name(sender), topology.name(receiver)),
            )
            groups = self._groups_of(edge, device, terms)
            if self.rank not in edge.ranks:
                continue
            payload = None
            if groups.payload is not None:
                payload = Lane(groups.payload, 1 - edge.end_of(self.rank))
            self._greet(edge, groups.host, payload, device, plan_digest)
            wire = self._wire(control, edge, groups, payload, device, terms)
            if edge.end_of(self.rank) == 0:
                outlet = SendingEnd(wire, capacity=terms.capacity, timeout_seconds=terms.timeout_seconds)
            else:
                inlet = ReceivingEnd(wire, capacity=terms.capacity, timeout_seconds=terms.timeout_seconds)
        return inlet, outlet

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Fill `tensor` on every rank with rank `source`'s values; set-up and export only, never training.

        It goes once around the ring, through host memory: ranks may hold it on different kinds of devices.
        """
        # Not by `dist.broadcast`: a gloo collective lets go of its tensors in a thread of its own, some time later, and
        # if the interpreter is ending by then the process aborts.
        host = tensor.detach().cpu().contiguous()
        if not host.numel():
            return
        before = (self.rank - 1) % self.size
        after = (self.rank + 1) % self.size
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

    def _groups_of(self, edge: _Edge, device: torch.device, terms: LinkTerms) -> _Groups:
        """Make the groups of one link; this rank keeps those that it is in."""
        host = self._group(edge, "gloo", terms.timeout_seconds)
        if device.type != "cuda":
            return _Groups(host)
        payload = self._group(edge, "nccl", terms.timeout_seconds)
        if not terms.returns.per_activation:
            return _Groups(host, payload)
        # A communicator of its own: NCCL orders what one carries, and the link's sender thread uses the other.
        return _Groups(host, payload, self._group(edge, "nccl", terms.timeout_seconds))

    def _group(self, edge: _Edge, backend: str, timeout_seconds: float) -> Group:
        try:
            # The bound is for meeting and greeting; receives that are posted ahead are waited for with their own.
            bound = timedelta(seconds=timeout_seconds)
            group: Group = dist.new_group(list(edge.ranks), backend=backend, timeout=bound)
        except (RuntimeError, ValueError) as error:
            cause = self.control.lost() or first_line(error)  # ranks find each other through the store
            raise LinkError(
                f"{edge.names[0]} and {edge.names[1]} could not be connected: {cause}, seen by rank {self.rank}; look "
                "at the log of the rank that did not come",
                code="ranks-not-connected",
            ) from error
        if self.rank in edge.ranks:
            self._groups.append(group)
        return group

    def _wire(  # noqa: PLR0917 - what an end is made of, each once
        self,
        control: StoreControl,
        edge: _Edge,
        groups: _Groups,
        payload: Lane | None,
        device: torch.device,
        terms: LinkTerms,
    ) -> Wire:
        """Return this end's transport, its first receives posted."""
        here = edge.end_of(self.rank)
        floats = terms.samples if terms.returns.per_sample else 0
        credit_size = backward_bytes(floats)
        # A credit for every packet, and as many messages again if floats come back beside them.
        backward = 2 * terms.capacity if floats else terms.capacity
        out = MessageSender(
            groups.host,
            1 - here,
            _PACKETS if here == 0 else _CREDITS,
            size=HEADER_BYTES if here == 0 else credit_size,
            ahead=terms.capacity if here == 0 else backward,
            timeout_seconds=terms.timeout_seconds,
        )
        into = MessageReceiver(
            groups.host,
            1 - here,
            _CREDITS if here == 0 else _PACKETS,
            size=credit_size if here == 0 else HEADER_BYTES,
            ahead=backward + 1 if here == 0 else terms.capacity,  # upstream: every message, and the goodbye
        )
        return Wire(
            sender=edge.sender,
            out=out,
            into=into,
            payload=payload,
            back=self._lane_back(groups, 1 - here, terms),
            device=device,
            here=edge.names[here],
            there=edge.names[1 - here],
            failed=lambda error: control.report_fault(Fault.of(error, self.rank)),
        )

    def _lane_back(self, groups: _Groups, peer: int, terms: LinkTerms) -> Lane | None:
        if not terms.returns.per_activation:
            return None
        if groups.back is None:
            return Lane(groups.host, peer, _BACK)
        return Lane(groups.back, peer)

    def _greet(self, edge: _Edge, host: Group, payload: Lane | None, device: torch.device, plan_digest: str) -> None:
        """Use the connections once; both ends must have the same digest."""
        here = edge.end_of(self.rank)
        digest = torch.frombuffer(bytearray(hashlib.sha256(plan_digest.encode()).digest()), dtype=torch.uint8)
        theirs = torch.zeros_like(digest)
        probe = torch.zeros(1, device=device)
        try:
            for lane, sent, received in ((Lane(host, 1 - here), digest, theirs), (payload, probe, probe)):
                if lane is None:
                    continue
                if here == 0:  # one end sends first, the other receives first: no end waits for the other's receive
                    lane.send(sent)
                    lane.receive(received)
                else:
                    lane.receive(received)
                    lane.send(sent)
        except RuntimeError as error:
            cause = first_line(error)
            raise LinkError(
                f"{edge.names[here]} could not connect to {edge.names[1 - here]}: {cause}; look at that rank's log",
                code="ranks-not-connected",
            ) from error
        if not torch.equal(digest, theirs):
            raise UsageError(
                f"{edge.names[0]} and {edge.names[1]} run different plans or settings; start all ranks alike",
                code="ranks-run-different-plans",
            )
        if payload is not None:
            payload.bytes_sent = 0


@dataclass(frozen=True)
class _Edge:
    """One link: the index of its sending stage, and rank and name of both ends, the sending end first."""

    sender: int
    ranks: tuple[int, int]
    names: tuple[str, str]

    def end_of(self, rank: int) -> int:
        """Return 0 for the sending end, 1 for the receiving one: also the rank within the two-rank groups."""
        return self.ranks.index(rank)


@dataclass(frozen=True)
class _Groups:
    """The process groups of one link.

    Attributes:
        host: gloo: messages forward, credits back, and between CPUs all else.
        payload: NCCL: tensors forward, between GPUs.
        back: NCCL: tensors that come back, between GPUs, if any do.
    """

    host: Group
    payload: Group | None = None
    back: Group | None = None
