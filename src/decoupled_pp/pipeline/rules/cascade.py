"""Lets a critic learn to give the loss that the next stage has (Lee & Lee 2019; Lee, Hsieh & Lee 2022).

    stage k     F n   C n   B n   S n | critic learns from packet n - lag
    stage k+1          F n   C n  ...  +---- its losses, one float per sample ----> stage k, used at packet n + lag

With a lag above the link's capacity the losses are there when they are due: the credit that let packet n leave came
after them. So no forward step waits, and what is learnt depends on the lag alone, not on timing (law 3).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.channels import Ends, Returns
from decoupled_pp.core.criterion import Criterion
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import Critic, View
from decoupled_pp.core.packets import Packet, Payload, first_tensor, map_payload
from decoupled_pp.core.structures import form_of, of_form
from decoupled_pp.pipeline.optim import build_optimizers, make_gradients_dense
from decoupled_pp.pipeline.rules.local import Local
from decoupled_pp.pipeline.rules.rule import Done, Lap, RuleParts, RuleState
from decoupled_pp.settings.rules import CascadeTarget, RuleSettings
from decoupled_pp.settings.run import OptimizerSettings


@dataclass
class Lesson:
    """A packet that a critic is still to learn from."""

    number: int
    hidden: Payload  # the stage's output for it, without a graph
    target: Payload
    losses: Tensor | None = None  # the next stage's, (B,) on the CPU, once they have come


class Cascade(Local):
    """A stage lowers what its critic says; the critic learns the next stage's losses, `lag` packets later."""

    returns = Returns(per_sample=True)
    owns_critic = True

    def __init__(self, parts: RuleParts, settings: RuleSettings) -> None:
        super().__init__(parts, settings)
        assert isinstance(settings, CascadeTarget), "the table of rules gives each rule its own section"
        self._lag = settings.lag
        self._share = settings.share_of_labels
        self._criterion = _by_sample(parts.body.loss)
        self._losses: Tensor | None = None  # of the last packet's samples, (B,)
        self.lessons: deque[Lesson] = deque()  # oldest first, at most `lag` of them
        if parts.body.critic is not None:
            self.optimizers = _critic_optimizers(parts.body.critic, parts.index, settings)

    def step(self, packet: Packet, ends: Ends, lap: Lap) -> Done:
        """Train on one packet, give its losses to the stage before, and learn from what the stage after gave."""
        done = super().step(packet, ends, lap)
        if self._losses is not None:
            ends.inlet.give_back(packet.number, [self._losses])
        self.skip(packet, ends, lap)
        return done

    def skip(self, packet: Packet, ends: Ends, lap: Lap) -> None:
        """Learn what is due at this packet, from whichever packets counted."""
        due = self._due(packet.number - self._lag)
        if due:
            self._teach(due, ends)
            lap("critic")

    def begin(self) -> None:
        """Forget lessons whose losses never came: they were on the links of a session that failed."""
        self.lessons = deque(lesson for lesson in self.lessons if lesson.losses is not None)

    def settle(self, ends: Ends) -> None:
        """Take the losses that are under way."""
        for lesson in self.lessons:
            self._complete(lesson, ends)

    def state(self) -> RuleState:
        """Return the lessons."""
        # `lesson.<packet>.<part>` is the form of the part (`form_of`); `lesson.<packet>.<part>.<i>` are its tensors.
        state: RuleState = {}
        for lesson in self.lessons:
            parts = {"hidden": lesson.hidden, "target": lesson.target, "losses": lesson.losses}
            for name, payload in parts.items():
                assert payload is not None, "lessons are complete before they are saved"
                key = f"lesson.{lesson.number}.{name}"
                state[key], tensors = form_of(payload)
                state |= {f"{key}.{i}": tensor for i, tensor in enumerate(tensors)}
        return state

    def load(self, state: Mapping[str, Any]) -> str | None:
        """Go on with these lessons."""
        self.lessons = deque(self._lessons_in(state))
        if self.lessons or self.parts.body.critic is None:
            return None
        # Lessons are the next stage's losses, so they hold for the cut that they were made with.
        lost = "the checkpoint has no losses of the next stage for this cut"
        return f"{lost}; the critic goes on learning some packets later"

    def judge(self, view: View) -> Tensor:
        """Return the loss of the critic's logits, and keep it sample by sample for the stage before."""
        body = self.parts.body
        logits = body.logits(view.hidden)
        with body.autocast:
            if not self.parts.is_first:
                with torch.no_grad():  # the stage before learns from the numbers, not through them
                    self._losses = self._criterion.per_sample(logits, view.target)
            return body.loss(logits, view.target)

    def keep(self, packet: Packet, view: View) -> None:
        """Keep a packet that the critic is to learn from later."""
        if self.optimizers:
            self.lessons.append(Lesson(packet.number, map_payload(torch.detach, view.hidden), packet.target))

    def learners(self) -> list[nn.Parameter] | None:
        """Return the layers' parameters: the critic learns from something else."""
        if not self.optimizers:
            return super().learners()
        if self.parts.pace.warms_critic(self.parts.update.steps):
            return []
        return [p for p in self.parts.body.trunk.parameters() if p.requires_grad]

    def _complete(self, lesson: Lesson, ends: Ends) -> Tensor:
        if lesson.losses is None:
            (lesson.losses,) = ends.outlet.returned(lesson.number)
        return lesson.losses

    def _due(self, until: int) -> list[Lesson]:
        """Take the lessons of the next optimizer step, once the last packet of that step is `until` or before it."""
        # By numbers alone, whenever the losses came: what is learnt must not depend on timing. A whole step at a time:
        # so no gradient is under way when a checkpoint is written. A packet in which nothing counts is no lesson.
        accumulate = self.parts.update.accumulate
        step = self.lessons[0].number // accumulate if self.lessons else 0
        if (step + 1) * accumulate - 1 > until:
            return []
        return [self.lessons.popleft() for _ in range(sum(one.number // accumulate == step for one in self.lessons))]

    def _teach(self, lessons: Sequence[Lesson], ends: Ends) -> None:
        """Lower (1 - s) mean_b |L_k,b - L_{k+1},b| + s mean_b L_k,b; b are the samples that count of all the lessons.

        L_{k+1} are the lessons' losses. Source: Lee, Hsieh & Lee 2022 (2102.01963), equations 5 and 7, for s = 0.
        """
        body = self.parts.body
        theirs = [self._complete(lesson, ends) for lesson in lessons]
        samples = sum(int(losses.isfinite().sum()) for losses in theirs)
        for lesson, losses in zip(lessons, theirs, strict=True):
            logits = body.logits(lesson.hidden)
            with body.autocast:
                ours = self._criterion.per_sample(logits, lesson.target)
            # NaN marks a sample in which nothing counts.
            ours = torch.where(ours.isnan(), 0.0, ours)
            distance = (ours - losses.to(ours).nan_to_num()).abs().sum() / samples
            taught = (1 - self._share) * distance + self._share * ours.sum() / samples
            taught.backward()
        make_gradients_dense(self.optimizers)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _lessons_in(self, state: Mapping[str, Any]) -> Iterator[Lesson]:
        device = self.parts.body.device

        def part(number: int, name: str) -> Payload:
            key = f"lesson.{number}.{name}"
            count = sum(k.startswith(f"{key}.") for k in state)
            tensors = [state[f"{key}.{i}"] for i in range(count)]
            return of_form(state[key], tensors)

        for number in sorted({int(key.split(".")[1]) for key in state if key.startswith("lesson.")}):
            hidden = map_payload(lambda t: t.to(device), part(number, "hidden"))
            target = map_payload(lambda t: t.to(device), part(number, "target"))
            yield Lesson(number, hidden, target, first_tensor(part(number, "losses")))


def _by_sample(criterion: Criterion) -> Criterion:
    """Return the criterion; UsageError if it does not know the loss of a sample."""
    if not criterion.by_sample:
        raise UsageError(
            "this `critic_target` needs the loss of every sample, and a function gives that of a micro-batch: choose a "
            "`loss` by its name, such as cross_entropy or mse",
            code="loss-without-samples",
            key="loss",
        )
    return criterion


def _critic_optimizers(critic: nn.Module, index: int, settings: CascadeTarget) -> list[torch.optim.Optimizer]:
    if isinstance(critic, Critic):
        raise UsageError(
            f"`critic_target` {settings.kind} teaches critics that lower the run's loss, and {type(critic).__name__} "
            "has an objective of its own: set `critic.kind` to head, conv, mlp_sr or auglocal",
            code="critic-cannot-be-taught",
            key="critic.kind",
        )
    choice = OptimizerSettings(kind=settings.optimizer, lr=settings.lr)
    optimizers = build_optimizers(choice, nn.Sequential(critic), None, owns_head=False)
    if not optimizers:
        raise UsageError(
            f"`critic_target` {settings.kind}: the critic of stage {index} has no parameters to learn with; set "
            "`critic.kind` to head, conv, mlp_sr or auglocal",
            code="critic-cannot-be-taught",
            key="critic.kind",
        )
    return optimizers
