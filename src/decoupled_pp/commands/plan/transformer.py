"""What the stages of a transformer of a given size cost on a given device: counted, not measured. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from decoupled_pp.commands.plan.predict import StageCosts

BYTES_PER_PARAMETER = 16
"""Mixed-precision Adam: 2 parameter, 2 gradient, 4 master copy, 8 moments (Rajbhandari et al. 2020, 1910.02054)."""

GRADIENT_BYTES = 2
"""Of one parameter, as replicas exchange it."""

SAVED_BYTES_PER_TOKEN_AND_WIDTH = 34
"""A layer's saved activations with flash attention, without recomputation (Korthikanti et al. 2022, 2205.05198)."""


@dataclass(frozen=True)
class Transformer:
    """A decoder and the devices that it is trained on.

    Attributes:
        layers: Transformer blocks.
        width: Of the residual stream.
        vocabulary: Tokens in the vocabulary.
        sequence: Tokens per sample.
        micro_batch: Samples per micro-batch.
        parameters: In all; 0 for 12 layers width^2 + 2 vocabulary width.
        flops: Floating-point operations per second that a device reaches in this work (not its peak).
        critic_share: Compute and parameters of a critic, as a share of its stage's.
    """

    layers: int = 32
    width: int = 4096
    vocabulary: int = 32000
    sequence: int = 4096
    micro_batch: int = 1
    parameters: float = 0.0
    flops: float = 400e12
    critic_share: float = 0.1

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that none has."""
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("parameters", "critic_share") else 1
            if not least <= value < math.inf:
                raise ValueError(f"{field.name} is {value:g}; it must be at least {least}")
        if self.block_parameters <= 0:
            raise ValueError(
                f"{self.parameters:g} parameters are fewer than the 2 x {self.vocabulary} x {self.width} of the "
                "embedding and the head; give more, or a smaller vocabulary or width"
            )

    @property
    def total_parameters(self) -> float:
        """Of the whole network."""
        return self.parameters or 12.0 * self.layers * self.width**2 + 2.0 * self.vocabulary * self.width

    @property
    def block_parameters(self) -> float:
        """Of one block: what embedding and head leave."""
        return (self.total_parameters - 2.0 * self.vocabulary * self.width) / self.layers

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch."""
        return self.sequence * self.micro_batch

    @property
    def matrix_seconds(self) -> float:
        """Forward of all matrices for a micro-batch on one device: 2 operations per parameter and token."""
        weights = self.layers * self.block_parameters + self.vocabulary * self.width
        return 2.0 * weights * self.tokens / self.flops

    @property
    def attention_seconds(self) -> float:
        """Forward of causal attention's two products: 2 sequence width per token and layer."""
        return 2.0 * self.layers * self.sequence * self.width * self.tokens / self.flops

    @property
    def seconds(self) -> float:
        """Forward and backward of a micro-batch on one device; backward is twice forward."""
        return 3 * (self.matrix_seconds + self.attention_seconds)

    @property
    def boundary_bytes(self) -> int:
        """Activations of a micro-batch between two stages, two bytes per value."""
        return 2 * self.tokens * self.width

    def stages(self, count: int, *, critics: bool, step: float = 0.0) -> list[StageCosts]:
        """`count` equal stages: blocks, embedding and head are shared out evenly, as if they could be cut anywhere.

        Args:
            count: Number of stages.
            critics: Whether all but the last have a critic, and send targets (8 bytes per token) along.
            step: Seconds at the end of an optimizer step.
        """
        matrices, attention = self.matrix_seconds / count, self.attention_seconds / count
        forward = matrices + attention
        states = BYTES_PER_PARAMETER * self.total_parameters / count
        saved = SAVED_BYTES_PER_TOKEN_AND_WIDTH * self.tokens * self.width * self.layers / count
        share = [self.critic_share if critics and stage < count - 1 else 0.0 for stage in range(count)]
        return [
            StageCosts(
                forward=forward,
                input_gradient=matrices + 2 * attention,
                weight_gradient=matrices,
                step=step,
                memory=round(states * (1 + own)),
                saved=round(saved),
                output=self.boundary_bytes + (8 * self.tokens if critics else 0),
                gradient=0 if critics else self.boundary_bytes,
                critic=own * 3 * forward,
                critic_saved=round(own * saved),
            )
            for own in share
        ]

    def assumptions(self) -> list[str]:
        """What is assumed, one line each, with its numbers."""
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
