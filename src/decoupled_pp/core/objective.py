"""Defines the local objective: what a critic is given of a training packet, and what it may make of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from torch import Tensor, nn

from decoupled_pp.core.packets import Loss, Payload, first_tensor


@dataclass
class View:
    """One training packet, as the critic of a stage sees it.

    Attributes:
        inputs: The stage's input; it takes no gradient, unless the critic asks for one (`follows_input`).
        hidden: The stage's output, with the graph of its layers.
        target: The micro-batch's target.
        rider: Tensors that an earlier critic has sent along with the packet; an empty tuple if none.
        first: Output of the stage's first layer, for a critic that asks for it (`needs_first`).
        delta: Where an objective leaves its gradient for `hidden`, if its rider is to carry it.
    """

    inputs: Payload
    hidden: Payload
    target: Payload
    rider: Payload = ()
    first: Payload = ()
    delta: Payload = ()


class Judge:
    """Judges the output of a stage: a `Critic`, or what `judge_of` makes of some logits."""

    late: ClassVar[bool] = False
    follows_input: ClassVar[bool] = False
    needs_first: ClassVar[bool] = False
    exits: ClassVar[bool] = True

    def __call__(self, hidden: Payload, /) -> Tensor:
        """Return the logits."""
        raise NotImplementedError

    def objective(self, view: View, loss: Loss) -> Tensor:
        """Return the scalar that trunk and critic lower; by default the run's loss on the critic's logits.

        Args:
            view: The packet.
            loss: The run's loss, loss(logits, target) -> scalar mean.
        """
        return loss(self(view.hidden), view.target)

    def rider(self, view: View) -> Payload:
        """Return what travels to the next stage beside the stage's output, for its critic; counted as payload."""
        return ()


class Critic(nn.Module, Judge):
    """A critic that is more than logits and the run's loss; any other module that makes logits is a plain critic.

    Attributes:
        late: True if its rider exists only once `objective` has run: then the packet leaves after that.
        follows_input: True if `objective` differentiates with respect to `View.inputs`.
        needs_first: True if it needs `View.first`.
        exits: True if its logits are an exit of the network; else `forward` is never called for evaluation.
    """

    @abstractmethod
    def forward(self, hidden: Payload) -> Tensor:
        """Return logits shaped like the network's output: the prediction of the exit after this stage."""


class Unjudged(Critic):
    """Stands where a stage trains without a critic: there is nothing to learn, and no exit."""

    exits = False

    def forward(self, hidden: Payload) -> Tensor:
        """Raise: nothing asks for logits where there is no exit."""
        raise AssertionError("this stage has no exit")


class _LogitsJudge(Judge):
    def __init__(self, logits: Callable[[Payload], Tensor]) -> None:
        self._logits = logits

    def __call__(self, hidden: Payload, /) -> Tensor:
        return self._logits(hidden)


def judge_of(critic: nn.Module | None) -> Judge:
    """Return what judges a stage with this critic, so that all stages are judged in one way.

    Args:
        critic: A `Critic`; any other module that makes logits; or None for a stage whose output is the logits.
    """
    if isinstance(critic, Critic):
        return critic
    return _LogitsJudge(first_tensor if critic is None else critic)


def local_loss(critic: nn.Module | None, view: View, loss: Loss) -> Tensor:
    """Return the loss that a stage with this critic lowers on one packet."""
    return judge_of(critic).objective(view, loss)


def has_exit(critic: nn.Module | None) -> bool:
    """Return whether there is an exit after a stage with this critic, which is so if the critic makes logits."""
    return judge_of(critic).exits


@dataclass(frozen=True)
class CriticContext:
    """The information that a critic builder may look at.

    Attributes:
        stage: Index of the stage the critic judges.
        stages: Number of stages; only stages before the last have a critic.
        boundary: Index of the first layer above the stage.
        hidden: A sample of the stage's output (no gradient).
        output: A sample of the whole network's output (logits; no gradient).
        layers: All layers of the network; builders may deep-copy layers from `boundary` on, never use them directly.
        hiddens: For every layer above, a sample of its input: `hiddens[j]` goes into `layers[boundary + j]`
            (so `hiddens[0]` is `hidden`).
        sample: A sample of the network's own input.
        class_dim: Dimension of the classes in the output, as the run's loss says it; None: see `classes_in`.
    """

    stage: int
    stages: int
    boundary: int
    hidden: Payload
    output: Tensor
    layers: tuple[nn.Module, ...]
    hiddens: tuple[Payload, ...] = ()
    sample: Payload = ()
    class_dim: int | None = None


CriticBuilder: TypeAlias = Callable[[CriticContext], nn.Module]
"""Builds the critic of one stage: a module from the stage's output to logits shaped like the network's output."""
