"""Costs of a network, layer by layer and critic by critic: the planner's input, as JSON on disk. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from decoupled_pp.core.errors import UsageError

FORMAT = "decoupled_pp profile 1"


@dataclass(frozen=True)
class Piece:
    """Costs of a layer, or of a critic with its loss, in seconds and bytes of one micro-batch.

    Attributes:
        name: Name of the layer, or "critic".
        forward: Seconds of its forward pass.
        input_gradient: Seconds of the backward pass to its input.
        weight_gradient: Seconds that the whole backward pass takes beyond that.
        step: Seconds of its optimizer step.
        parameter_bytes: Trainable parameters; their gradients take as much again.
        state_bytes: Optimizer state of the trainable parameters.
        saved_bytes: Saved activations, which autograd keeps between forward and backward.
        saved_beside: Saved bytes that are not already counted for the layer before (its output is this one's input).
        output_bytes: Output, which goes to the next layer.
        gradient_bytes: Gradient that comes back for it in backpropagation (its floating-point tensors).
        frozen_bytes: Other parameters, and buffers.
    """

    name: str
    forward: float
    input_gradient: float
    weight_gradient: float
    step: float = 0.0
    parameter_bytes: int = 0
    state_bytes: int = 0
    saved_bytes: int = 0
    saved_beside: int = 0
    output_bytes: int = 0
    gradient_bytes: int = 0
    frozen_bytes: int = 0

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
    """Costs of a network.

    Attributes:
        source: Configuration, device and time of the measurement.
        samples: Samples in a micro-batch.
        target_bytes: Bytes of a micro-batch's targets, which ride along with a decoupled packet.
        layers: The layers in order; the last one with the network's loss.
        critics: The critic after every layer but the last; None where none can be built.
        stages: Number of stages that the critics were built for (some depend on it).
    """

    source: str
    samples: int
    target_bytes: int
    layers: tuple[Piece, ...]
    critics: tuple[Piece | None, ...]
    stages: int

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


def read_profile(text: str, source: str = "the text") -> Profile:
    """Reads what `Profile.write` wrote.

    Args:
        text: The JSON.
        source: Where it is from, for errors.

    Raises:
        UsageError: It is no profile.
    """
    try:
        raw: Any = json.loads(text)
        if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
            raise ValueError(f"it has no format {FORMAT!r}")
        layers = tuple(Piece(**layer) for layer in raw.pop("layers"))
        critics = tuple(None if critic is None else Piece(**critic) for critic in raw.pop("critics"))
        return Profile(layers=layers, critics=critics, **raw)
    except (TypeError, KeyError, ValueError) as error:  # JSON errors are ValueErrors
        raise UsageError(
            f"{source} is not a profile: {error}; write one with --save-profile", code="profile-unreadable"
        ) from error
