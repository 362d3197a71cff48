"""Brings the true gradient of every packet back at a fixed lag; no stage stops for it (a pipeline of stale gradients).

stage 0   F n   B n-2 S n | F n+1 B n-1 S n+1 |             F: forward, the output leaves; no graph is kept
stage 1         F n   B n-1 S n | F n+1 B n   S n+1 |       B: forward once more, backward; the gradient of the input
stage 2               F n   B n   S n | ...                    goes back beside the packets that go forward

Stage k of K learns from packet n - `lag` (K-1-k) once it has sent packet n on. So what it computes is told by the
numbers of packets alone, whenever gradients come (law 3). Steps are counted by packets, as under every rule: the first
ones of a run, before any gradient has come, leave all weights as they are.

Sources: PipeDream (Narayanan et al. 2019, weight stashing); Delayed gradients, DDG (Huo et al. 2018).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from decoupled_pp.core.channels import Ends, Returns
from decoupled_pp.core.gradients import WithoutGradients
from decoupled_pp.core.module_state import KeptState
from decoupled_pp.core.objective import View
from decoupled_pp.core.packets import Packet, as_tuple, map_payload
from decoupled_pp.pipeline.body import as_leaf
from decoupled_pp.pipeline.rules.gradients import differentiable, gradient_of, refuse_sparse, with_graph
from decoupled_pp.pipeline.rules.in_flight import InFlight, Tensors, from_state, to_state
from decoupled_pp.pipeline.rules.rule import Done, Lap, Rule, RuleParts, RuleState
from decoupled_pp.pipeline.rules.stash import Stash, copies_of_buffers, put_buffers, put_weights
from decoupled_pp.settings.rules import DelayedTarget, RuleSettings


class Delayed(Rule):
    """Forward, send; then backward and step for a packet some packets ago, from the gradient that has come back."""

    returns = Returns(per_activation=True, late=True)

    def __init__(self, parts: RuleParts, settings: RuleSettings) -> None:
        super().__init__(parts, settings)
        assert isinstance(settings, DelayedTarget), "the table of rules gives each rule its own section"
        self._lag = settings.lag * (parts.stages - 1 - parts.index)  # packets from forward to backward in this stage
        self._lag_after = self._lag - settings.lag  # the same in the next stage
        self._stashes = settings.weights == "stashed"
        self._forward = WithoutGradients()
        self._stash = Stash(parts.body.trunk)
        self._last = -1  # the last packet taken
        self._settled = True
        self.in_flight: deque[InFlight] = deque()  # oldest first, at most `_lag` of them between packets

    def step(self, packet: Packet, ends: Ends, lap: Lap) -> Done:
        """Send one packet on, and learn from the one that is due; the last stage learns from this one."""
        self._settled = False
        if self.parts.is_last:
            return self._learn_from_loss(packet, ends, lap)
        self.in_flight.append(self._taken(packet))
        # A clone: layers may work in place on what they are given, and it is needed once more.
        hidden = self._forward(self.parts.body.forward, map_payload(torch.clone, packet.payload))
        self.in_flight[-1].like = tuple(tensor.to("meta") for tensor in differentiable(hidden))
        lap("forward")
        ends.outlet.send(replace(packet, payload=map_payload(torch.detach, hidden), rider=()))
        self.show(View(packet.payload, hidden, packet.target))
        lap("wait_out")
        self.skip(packet, ends, lap)
        self.parts.update.count(packet)
        lap("step")
        return Done(packet, None)

    def skip(self, packet: Packet, ends: Ends, lap: Lap) -> None:
        """Learn from the packet that is due, whether or not something counts in the present one."""
        self._last = packet.number
        self._settled = False
        for one in self.in_flight:
            if one.number == packet.number - self._lag_after:  # the next stage gives this one back now
                ends.outlet.expect(one.number, one.like)
        if self.in_flight and self.in_flight[0].number <= packet.number - self._lag:
            one = self.in_flight.popleft()
            gradient = self._gradient(one, ends)
            lap("wait_out")
            self._learn(one, gradient, ends)
            lap("backward")

    def begin(self) -> None:
        """Forget packets whose gradients a failed session owes; those of a session that ended in order come yet."""
        self._stash.forget()  # weights may have been changed since
        if not self._settled:
            self.in_flight.clear()
            self._settled = True

    def settle(self, ends: Ends) -> None:
        """Take the gradients that the next stage has given back, or gives back before it settles, too."""
        for one in self.in_flight:
            if one.number <= self._last - self._lag_after:
                one.gradient = self._gradient(one, ends)
        self._settled = True

    def state(self) -> RuleState:
        """Return the packets in flight: inputs, gradients, and the weights that they were sent on with."""
        return {"lag": self._lag} | to_state(self.in_flight, self.parts.body.trunk)

    def load(self, state: Mapping[str, Any]) -> str | None:
        """Go on with these packets in flight."""
        self.in_flight.clear()
        self._stash.forget()
        self._settled = True
        self._last = -1
        if state.get("lag") == self._lag:
            self.in_flight.extend(from_state(state, self.parts.body.device, self.parts.body.trunk))
            return None
        if self.parts.is_last:
            return None
        lost = "the checkpoint has no gradients under way for this cut and lag"
        return f"{lost}; the stage goes on learning {self._lag} packets later"

    def _taken(self, packet: Packet) -> InFlight:
        """Return a packet with what its backward pass needs, before the layers see it."""
        one = InFlight(replace(packet, target=(), rider=()), self.parts.body.random.here())
        if self._stashes:
            one.version = self.parts.update.steps
            one.weights = self._stash.weights(one.version)
            one.buffers = copies_of_buffers(self.parts.body.trunk)
        return one

    def _gradient(self, one: InFlight, ends: Ends) -> Tensors:
        return tuple(ends.outlet.returned(one.number, one.like)) if one.gradient is None else one.gradient

    def _learn(self, one: InFlight, gradient: Tensors, ends: Ends) -> None:
        """Run forward once more as it was, and backward from the gradient that has come for the output."""
        # Leaves, so that backward leaves in their `.grad` what the stage before waits for. The data need none.
        packet = one.packet
        inputs = packet.payload if self.parts.is_first else map_payload(as_leaf, packet.payload)
        self.parts.update.begin(packet)
        with self._as_it_was(one):
            hidden = self.parts.body.forward(map_payload(torch.clone, inputs))
            refuse_sparse(hidden, self.parts.index, "critic_target")
            self.parts.update.backward_from(*with_graph(hidden, gradient))
        self._give_back(packet, [gradient_of(tensor) for tensor in differentiable(inputs)], ends)

    def _learn_from_loss(self, packet: Packet, ends: Ends, lap: Lap) -> Done:
        body = self.parts.body
        self.parts.update.begin(packet)
        inputs = packet.payload if self.parts.is_first else map_payload(as_leaf, packet.payload)
        hidden = body.forward(inputs if self.parts.is_first else map_payload(torch.clone, inputs))
        lap("forward")
        ends.outlet.send(replace(packet, payload=map_payload(torch.detach, hidden), rider=()))
        self.show(View(inputs, hidden, packet.target))
        lap("wait_out")
        with body.autocast:
            loss = body.loss(as_tuple(hidden)[0], packet.target)
        if loss.requires_grad:
            self.parts.update.backward(loss)
        self._give_back(packet, [gradient_of(tensor) for tensor in differentiable(inputs)], ends)
        lap("backward")
        self.parts.update.count(packet)
        lap("step")
        return Done(packet, loss.detach())

    def _give_back(self, packet: Packet, gradients: list[Tensor], ends: Ends) -> None:
        # Of the packet's own loss: the stage before may be in another optimizer step, and weighs it for that.
        if not self.parts.is_first:
            ends.inlet.give_back(packet.number, [self.parts.update.of_packet(gradient) for gradient in gradients])

    @contextmanager
    def _as_it_was(self, one: InFlight) -> Iterator[None]:
        """Compute as the packet was computed before: random numbers, weights, carried state; then all is as it is."""
        body = self.parts.body
        # Batch statistics have counted the packet already.
        attributes, buffers = KeptState(body.trunk, buffers=False), copies_of_buffers(body.trunk)
        weights = self._stash.weights(self.parts.update.steps) if self._stashes else {}
        stale = weights is not one.weights
        with body.random.replayed(one.random):
            put_buffers(body.trunk, one.buffers)
            if stale:
                put_weights(body.trunk, one.weights)
            try:
                yield
            finally:
                if stale:
                    put_weights(body.trunk, weights)
                put_buffers(body.trunk, buffers)
                attributes.restore()
