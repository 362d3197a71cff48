"""Joins the ranks of one run: the launcher's process group, and links between neighbouring stages."""

from __future__ import annotations

import atexit
import hashlib
import itertools
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from decoupled_pp.core import environment
from decoupled_pp.core.channels import LinkTerms
from decoupled_pp.core.device import own_stream
from decoupled_pp.core.errors import Fault, LinkError, ReportedError, UsageError, first_line
from decoupled_pp.core.structures import as_bytes, write
from decoupled_pp.core.topology import Topology
from decoupled_pp.core.torch_private import default_store
from decoupled_pp.core.waiting import wait_for
from decoupled_pp.links.control import StoreControl
from decoupled_pp.links.header import HEADER_BYTES
from decoupled_pp.links.launch_store import close_stores, store_of_launch
from decoupled_pp.links.messages import FOREVER, MessageReceiver, MessageSender, Way
from decoupled_pp.links.receiving_end import ReceivingEnd
from decoupled_pp.links.returns import backward_bytes
from decoupled_pp.links.sending_end import SendingEnd
from decoupled_pp.links.wire import Lane, Wire

Group: TypeAlias = dist.ProcessGroup
_world: list[World] = []  # empty or one: a process has one default process group

# Tags that tell apart what a host group carries; the last is of large tensors that come back between CPUs.
_PACKETS = 1
_CREDITS = 2
_BACK = 3


def join_world(timeout_seconds: float) -> World:
    """Return the World of this process, joined at the first call, left at exit; LinkError if a rank does not come."""
    if _world and not _world[0].is_there():  # its user has left his process group, and perhaps made another
        _world.clear()
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
        store = dist.PrefixStore("early", wait_for(lambda: store_of_launch(timeout_seconds)))
    except ReportedError:  # of a signal handler
        raise
    except (RuntimeError, ValueError, TimeoutError):  # the store's host is gone: nobody else can say it either
        return True
    return StoreControl(store, environment.rank(), environment.world_size(), timeout_seconds).report_fault(fault)


def leave_world() -> None:
    """Leave the process group, if this process joined it."""
    while _world:
        _world.pop().leave()
    close_stores()


class World:
    """This rank among the ranks of a launch; a process has one (`join_world`)."""

    def __init__(self, timeout_seconds: float) -> None:
        self.rank = environment.rank()
        self.size = environment.world_size()
        self._timeout = timeout_seconds
        self._joined = not dist.is_initialized()
        if self._joined:
            try:
                wait_for(self._join)
            except ReportedError:  # of a signal handler, or of the launch's own store
                raise
            except (RuntimeError, ValueError, TimeoutError) as error:
                raise LinkError(
                    f"rank {self.rank} could not join the {self.size} ranks: {first_line(error)}; look at the "
                    "log of the rank that did not come",
                    code="ranks-not-connected",
                ) from error
        self._store = default_store()
        self._channels = itertools.count()
        self._groups: list[dist.ProcessGroup] = []
        self.control = self.channel()
        # A group of the user's own may not carry what lies in host memory.
        self._host_group = None
        if not self._joined:
            bound = timedelta(seconds=timeout_seconds)
            self._host_group = wait_for(lambda: dist.new_group(backend="gloo", timeout=bound))
        if environment.lacks_local_rank():
            self._find_place_on_host(timeout_seconds)

    def is_there(self) -> bool:
        """Return whether the process group that this rank is in is still the one that it was made for."""
        return dist.is_initialized() and default_store() is self._store

    def _find_place_on_host(self, timeout_seconds: float) -> None:
        hosts = self.control.gather("hosts", environment.host(), timeout_seconds)
        mine = hosts[self.rank]
        environment.set_place_on_host(hosts[: self.rank].count(mine), hosts.count(mine))

    def _join(self) -> None:
        """Meet the other ranks: a call of torch's own bound, which no signal ends."""
        # It carries set-up only, on the host of any machine; every link has groups of its own.
        dist.init_process_group(
            "gloo",
            store=store_of_launch(self._timeout),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=self._timeout),
        )

    def channel(self) -> StoreControl:
        """Return a control plane in a fresh key space of the store; every rank must call this equally often."""
        prefix = f"dpp/{next(self._channels)}"
        return StoreControl(dist.PrefixStore(prefix, self._store), self.rank, self.size, self._timeout)

    def connect(
        self, control: StoreControl, topology: Topology, device: torch.device, plan_digest: str, terms: LinkTerms
    ) -> tuple[ReceivingEnd | None, SendingEnd | None]:
        """Build all links (every rank must call this); return this rank's two ends.

        Every link gets a two-rank gloo group (messages forward, credits backward), and between GPUs one of NCCL for
        the tensors. Each is used once here, so that connections exist before training, and a mismatch of `plan_digest`
        is found at once. `control` is told when a link breaks.

        Raises:
            UsageError: The neighbour runs another plan or configuration.
            LinkError: A rank did not come.
        """
        inlet: ReceivingEnd | None = None
        outlet: SendingEnd | None = None
        # All ranks make all groups, also those that they are not in, in one order: `new_group` is collective.
        for sender, receiver in topology.links():
            names = (topology.name(sender), topology.name(receiver))
            ranks = (topology.rank_of(sender.stage), topology.rank_of(receiver.stage))
            groups = [self._group(names, ranks, backend, terms) for backend in _backends(device, terms)]
            if self.rank not in ranks:
                continue
            here = ranks.index(self.rank)  # also this rank within the two-rank groups: 0 sends, 1 receives
            peer = 1 - here
            payload = Lane(groups[1], peer) if device.type == "cuda" else None
            self._greet(names, here, Lane(groups[0], peer), payload, device, plan_digest)
            out, into = self._messages(groups[0], here, terms)
            wire = Wire(
                sender=sender.stage,
                out=out,
                into=into,
                payload=payload,
                back=_lane_back(groups, peer, terms),
                device=device,
                here=names[here],
                there=names[peer],
                failed=lambda error: control.report_fault(Fault.of(error, self.rank)),
            )
            if here == 0:
                outlet = SendingEnd(wire, terms)
            else:
                inlet = ReceivingEnd(wire, terms)
        return inlet, outlet

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Fill `tensor` on every rank with rank `source`'s values; set-up and export only, never training."""
        # Once around the ring, through host memory: ranks may hold it on different kinds of devices.
        # Not by `dist.broadcast`: a gloo collective lets go of its tensors in a thread of its own, some time later, and
        # if the interpreter is ending by then the process aborts.
        host = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        if not host.numel():
            return
        before = (self.rank - 1) % self.size
        after = (self.rank + 1) % self.size
        content = as_bytes(host)  # in the same memory; gloo knows few dtypes
        if self.rank != source:  # a chain from the source on: nobody sends before it has received
            wait_for(lambda: dist.recv(content, before, group=self._host_group))
        if after != source:
            wait_for(lambda: dist.send(content, after, group=self._host_group))
        if host.data_ptr() != tensor.data_ptr():  # `cpu()` and `contiguous()` copy only where they must
            write(tensor.detach(), host)

    def disconnect(self) -> None:
        """Give up the groups of all links; their ends must be closed."""
        for group in self._groups:
            dist.destroy_process_group(group)
        self._groups.clear()

    def leave(self) -> None:
        """Give up the links' groups, and the process group if this object joined it."""
        if not self.is_there():
            return
        self.disconnect()
        dist.destroy_process_group(None if self._joined else self._host_group)

    def _group(self, names: tuple[str, str], ranks: tuple[int, int], backend: str, terms: LinkTerms) -> Group:
        try:
            # The bound is for meeting and greeting; receives that are posted ahead are waited for with their own.
            bound = timedelta(seconds=terms.timeout_seconds)
            group: Group = wait_for(lambda: dist.new_group(list(ranks), backend=backend, timeout=bound))
        except ReportedError:  # of a signal handler
            raise
        except (RuntimeError, ValueError, TimeoutError) as error:
            cause = self.control.lost() or first_line(error)  # ranks find each other through the store
            raise LinkError(
                f"{names[0]} and {names[1]} could not be connected: {cause}, seen by rank {self.rank}; look at the "
                "log of the rank that did not come",
                code="ranks-not-connected",
            ) from error
        if self.rank in ranks:
            self._groups.append(group)
        return group

    @staticmethod
    def _messages(group: Group, here: int, terms: LinkTerms) -> tuple[MessageSender, MessageReceiver]:
        """Return the two ways of a link, as the end `here` uses them; the first receives are posted."""
        floats = terms.samples if terms.returns.per_sample else 0
        # A credit for every packet, as many messages again if floats come back beside them, and the goodbye.
        ahead = 1 + (2 * terms.capacity if floats else terms.capacity)
        packets = Way(_PACKETS, HEADER_BYTES, terms.capacity)
        credits = Way(_CREDITS, backward_bytes(floats), ahead)
        outward, inward = (packets, credits) if here == 0 else (credits, packets)
        sender = MessageSender(group, 1 - here, outward, terms.timeout_seconds)
        return sender, MessageReceiver(group, 1 - here, inward)

    @staticmethod
    def _greet(  # noqa: PLR0917 - both ends' names and ways
        names: tuple[str, str], here: int, host: Lane, payload: Lane | None, device: torch.device, plan_digest: str
    ) -> None:
        """Use the connections once; both ends must have the same digest."""
        digest = torch.frombuffer(bytearray(hashlib.sha256(plan_digest.encode()).digest()), dtype=torch.uint8)
        theirs = torch.zeros_like(digest)
        try:
            wait_for(lambda: _exchange(host, here, digest, theirs))
            if payload is not None:
                # NCCL builds its communicator at the first use, which takes seconds: now rather than in training.
                wait_for(partial(_exchange_on, device, payload, here))
                payload.bytes_sent = 0
        except ReportedError:  # of a signal handler
            raise
        except (RuntimeError, TimeoutError) as error:
            cause = first_line(error)
            raise LinkError(
                f"{names[here]} could not connect to {names[1 - here]}: {cause}; look at that rank's log",
                code="ranks-not-connected",
            ) from error
        if not torch.equal(digest, theirs):
            raise UsageError(
                f"{names[0]} and {names[1]} run different plans or settings; start all ranks alike",
                code="ranks-run-different-plans",
            )


def _backends(device: torch.device, terms: LinkTerms) -> list[str]:
    """Return the backends of a link's groups: messages, and between GPUs tensors forward and tensors that come back."""
    if device.type != "cuda":
        return ["gloo"]
    # A communicator of its own for each direction: NCCL orders what one carries, and both are used at the same time.
    waits_for_returns = terms.returns.per_activation and not terms.returns.late
    return ["gloo", "nccl", "nccl"] if waits_for_returns else ["gloo", "nccl"]


def _lane_back(groups: Sequence[Group], peer: int, terms: LinkTerms) -> Lane | None:
    """Return the lane of tensors that come back, if a rule gives any back."""
    if not terms.returns.per_activation:
        return None
    if terms.returns.late:
        # By the host, also between GPUs: an NCCL receive posted packets ahead would keep multiprocessors busy, and hang
        # the device if the peer dies. Threads wait there; the bounded wait is that of `returned`.
        return Lane(groups[0], peer, _BACK, (FOREVER,))
    return Lane(groups[-1], peer, _BACK)


def _exchange_on(device: torch.device, lane: Lane, here: int) -> None:
    with own_stream(device):  # a thread's current device is the first one, whatever that of the stage is
        _exchange(lane, here, torch.zeros(1, device=device), torch.zeros(1, device=device))


def _exchange(lane: Lane, here: int, sent: Tensor, received: Tensor) -> None:
    if here == 0:  # one end sends first, the other receives first: no end waits for the other's receive
        lane.send(sent)
        lane.receive(received)
    else:
        lane.receive(received)
        lane.send(sent)
