"""Runs the layers of a stage and its critic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from decoupled_pp.core.device import RandomStream, kept_gradients, kept_modes
from decoupled_pp.core.objective import Critic, View, judge_of
from decoupled_pp.core.packets import Loss, Packet, Payload, check_payload, map_payload, takes_gradient
from decoupled_pp.pipeline.compiled import compiled
from decoupled_pp.pipeline.losses import find_loss
from decoupled_pp.pipeline.recompute import checkpointed
from decoupled_pp.settings.run import StageSettings

_NOTHING = nullcontext()


class Body:
    """The layers of a stage and its critic: precision, recomputation, compilation, and a random stream of its own.

    Attributes:
        trunk: The layers, on `device` already.
        critic: From the trunk's output to logits; None in a last stage whose output is the logits.
        judge: The critic as a `Judge`, also where there is none.
        loss: The run's loss.
        held_out_loss: The loss of held-out scores, mostly the same.
        device: Where the stage computes.
        random: The stage's random stream.
    """

    def __init__(
        self,
        index: int,
        trunk: nn.Module,
        critic: nn.Module | None,
        loss: Loss,
        *,
        device: torch.device,
        seed: int,
        training: StageSettings,
        held_out_loss: Loss | None = None,
    ) -> None:
        self.trunk = trunk
        self.critic = critic
        self.judge = judge_of(critic)
        self.loss = find_loss(loss)
        self.held_out_loss = self.loss if held_out_loss is None else find_loss(held_out_loss)
        self.device = device
        # It goes on alone, whoever else draws random numbers in this process: timing never changes the result (law 3).
        self.random = RandomStream(seed, device)
        self._index = index
        self._seed = seed
        # Recomputation goes inside of what is compiled, so that the compiler plans it (see `recompute`).
        self._run_trunk: Callable[[Payload], Payload] = trunk
        if training.checkpoint_activations:
            self._run_trunk = checkpointed(trunk)
        self._run_critic: Callable[[Payload], Tensor] = self.judge
        self._run_objective: Callable[[View], Tensor] = self._objective
        if training.compile:
            self._run_trunk = compiled(self._run_trunk, f"trunk {index}")
            self._compile_critic(index)
        self.autocast: AbstractContextManager[object] = _NOTHING
        if training.precision == "bf16":
            self.autocast = torch.autocast(device.type, dtype=torch.bfloat16)

    @property
    def modules(self) -> list[nn.Module]:
        """The trunk, and the critic if there is one."""
        return [self.trunk] if self.critic is None else [self.trunk, self.critic]

    def forward(self, payload: Payload) -> Payload:
        """Return the output of the layers for a payload; UsageError if it cannot travel."""
        with self.autocast:
            return check_payload(self._run_trunk(payload), f"stage {self._index} returned")

    def view(self, packet: Packet) -> View:
        """Run the layers on a training packet. Return the view of it that the critic gets, with the graph."""
        inputs = packet.payload
        if self.judge.follows_input:
            # Leaves: the critic differentiates with respect to them, and no gradient goes on to the stage before.
            inputs = map_payload(as_leaf, inputs)
        given = inputs
        if self.judge.follows_input or isinstance(self.critic, Critic):
            given = map_payload(torch.clone, inputs)  # a layer may work in place on what the critic is to see
        if not self.judge.needs_first:
            return View(inputs, self.forward(given), packet.target, packet.rider)
        first: list[Payload] = []
        # Detached: the critic is to use this output, not to train the first layer past all others.
        hook = next(self.trunk.children()).register_forward_hook(
            lambda _module, _inputs, output: first.append(map_payload(lambda tensor: tensor.detach().clone(), output))
        )
        with hook:
            hidden = self.forward(given)
        return View(inputs, hidden, packet.target, packet.rider, *first)

    def local_loss(self, view: View) -> Tensor:
        """Return the scalar that the stage and its critic lower on one packet."""
        # Under autocast the loss too: torch computes cross-entropy in fp32 there, and would take bf16 logits outside.
        with self.autocast:
            return self._run_objective(view)

    def logits(self, hidden: Payload) -> Tensor:
        """Return the critic's logits for the stage's output, shaped like the network's output."""
        with self.autocast:
            return self._run_critic(hidden)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Compute in evaluation mode, without gradients; then every submodule goes back to its own mode."""
        everything = nn.ModuleList(self.modules)
        with kept_modes(everything), kept_gradients(everything), torch.no_grad():
            for module in self.modules:
                module.eval()
            yield

    def random_of_evaluation(self) -> RandomStream:
        """Return a stream that is the same in every evaluation, and no part of training."""
        return RandomStream(self._seed, self.device)

    def _compile_critic(self, index: int) -> None:
        """Compile a plain critic without the run's loss, which may be the user's; a `Critic` with its objective."""
        if self.critic is None:
            return
        self._run_critic = compiled(self._run_critic, f"critic {index}")
        if isinstance(self.critic, Critic):
            self._run_objective = compiled(self._objective, f"objective {index}")
        else:
            self._run_objective = lambda view: self.loss(self._run_critic(view.hidden), view.target)

    def _objective(self, view: View) -> Tensor:
        return self.judge.objective(view, self.loss)


def as_leaf(tensor: Tensor) -> Tensor:
    """Return a tensor as a leaf that takes a gradient; one that cannot take any (token ids, masks) as it is."""
    return tensor.detach().requires_grad_() if takes_gradient(tensor) else tensor
