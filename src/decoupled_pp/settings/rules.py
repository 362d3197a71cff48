"""Declares the settings of training rules: what stages and critics learn from, and end-to-end steps between."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from decoupled_pp.core.errors import UsageError
from decoupled_pp.settings.sections import Count, Section, kinds_of, section_types


class RuleSettings(Section):
    """Base of the sections that choose a training rule (`critic_target`)."""

    critic_passes: ClassVar[int] = 1  # forward passes of a critic per packet; a cut by time counts them; 0: no critics
    needs_every_packet: ClassVar[bool] = False  # True if stages learn from every packet, so that none may be left out

    kind: str

    def refuse_capacity(self, capacity: int) -> None:
        """Raise UsageError if the rule cannot work with links of this capacity."""


class LabelTarget(RuleSettings):
    """A stage and its critic lower the critic's loss of the labels together. Nothing flows back."""

    kind: Literal["label"] = "label"


class CascadeTarget(RuleSettings):
    """A critic learns to give the loss that the next stage has, sample by sample, and its stage lowers it (Lee & Lee).

    One float per sample flows back over every link. For `loss` cross_entropy and mse.
    """

    critic_passes = 2
    needs_every_packet = True

    kind: Literal["cascade"]
    lag: int = Field(8, ge=2, le=10**6)
    """Packets after which a critic learns from a packet; above `links.capacity`, so that no stage waits for losses."""
    optimizer: str = "Adam"
    """The critics' own optimizer, by its name in `torch.optim`; its rate is constant (paper: Adam)."""
    lr: float = Field(1e-4, gt=0, le=1e6)
    """Its learning rate (paper: 1e-4)."""

    @property
    def share_of_labels(self) -> float:
        """Share of the labels' own loss in what a critic lowers."""
        return 0.0

    def refuse_capacity(self, capacity: int) -> None:
        """Raise UsageError if losses that flow back may not be there when they are due."""
        if self.lag <= capacity:
            raise UsageError(
                f"`critic_target.lag` {self.lag} must be above `links.capacity` {capacity}, or a stage would wait for "
                "the losses of the next one; raise the lag or lower the capacity",
                code="lag-within-capacity",
                key="critic_target.lag",
            )


class MixTarget(CascadeTarget):
    """The cascade's target and the labels' own loss, weighted."""

    kind: Literal["mix"]  # type: ignore[assignment]
    label_share: float = Field(0.5, gt=0, lt=1)
    """Share of the labels' own loss in what a critic lowers."""

    @property
    def share_of_labels(self) -> float:
        """Share of the labels' own loss in what a critic lowers."""
        return self.label_share


class DelayedTarget(RuleSettings):
    """A rule without critics: the gradient of the network's own loss comes back for every packet, some packets late.

    Stage k of K learns from a packet `lag` times K-1-k packets after it has sent it on, and computes its activations
    anew for that. Gradients as large as the activations flow back. Only the last stage has an exit.
    """

    critic_passes = 0
    needs_every_packet = True

    kind: Literal["delayed"]
    lag: int = Field(1, ge=1, le=1000)
    """Packets that every link adds to the delay; with 1 and even stages a gradient comes just in time, with more there
    is time for slow links and uneven stages."""
    weights: Literal["stashed", "current"] = "stashed"
    """Weights that a gradient is taken at: stashed, those that the packet was sent on with (a copy for every optimizer
    step of the delay), or the stage's current ones (no copy, another gradient)."""


CriticTargetSettings = Annotated[LabelTarget | CascadeTarget | MixTarget | DelayedTarget, Field(discriminator="kind")]

BUILT_IN_RULES = tuple(kind for section in section_types(CriticTargetSettings) for kind in kinds_of(section))
"""Kinds that a settings file can name: those of the sections above."""


class CorrectionSettings(Section):
    """End-to-end steps now and then: true gradients flow back, as large as the activations, while every stage waits."""

    every: Count
    """Local optimizer steps before each round of end-to-end steps."""
    steps: Count = 1
    """End-to-end optimizer steps in a round; critics do not learn in them."""

    def covers(self, step: int) -> bool:
        """Return whether optimizer step `step` (from 0) is an end-to-end one."""
        return step % (self.every + self.steps) >= self.every


def refuse_rules(
    target: RuleSettings,
    correction: CorrectionSettings | None,
    *,
    capacity: int,
    stagger: int,
    critic_warmup: int,
    plateau: bool,
) -> None:
    """Raise UsageError for rules that cannot work together, or not with the rest of the settings."""
    target.refuse_capacity(capacity)
    needs_critics = {"training.critic_warmup": critic_warmup > 0, "schedule.kind": plateau}
    for key, given in needs_critics.items():
        said = f"`{key}` plateau" if key == "schedule.kind" else f"`{key}`"
        if given and target.critic_passes == 0:
            raise UsageError(
                f"{said} needs the critics of all stages, and `critic_target` {target.kind} trains without "
                "any; leave one of the two out",
                code="rule-without-critics",
                key=key,
            )
    leave_out = {"global_correction": correction is not None, "training.stagger": stagger > 0}
    for key, given in leave_out.items():
        if given and target.needs_every_packet:
            raise UsageError(
                f"`{key}` leaves packets out, and `critic_target` {target.kind} learns from every packet; leave one of "
                "the two out",
                code="rule-needs-every-packet",
                key=key,
            )
