"""Holds what makes stages out of a plan: checked sections of the settings, and the builders that they choose."""

from __future__ import annotations

from dataclasses import dataclass, field

from decoupled_pp.core.criterion import Criterion
from decoupled_pp.core.objective import CriticBuilder
from decoupled_pp.core.packets import Loss
from decoupled_pp.critics import build_critic
from decoupled_pp.pipeline.losses import find_loss
from decoupled_pp.pipeline.optim import OptimizerFactory
from decoupled_pp.pipeline.schedules import ScheduleFactory
from decoupled_pp.settings.rules import CorrectionSettings, LabelTarget, RuleSettings, refuse_rules
from decoupled_pp.settings.run import (
    CheckpointSettings,
    LinkSettings,
    MetricsSettings,
    OptimizerSettings,
    ScheduleSettings,
    Settings,
    StageSettings,
    ValidationSettings,
    refuse_rates,
)


@dataclass(frozen=True)
class Recipe:
    """Says how the stages of a plan are made and trained. Each part of a run is built from its own section of this."""

    loss: Loss  # see `losses.find_loss`
    critic: CriticBuilder
    optimizer: OptimizerSettings | OptimizerFactory
    schedule: ScheduleSettings | ScheduleFactory = field(default_factory=ScheduleSettings)
    target: RuleSettings = field(default_factory=LabelTarget)
    correction: CorrectionSettings | None = None  # end-to-end steps between those of the rule; None: none
    training: StageSettings = field(default_factory=StageSettings)
    links: LinkSettings = field(default_factory=LinkSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    held_out_loss: Loss | None = None  # of held-out scores alone, before that of `validation`
    seed: int = 0

    @property
    def has_plateau(self) -> bool:
        """True if the learning rates follow held-out losses."""
        return isinstance(self.schedule, ScheduleSettings) and self.schedule.kind == "plateau"

    def refuse_contradictions(self, stages: int) -> None:
        """Raise UsageError for sections that do not fit each other, or not a plan of so many stages."""
        refuse_rules(
            self.target,
            self.correction,
            capacity=self.links.capacity,
            stagger=self.training.stagger,
            critic_warmup=self.training.critic_warmup,
            plateau=self.has_plateau,
        )
        if isinstance(self.optimizer, OptimizerSettings):
            refuse_rates(self.optimizer, stages)

    def scored_by(self) -> Criterion:
        """Return the loss of held-out scores: the run's, unless another one is chosen."""
        if self.held_out_loss is not None:
            return find_loss(self.held_out_loss, "validation.loss")
        if self.validation.loss is not None:
            return find_loss(self.validation.loss, "validation.loss")
        return find_loss(self.loss)

    def optimizer_of(self, stage: int) -> OptimizerSettings | OptimizerFactory:
        """Return the optimizer of one stage, with its own learning rate if stages have several."""
        if isinstance(self.optimizer, OptimizerSettings):
            return self.optimizer.of_stage(stage)
        return self.optimizer

    def freezes(self, stage: int) -> bool:
        """Return whether a stage and its critic stay as they are."""
        return isinstance(self.optimizer, OptimizerSettings) and self.optimizer.freezes(stage)


def recipe_of(settings: Settings) -> Recipe:
    """Return the recipe that a run's settings describe; its sections are those of the settings."""
    return Recipe(
        loss=find_loss(settings.loss),
        critic=build_critic(settings.critic, settings.critic_overlap),
        optimizer=settings.optimizer,
        schedule=settings.schedule,
        target=settings.critic_target,
        correction=settings.global_correction,
        training=settings.training,
        links=settings.links,
        validation=settings.validation,
        checkpoint=settings.checkpoint,
        metrics=settings.logging,
        seed=settings.seed,
    )
