"""Costs of a network, layer by layer and critic by critic (JSON on disk), and of the stages of a cut. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from decoupled_pp.commands.plan.orders import SPLIT, Operation, rank_of
from decoupled_pp.core.errors import UsageError

FORMAT = "decoupled_pp profile 1"


@dataclass(frozen=True)
class Piece:
    """Costs of a layer, or of a critic with its loss, in seconds and bytes of one micro-batch."""

    name: str  # of the layer, or "critic"
    forward: float
    input_gradient: float
    weight_gradient: float  # what the whole backward pass takes beyond the input's gradient
    step: float = 0.0
    parameter_bytes: int = 0  # trainable ones; their gradients take as much again
    state_bytes: int = 0
    saved_bytes: int = 0  # what autograd keeps between forward and backward
    saved_beside: int = 0  # of those, what the layer before does not keep already as its output
    output_bytes: int = 0
    gradient_bytes: int = 0  # what backpropagation sends back for the output: its floating-point tensors
    frozen_bytes: int = 0  # other parameters, and buffers

    def __post_init__(self) -> None:
        """Raises ValueError for a negative or infinite cost."""
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{self.name}: {field.name} is {value!r}; it must be a number of at least 0")

    @property
    def backward(self) -> float:
        """Seconds of the whole backward pass."""
        return self.input_gradient + self.weight_gradient

    @property
    def seconds(self) -> float:
        """Seconds of the forward and backward passes."""
        return self.forward + self.backward

    @property
    def memory(self) -> int:
        """Bytes of parameters, gradients, optimizer state and buffers."""
        return 2 * self.parameter_bytes + self.state_bytes + self.frozen_bytes


@dataclass(frozen=True)
class Profile:
    """Costs of a network."""

    source: str  # configuration, device and day of the measurement
    samples: int  # in a micro-batch
    target_bytes: int  # of a micro-batch's targets, which ride along with a decoupled packet
    layers: tuple[Piece, ...]  # the last one with the network's loss
    critics: tuple[Piece | None, ...]  # after every layer but the last; None where none can be built
    stages: int  # that the critics were built for: some depend on it

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that contradict each other."""
        if self.samples < 1 or not self.layers or len(self.critics) != len(self.layers) - 1:
            raise ValueError(
                f"it needs samples (has {self.samples}), layers (has {len(self.layers)}) and one critic or null "
                f"after every layer but the last (has {len(self.critics)})"
            )

    def write(self) -> str:
        """Returns the profile as JSON."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"


def read_profile(text: str | bytes, source: str = "the text") -> Profile:
    """Reads what `Profile.write` wrote, or raises UsageError, which names `source`."""
    try:
        raw: Any = json.loads(text)
        if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
            raise ValueError(f"it has no format {FORMAT!r}")
        layers = tuple(Piece(**layer) for layer in raw.pop("layers"))
        critics = tuple(None if critic is None else Piece(**critic) for critic in raw.pop("critics"))
        return Profile(layers=layers, critics=critics, **raw)
    except (TypeError, KeyError, ValueError) as error:  # errors of JSON and of its encoding are ValueErrors
        raise UsageError(
            f"{source} is not a profile: {error}; write one with --save-profile", code="profile-unreadable"
        ) from error


@dataclass(frozen=True)
class StageCosts:
    """Costs of one stage, in seconds and bytes of one micro-batch; those of its critic are in `step` and `memory`."""

    forward: float
    input_gradient: float
    weight_gradient: float
    step: float
    memory: int  # parameters, gradients, optimizer state and buffers
    saved: int  # what autograd keeps for the layers between forward and backward
    output: int = 0  # to the next stage
    gradient: int = 0  # back from it
    critic: float = 0.0  # forward and backward
    critic_saved: int = 0
    parameter_bytes: int = 0  # the critic's included
    span: str = ""  # names of the first and the last layer
    depth: int = 0  # number of layers

    @property
    def backward(self) -> float:
        """Seconds of the whole backward pass."""
        return self.input_gradient + self.weight_gradient

    def at_speed(self, speed: float) -> StageCosts:
        """Returns the costs on a device that is `speed` times as fast."""
        times = ("forward", "input_gradient", "weight_gradient", "step", "critic")
        return replace(self, **{name: getattr(self, name) / speed for name in times})


def stage_costs(
    profile: Profile, boundaries: Sequence[int], *, critics: bool, speeds: Sequence[float] = ()
) -> list[StageCosts]:
    """Returns the costs of the stages of a cut, on devices of these speeds relative to the measured one.

    With `critics` all stages but the last have one, and send targets along.
    """
    costs = []
    for first, end in pairwise(boundaries):
        layers = profile.layers[first:end]
        critic = profile.critics[end - 1] if critics and end < len(profile.layers) else None
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
                parameter_bytes=sum(piece.parameter_bytes for piece in owned),
                span=layers[0].name if len(layers) == 1 else f"{layers[0].name}..{layers[-1].name}",
                depth=len(layers),
            )
        )
    return [one.at_speed(speed) for one, speed in zip(costs, speeds, strict=True)] if speeds else costs


def seconds_of(strategy: str, costs: Sequence[StageCosts], ranks: int) -> Callable[[Operation], float]:
    """Returns a function from an operation to its seconds."""

    def seconds(operation: Operation) -> float:
        kind, stage, _ = operation
        if kind == "S" and strategy != "decoupled":  # one step of a rank, with all its stages
            return sum(cost.step for s, cost in enumerate(costs) if rank_of(strategy, s, ranks) == stage)
        one = costs[stage]
        # torch computes no gradient of the first stage's input: its split backward pass is all in W
        # (torch 2.13, `stage.py`, `backward_one_chunk`).
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
