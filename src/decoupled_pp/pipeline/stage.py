"""Joins the parts of one stage, which trains on packets and scores its exit; it knows neither rank nor links."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from decoupled_pp.core.channels import Ends
from decoupled_pp.core.gradients import WithoutGradients
from decoupled_pp.core.module_state import KeptState
from decoupled_pp.core.packets import Packet
from decoupled_pp.pipeline.body import Body
from decoupled_pp.pipeline.optimizer_state import carry_over, group_entries
from decoupled_pp.pipeline.probes import ActivationProbe, Probe
from decoupled_pp.pipeline.rules.rule import Done, Lap, Rule
from decoupled_pp.pipeline.score import ExitScore
from decoupled_pp.pipeline.updates.update import Update


class Stage:
    """A run of layers and its critic: `body` computes, `rule` says what happens with a packet, `update` steps."""

    def __init__(self, index: int, body: Body, update: Update, rule: Rule, probes: Sequence[Probe] = ()) -> None:
        self.index = index
        self.body = body
        self.trunk = body.trunk
        self.update = update
        self.rule = rule
        self.probes = probes
        self._evaluate_layers = WithoutGradients()
        self._evaluate_critic = WithoutGradients()
        self.take_optimizers(update.optimizers)
        self._kept: KeptState | None = None  # during an evaluation: what it may change and training goes on with
        self._begin_evaluation()

    def take_optimizers(self, optimizers: list[Optimizer]) -> None:
        """Train by these optimizers from now on; they go on from the state of those before them."""
        before = self.update.optimizers
        self.update.optimizers = optimizers
        # A copy: optimizers that adapt (schedule-free, Prodigy) write state into their own groups; checkpoints compare.
        self.first_groups = group_entries(self.all_optimizers)
        if optimizers is not before:
            carry_over(before, optimizers)

    def train(self, packet: Packet, ends: Ends, lap: Lap) -> Done | None:
        """Train on one packet; return None if `resume` is to finish it."""
        self._end_evaluation()  # of a session that failed in one
        self.update.show_weights_to_train()
        with ExitStack() as stack:
            stack.enter_context(self.body.random)  # around the update too: an optimizer may draw random numbers
            for probe in self.probes:
                stack.enter_context(probe.watching())
            return self.rule.step(packet, ends, lap) if packet.weight else self._pass_on(packet, ends, lap)

    def _pass_on(self, packet: Packet, ends: Ends, lap: Lap) -> Done:
        """Hand a packet on in which nothing counts: no critic runs, nothing is learnt from it, whatever the rule."""
        if packet.samples:
            # As in plain PyTorch, the layers see it: batch statistics move.
            self.rule.pass_on(packet, self.body.view(packet), ends)
        else:
            ends.outlet.send(packet)  # few layers run on no sample
        lap("forward")
        self.rule.skip(packet, ends, lap)
        self.update.count(packet)
        lap("step")
        return Done(packet, None)

    def begin(self) -> None:
        """Forget what a session that failed has left unfinished; called before a session begins."""
        self.rule.begin()
        self.update.forget()

    def resume(self, ends: Ends, lap: Lap) -> Done | None:
        """Finish the packet that `train` left unfinished, once the next stage has done its part."""
        with self.body.random:  # again: between the halves, other stages of this process have drawn numbers
            return self.rule.resume(ends, lap)

    def evaluate(self, packet: Packet, send: Callable[[Packet], None]) -> None:
        """Score this exit on one held-out packet and pass it on; changes nothing that trains."""
        if not packet.weight and not packet.samples:
            send(packet)
            return
        if self._kept is None:
            self._kept = KeptState(*self.body.modules)
            self.update.show_weights_to_evaluate()
        # A random stream apart: training must draw the same numbers however often it is interrupted to evaluate.
        with self.body.evaluating(), self._evaluation_random:
            hidden = self._evaluate_layers(self.body.forward, packet.payload)
            send(replace(packet, payload=hidden))  # before the critic runs, so that the next stage need not wait for it
            with self.body.autocast:
                for probe in self.probes:
                    probe.evaluated(hidden, packet.target)
            if self.body.judge.exits:
                logits = self._evaluate_critic(self.body.logits, hidden)
                with self.body.autocast:
                    self._score.add(logits, packet.target, packet.weight)

    def finish_evaluation(self) -> tuple[float, float | None] | None:
        """Return held-out loss and accuracy since the last call; None if the critic makes no logits."""
        score = self._score.result() if self.body.judge.exits else None
        self._end_evaluation()
        self._begin_evaluation()
        if score is not None:
            self.update.hear(score[0])
        return score

    def end(self) -> None:
        """Leave the weights that a user is to see."""
        self.update.show_weights_to_evaluate(last=True)

    def probe_results(self) -> dict[str, Any]:
        """Return the findings of all probes in the evaluation that ends now."""
        found: dict[str, Any] = {}
        for probe in self.probes:
            found |= probe.results()
        return found

    @property
    def critic(self) -> nn.Module | None:
        """The critic, if there is one."""
        return self.body.critic

    @property
    def saved_activation_bytes_peak(self) -> int | None:
        """Most bytes that the first packet with a backward pass kept for it; None before any packet."""
        return next((probe.peak for probe in self.probes if isinstance(probe, ActivationProbe)), None)

    @property
    def all_optimizers(self) -> list[Optimizer]:
        """The optimizers of the stage, and those of its rule."""
        return [*self.update.optimizers, *self.rule.optimizers]

    @property
    def updates(self) -> int:
        """Optimizer steps done."""
        return self.update.steps

    @property
    def samples(self) -> int:
        """Training samples done."""
        return self.update.samples

    @property
    def learning_rate(self) -> float:
        """Present learning rate, 0 if nothing trains."""
        return self.update.learning_rate

    def named_parameters(self, critic_name: str) -> dict[str, nn.Parameter]:
        """Return all parameters by their names in a checkpoint: `model.<name>`, `critic.<critic_name>.<name>`."""
        named = {f"model.{name}": p for name, p in self.trunk.named_parameters()}
        if self.critic is not None:
            named |= {f"critic.{critic_name}.{name}": p for name, p in self.critic.named_parameters()}
        return named

    def _end_evaluation(self) -> None:
        """Bring back what training goes on with."""
        if self._kept is not None:
            self._kept.restore()
            self._kept = None

    def _begin_evaluation(self) -> None:
        self._score = ExitScore(self.body.held_out_loss)
        self._evaluation_random = self.body.random_of_evaluation()
