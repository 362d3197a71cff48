"""Puts end-to-end steps between those of another rule: true gradients flow back, while every stage waits.

stage 0   F n .............................. B n S n | local steps again
stage 1      F n .............. B n S n --gradient-^
stage 2         F n loss B n S n --gradient-^
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from decoupled_pp.core.channels import Ends, Returns
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import View
from decoupled_pp.core.packets import Packet, Payload, as_tuple, map_payload
from decoupled_pp.pipeline.body import as_leaf
from decoupled_pp.pipeline.rules.gradients import differentiable, gradient_of, refuse_sparse, with_graph
from decoupled_pp.pipeline.rules.rule import Done, Lap, Rule, RuleState
from decoupled_pp.settings.rules import CorrectionSettings


@dataclass(frozen=True)
class _Half:
    """An end-to-end step on one packet, between its two halves."""

    packet: Packet
    inputs: Payload  # leaves of the graph
    hidden: Payload  # the stage's output, with the graph


class EndToEnd(Rule):
    """Follows another rule, except in some optimizer steps, which are plain backpropagation through all stages.

    Critics do not learn in these steps. Each takes two halves: forward as usual, then backward from the gradient that
    the next stage gives back.
    """

    returns = Returns(per_activation=True)

    def __init__(self, other: Rule, correction: CorrectionSettings) -> None:
        if other.returns:
            raise UsageError(
                f"`global_correction` needs a rule under which nothing comes back, not {type(other).__name__}; leave "
                "it out, or set `critic_target` to label",
                code="rule-needs-every-packet",
                key="global_correction",
            )
        self.parts = other.parts
        self.optimizers = other.optimizers
        self._other = other
        self._correction = correction
        self._half: _Half | None = None

    def step(self, packet: Packet, ends: Ends, lap: Lap) -> Done | None:
        """Train by the other rule, or run forward and leave the rest to `resume`."""
        if not self._covers(packet.number):
            return self._other.step(packet, ends, lap)
        self.parts.update.begin(packet)
        # Leaves, so that backward leaves in their `.grad` what the stage before waits for. The data need none.
        inputs = packet.payload
        if not self.parts.is_first:
            inputs = map_payload(as_leaf, inputs)
        # Clones: layers may work in place on what they are given, and autograd allows no leaf to be changed.
        given = inputs if self.parts.is_first else map_payload(torch.clone, inputs)
        hidden = self.parts.body.forward(given)
        refuse_sparse(hidden, self.parts.index, "global_correction")
        lap("forward")
        ends.outlet.send(replace(packet, payload=map_payload(torch.detach, hidden), rider=()))
        self.show(View(inputs, hidden, packet.target))
        lap("wait_out")
        self._half = _Half(packet, inputs, hidden)
        self.unfinished = True
        return None

    def resume(self, ends: Ends, lap: Lap) -> Done | None:
        """Run backward from the gradient for the stage's output, update, and give the stage before its gradient."""
        half = self._half
        assert half is not None, "only an unfinished packet is resumed"
        self._half = None
        self.unfinished = False
        loss = None
        if self.parts.is_last:
            loss = self._backward_from_loss(half)
        else:
            gradient = ends.outlet.returned(half.packet.number, differentiable(half.hidden))
            lap("wait_out")
            outputs, gradients = with_graph(half.hidden, gradient)
            torch.autograd.backward(outputs, gradients)  # not divided by `accumulate`: the last stage's loss was
        lap("backward")
        self.parts.update.count(half.packet)
        lap("step")
        # Clipping and the step have left these gradients alone: the inputs are no parameters.
        if not self.parts.is_first:
            ends.inlet.give_back(half.packet.number, [gradient_of(tensor) for tensor in differentiable(half.inputs)])
        return Done(half.packet, loss)

    def skip(self, packet: Packet, ends: Ends, lap: Lap) -> None:
        """Do what is due by the other rule."""
        self._other.skip(packet, ends, lap)

    def begin(self) -> None:
        """Forget a first half whose second one never came."""
        self._half = None
        self.unfinished = False
        self._other.begin()

    def settle(self, ends: Ends) -> None:
        """Settle the other rule; no end-to-end step is ever under way when a checkpoint is due."""
        self._other.settle(ends)

    def state(self) -> RuleState:
        """Return the state of the other rule."""
        return self._other.state()

    def load(self, state: Mapping[str, Any]) -> str | None:
        """Load the state of the other rule."""
        return self._other.load(state)

    def _covers(self, number: int) -> bool:
        """Return whether a training packet belongs to an end-to-end step; none does while critics warm up."""
        step = number // self.parts.update.accumulate
        return not self.parts.pace.warms_critic(step) and self._correction.covers(step)

    def _backward_from_loss(self, half: _Half) -> Tensor:
        body = self.parts.body
        with body.autocast:
            loss = body.loss(as_tuple(half.hidden)[0], half.packet.target)
        self.parts.update.backward(loss)
        return loss.detach()
