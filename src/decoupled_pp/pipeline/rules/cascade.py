"""The cascade target: a critic learns to give the loss that the next stage has (Lee & Lee 2019; Lee, Hsieh & Lee 2022).

    stage k     F n   C n   B n   S n | critic learns from packet n - lag
    stage k+1          F n   C n  ...  +---- its losses, one float per sample ----> stage k, used at packet n + lag

With a lag above the link's capacity the losses are there when they are due: the credit that let packet n leave came
after them. So no forward step waits, and what is learnt depends on the lag alone, not on timing (law 3).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from decoupled_pp.core.packets import Payload

PerSample = Callable[[Tensor, Payload], Tensor]
"""(logits, target) -> the loss of every sample, (B,)."""


@dataclass
class Lesson:
    """A packet that a critic is still to learn from.

    Attributes:
        number: Of the packet.
        hidden: What the stage made of it (no graph).
        target: Its target.
        losses: The next stage's losses, (B,), if they have come already.
    """

    number: int
    hidden: Payload
    target: Payload
    losses: Tensor | None = None


class Cascade:
    """What teaches the critic of one stage.

    Attributes:
        optimizers: The critic's own.
        lessons: Packets to learn from, oldest first; at most `lag` of them.
    """

    def __init__(
        self,
        per_sample: PerSample,
        optimizers: list[Optimizer],
        *,
        lag: int,
        label_share: float,
        accumulate: int,
    ) -> None:
        """Start without lessons.

        Args:
            per_sample: The run's loss, sample by sample.
            optimizers: Over the critic's parameters.
            lag: Packets between a packet and what the critic learns from it.
            label_share: Share of the labels' own loss in what the critic lowers; 0 in the papers.
            accumulate: Lessons per step of the optimizers.
        """
        self.optimizers = optimizers
        self.lessons: deque[Lesson] = deque()
        self._per_sample, self._lag, self._share, self._accumulate = per_sample, lag, label_share, accumulate

    def remember(self, number: int, hidden: Payload, target: Payload) -> None:
        """Keep a packet for later."""
        self.lessons.append(Lesson(number, hidden, target))

    def due(self, number: int) -> Lesson | None:
        """The packet to learn from now that the stage is done with packet `number`, if there is one."""
        first = self.lessons[0] if self.lessons else None
        return first if first is not None and first.number <= number - self._lag else None

    def teach(self, run: Callable[[Payload], Tensor], losses: Tensor, autocast: AbstractContextManager[object]) -> None:
        """Lower (1 - s) mean_b |L_k,b - L_{k+1},b| + s mean_b L_k,b over the oldest lesson.

        Args:
            run: The critic, whose forward pass is done again.
            losses: L_{k+1}, (B,).
            autocast: In which it runs.

        Source: Lee, Hsieh & Lee 2022 (2102.01963), equations 5 and 7, for s = 0.
        """
        lesson = self.lessons.popleft()
        with autocast:
            ours = self._per_sample(run(lesson.hidden), lesson.target)
        taught = (1 - self._share) * (ours - losses.to(ours)).abs().mean() + self._share * ours.mean()
        (taught / self._accumulate).backward()
        if (lesson.number + 1) % self._accumulate == 0:
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
