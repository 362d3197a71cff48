"""Implements the rule of decoupled training: a stage lowers its own critic's loss, at once.

packet n in ---> forward ---> critic forward + backward ---> backward ---> optimizer step
                    |
                    +-------> packet n out (detached; the next stage starts on it at once)
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from decoupled_pp.core.channels import Ends
from decoupled_pp.core.objective import View
from decoupled_pp.core.packets import Packet, as_tuple
from decoupled_pp.pipeline.rules.rule import Done, Lap, Rule


class Local(Rule):
    """Forward, send, local loss, backward, optimizer step. Nothing comes back, so no step waits for a later stage."""

    def step(self, packet: Packet, ends: Ends, lap: Lap) -> Done:
        """Train on one packet; its output is sent as soon as it exists."""
        body = self.parts.body
        self.parts.update.begin(packet)
        view = body.view(packet)
        lap("forward")
        if not body.judge.late:
            self.pass_on(packet, view, ends)
            lap("wait_out")
        loss = self.judge(view)
        # A late rider exists only now: the next stage waits for the critic, which is the price of such critics.
        if body.judge.late:
            lap("critic")
            self.pass_on(packet, view, ends)
            lap("wait_out")
        # Only now, with the output on its way: the next stage does not wait for what is done here.
        self.show(view)
        self.keep(packet, view)
        if self.parts.pace.has_begun(self.parts.update.steps):
            self.learn(loss, view, lap)
        lap("backward")
        self.parts.update.count(packet)  # without gradients, a step leaves everything as it is
        lap("step")
        return Done(packet, loss.detach())  # detached: the meter keeps it for a while, and would keep its graph

    def judge(self, view: View) -> Tensor:
        """Return the local loss of a packet."""
        return self.parts.body.local_loss(view)

    def keep(self, packet: Packet, view: View) -> None:
        """Keep what is needed of a packet later: nothing here."""

    def learn(self, loss: Tensor, view: View, lap: Lap) -> None:
        """Add the gradients of the local loss to the critic's and then to the layers' own."""
        # One backward pass goes through both. It reaches the stage's output when it is done with the critic, whose
        # activations are free by then; a hook there ends the phase `critic`.
        critic_is_done = _Once(lambda: lap("critic"))
        learners = self.learners()
        if loss.requires_grad and learners != []:
            for tensor in as_tuple(view.hidden):
                if tensor.grad_fn is not None:
                    tensor.register_hook(critic_is_done)
            self.parts.update.backward(loss, learners)
        critic_is_done()  # if no gradient came to the stage's output, all of the pass was the critic's

    def learners(self) -> list[nn.Parameter] | None:
        """Return the parameters that learn from the local loss now; None means all that it depends on."""
        critic = self.parts.body.critic
        if critic is None or not self.parts.pace.warms_critic(self.parts.update.steps):
            return None
        return [p for p in critic.parameters() if p.requires_grad]


class _Once:
    """A gradient hook that calls a function the first time it is called: an output may be several tensors."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then: Callable[[], None] | None = then

    def __call__(self, _: Tensor | None = None) -> None:
        if self._then is not None:
            self._then()
            self._then = None
