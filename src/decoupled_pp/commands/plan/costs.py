"""Costs of the stages of a cut, from the costs of layers and critics. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from decoupled_pp.commands.plan.orders import SPLIT, Operation, rank_of
from decoupled_pp.commands.plan.profile import Piece, Profile


@dataclass(frozen=True)
class StageCosts:
    """Costs of one stage, in seconds and bytes of one micro-batch.

    Attributes:
        forward: Seconds of the layers' forward passes.
        input_gradient: Seconds of the backward pass to the stage's input.
        weight_gradient: Seconds that the whole backward pass takes beyond that.
        step: Seconds of the optimizer step, the critic's included.
        memory: Bytes of parameters, gradients, optimizer state and buffers, the critic's included.
        saved: Bytes that autograd keeps for the layers between forward and backward.
        output: Bytes that go to the next stage.
        gradient: Bytes that come back from it.
        critic: Seconds of the critic, forward and backward; 0 without one.
        critic_saved: Bytes that autograd keeps for the critic.
    """

    forward: float
    input_gradient: float
    weight_gradient: float
    step: float
    memory: int
    saved: int
    output: int = 0
    gradient: int = 0
    critic: float = 0.0
    critic_saved: int = 0

    @property
    def backward(self) -> float:
        """Seconds of the whole backward pass."""
        return self.input_gradient + self.weight_gradient

    def at_speed(self, speed: float) -> StageCosts:
        """Returns the costs on a device that is `speed` times as fast."""
        times = ("forward", "input_gradient", "weight_gradient", "step", "critic")
        return replace(self, **{name: getattr(self, name) / speed for name in times})


@dataclass(frozen=True)
class CutStage:
    """One stage of a decoupled cut, as a row of the table and of the picture.

    Attributes:
        layers: Names of its layers.
        parameter_bytes: Bytes of its parameters and its critic's.
        costs: Its costs.
    """

    layers: tuple[str, ...]
    parameter_bytes: int
    costs: StageCosts

    @property
    def span(self) -> str:
        """Names of the first and the last layer."""
        return self.layers[0] if len(self.layers) == 1 else f"{self.layers[0]}..{self.layers[-1]}"


def stage_costs(profile: Profile, boundaries: Sequence[int], *, critics: bool) -> list[StageCosts]:
    """Returns the costs of the stages of a cut.

    Args:
        profile: Costs of the network.
        boundaries: Index of the first layer of every stage, then the number of layers.
        critics: True if all stages but the last have a critic, and send targets along.
    """
    costs = []
    for first, end in pairwise(boundaries):
        layers = profile.layers[first:end]
        critic = _critic_after(profile, end) if critics else None
        owned = layers if critic is None else (*layers, critic)
        costs.append(
            StageCosts(
                forward=sum(layer.forward for layer in layers),
                input_gradient=sum(layer.input_gradient for layer in layers),
                weight_gradient=sum(layer.weight_gradient for layer in layers),
                step=sum(piece.step for piece in owned),
                memory=sum(piece.memory for piece in owned),
                # The first layer's input came over a link, so no layer before it keeps it for this stage.
                saved=layers[0].saved_bytes + sum(layer.saved_beside for layer in layers[1:]),
                output=layers[-1].output_bytes + (profile.target_bytes if critics else 0),
                gradient=0 if critics else layers[-1].gradient_bytes,
                critic=0.0 if critic is None else critic.seconds,
                critic_saved=0 if critic is None else critic.saved_beside,
            )
        )
    return costs


def cut_stages(profile: Profile, boundaries: Sequence[int], speeds: Sequence[float] = ()) -> list[CutStage]:
    """Returns the stages of a decoupled cut with their names.

    Args:
        profile: Costs of the network.
        boundaries: Index of the first layer of every stage, then the number of layers.
        speeds: Speeds of the stages' devices, relative to the one that was measured; empty: all alike.
    """
    stages = []
    costs = stage_costs(profile, boundaries, critics=True)
    for stage, (first, end) in enumerate(pairwise(boundaries)):
        layers = profile.layers[first:end]
        critic = _critic_after(profile, end)
        owned = layers if critic is None else (*layers, critic)
        stages.append(
            CutStage(
                layers=tuple(layer.name for layer in layers),
                parameter_bytes=sum(piece.parameter_bytes for piece in owned),
                costs=costs[stage].at_speed(speeds[stage]) if speeds else costs[stage],
            )
        )
    return stages


def _critic_after(profile: Profile, end: int) -> Piece | None:
    """Returns the critic of a stage that ends before layer `end`; the last stage has none."""
    return profile.critics[end - 1] if end < len(profile.layers) else None


def seconds_of(strategy: str, costs: Sequence[StageCosts], ranks: int) -> Callable[[Operation], float]:
    """Returns a function from an operation to its seconds.

    torch computes no gradient of the first stage's input: its split backward pass is all in W (torch 2.13, `stage.py`,
    `backward_one_chunk`).
    """

    def seconds(operation: Operation) -> float:
        kind, stage, _ = operation
        if kind == "S" and strategy != "decoupled":  # one step of a rank, with all its stages
            return sum(cost.step for s, cost in enumerate(costs) if rank_of(strategy, s, ranks) == stage)
        one = costs[stage]
        if strategy in SPLIT and stage == 0 and kind in "IW":
            return 0.0 if kind == "I" else one.backward
        return {
            "F": one.forward,
            "B": one.backward,
            "I": one.input_gradient,
            "W": one.weight_gradient,
            "C": one.critic,
            "S": one.step,
        }[kind]

    return seconds
