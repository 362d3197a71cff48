"""Counts what the stages of a transformer of a given size cost on a given device; measures nothing. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from decoupled_pp.commands.arguments import flag
from decoupled_pp.commands.plan.costs import StageCosts
from decoupled_pp.core.errors import UsageError

BYTES_PER_PARAMETER = 16
"""Mixed-precision Adam: 2 parameter, 2 gradient, 4 master copy, 8 moments (Rajbhandari et al. 2020, 1910.02054)."""

GRADIENT_BYTES = 2
"""Bytes of one parameter's gradient, as replicas exchange it."""

SAVED_BYTES_PER_TOKEN_AND_WIDTH = 34
"""Saved activations of a layer with flash attention, without recomputation (Korthikanti et al. 2022, 2205.05198)."""


@dataclass(frozen=True)
class Transformer:
    """A decoder and the devices that it is trained on."""

    layers: int = 32  # blocks
    width: int = 4096  # of the residual stream
    vocabulary: int = 32000
    sequence: int = 4096  # tokens per sample
    micro_batch: int = 1  # samples
    parameters: float = 0.0  # in all; 0 for 12 layers width^2 + 2 vocabulary width
    flops: float = 400e12  # operations per second that a device reaches in this work (not its peak)
    critic_share: float = 0.1  # compute and parameters of a critic, as a share of its stage's

    def __post_init__(self) -> None:
        """Raises UsageError for sizes that no transformer has."""
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("parameters", "critic_share") else 1
            if not least <= value < math.inf:
                raise UsageError(f"{flag(field.name)} {value:g} must be at least {least}", code="option-out-of-range")
        if self.block_parameters <= 0:
            raise UsageError(
                f"--parameters {self.parameters:g} are fewer than the 2 x {self.vocabulary} x {self.width} of the "
                "embedding and the head; give more, or a smaller --vocabulary or --width",
                code="option-out-of-range",
            )

    @property
    def total_parameters(self) -> float:
        """Number of parameters of the whole network."""
        return self.parameters or 12.0 * self.layers * self.width**2 + 2.0 * self.vocabulary * self.width

    @property
    def block_parameters(self) -> float:
        """Number of parameters of one block: an equal share of what embedding and head leave."""
        return (self.total_parameters - 2.0 * self.vocabulary * self.width) / self.layers

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch."""
        return self.sequence * self.micro_batch

    @property
    def matrix_seconds(self) -> float:
        """Seconds of all matrices' forward pass of a micro-batch: 2 operations per parameter and token."""
        weights = self.layers * self.block_parameters + self.vocabulary * self.width
        return 2.0 * weights * self.tokens / self.flops

    @property
    def attention_seconds(self) -> float:
        """Seconds of the forward pass of causal attention's two products: 2 sequence width per token and layer."""
        return 2.0 * self.layers * self.sequence * self.width * self.tokens / self.flops

    @property
    def seconds(self) -> float:
        """Seconds of forward and backward of a micro-batch on one device; backward takes twice as long as forward."""
        return 3 * (self.matrix_seconds + self.attention_seconds)

    def stages(self, count: int, *, critics: bool, step: float = 0.0) -> list[StageCosts]:
        """Returns the costs of `count` equal stages, as if the network could be cut anywhere.

        With `critics` all but the last have one, and send targets (8 bytes per token) along; an optimizer step takes
        `step` seconds.
        """
        matrices = self.matrix_seconds / count
        attention = self.attention_seconds / count
        forward = matrices + attention
        states = BYTES_PER_PARAMETER * self.total_parameters / count
        saved = SAVED_BYTES_PER_TOKEN_AND_WIDTH * self.tokens * self.width * self.layers / count
        boundary = 2 * self.tokens * self.width  # activations between two stages, 2 bytes per value

        def stage(critic_share: float) -> StageCosts:
            return StageCosts(
                forward=forward,
                input_gradient=matrices + 2 * attention,
                weight_gradient=matrices,
                step=step,
                memory=round(states * (1 + critic_share)),
                saved=round(saved),
                output=boundary + (8 * self.tokens if critics else 0),
                gradient=0 if critics else boundary,
                critic=critic_share * 3 * forward,
                critic_saved=round(critic_share * saved),
            )

        return [stage(self.critic_share if critics else 0.0)] * (count - 1) + [stage(0.0)]

    def assumptions(self) -> list[str]:
        """Returns the assumptions with their numbers, one line each."""
        return [
            f"{self.total_parameters / 1e9:.3g} billion parameters: {self.layers} blocks of "
            f"{self.block_parameters:.4g}, embedding and head of {self.vocabulary} x {self.width} each",
            f"a micro-batch is {self.micro_batch} x {self.sequence} tokens; a device reaches "
            f"{self.flops / 1e12:g} TFLOP/s whatever the size of its share (real ones lose speed on small shares)",
            "2 operations per parameter and token forward, 2 sequence width more per block for causal attention; "
            "backward twice forward; of it the weights' gradients take the matrices' forward time again",
            "stages are equal: the work, embedding and head included, is shared out evenly",
            f"a critic costs {self.critic_share:g} of its stage in time, parameters and saved activations, on all but "
            "the last stage; a full vocabulary head on few blocks costs more (vocabulary / (12 width blocks))",
            f"{BYTES_PER_PARAMETER} bytes of states per parameter, {SAVED_BYTES_PER_TOKEN_AND_WIDTH} bytes of "
            "saved activations per token, width and block (flash attention, no recomputation), 2 bytes per value on "
            "the links",
            "the optimizer step itself takes no time",
        ]
