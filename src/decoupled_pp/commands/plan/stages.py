"""What every stage of a decoupled cut costs: the rows of the table and of the picture. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from decoupled_pp.commands.plan.profile import Profile


@dataclass(frozen=True)
class CutStage:
    """A stage with its critic; seconds and bytes of one micro-batch.

    Attributes:
        layers: Names of its first and last layer.
        count: Number of layers.
        parameters: Bytes of its parameters and its critic's.
        forward: Seconds of its layers forward.
        backward: Seconds of its layers backward.
        critic: Seconds of its critic, forward and backward; 0 in the last stage.
        step: Seconds of the optimizer step of both.
        states: Bytes of parameters, gradients and optimizer state of both.
        activations: Bytes that autograd keeps for both.
    """

    layers: tuple[str, str]
    count: int
    parameters: int
    forward: float
    backward: float
    critic: float
    step: float
    states: int
    activations: int

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.forward + self.backward + self.critic + self.step


def cut_stages(profile: Profile, boundaries: Sequence[int], speeds: Sequence[float] = ()) -> list[CutStage]:
    """The stages of a cut.

    Args:
        profile: Of the network.
        boundaries: Index of the first layer of every stage, then the number of layers.
        speeds: Of the stages' devices, relative to the one that was measured; empty: all alike.
    """
    found = []
    for stage, (first, end) in enumerate(pairwise(boundaries)):
        speed = speeds[stage] if speeds else 1.0
        own = profile.layers[first:end]
        critic = profile.critics[end - 1] if end < len(profile.layers) else None
        all_of_it = [*own, critic] if critic is not None else list(own)
        found.append(
            CutStage(
                layers=(own[0].name, own[-1].name),
                count=len(own),
                parameters=sum(piece.parameter_bytes for piece in all_of_it),
                forward=sum(piece.forward for piece in own) / speed,
                backward=sum(piece.backward for piece in own) / speed,
                critic=critic.seconds / speed if critic is not None else 0.0,
                step=sum(piece.step for piece in all_of_it) / speed,
                states=sum(piece.memory for piece in all_of_it),
                activations=sum(piece.saved_beside for piece in all_of_it),
            )
        )
    return found
