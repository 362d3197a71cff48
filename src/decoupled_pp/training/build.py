"""Knows all the parts and only builds: a plan and a recipe -> stages, and stages -> workers joined to their links."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from decoupled_pp.core.channels import Inlet, Outlet
from decoupled_pp.core.device import Clock, seeded
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import Critic, CriticBuilder, CriticContext
from decoupled_pp.core.packets import Loss
from decoupled_pp.core.plans import Layers, Plan
from decoupled_pp.core.reports import Record
from decoupled_pp.critics import build_critic, check_critic
from decoupled_pp.links import InProcessLink, StoreControl, World
from decoupled_pp.models.cutting.layers import critic_context, trace
from decoupled_pp.pipeline.feed import Itinerary
from decoupled_pp.pipeline.losses import per_sample
from decoupled_pp.pipeline.meter import StageMeter
from decoupled_pp.pipeline.optim import OptimizerFactory, build_optimizers
from decoupled_pp.pipeline.rules.cascade import Cascade
from decoupled_pp.pipeline.runtime import Nowhere, Worker
from decoupled_pp.pipeline.stage import Stage, StageOptions
from decoupled_pp.settings.critics import CriticSettings, CriticTargetSettings, LabelTarget, MixTarget
from decoupled_pp.settings.load import explain
from decoupled_pp.settings.run import CorrectionSettings, OptimizerSettings, ScheduleSettings

CriticChoice: TypeAlias = "str | dict[str, Any] | CriticSettings | nn.Module | Sequence[nn.Module] | CriticBuilder"
"""A critic by kind, as a settings section, as one module (copied per stage), as one per stage, or as a builder."""

CorrectionChoice: TypeAlias = "dict[str, Any] | CorrectionSettings | None"
"""End-to-end steps between local ones, as a settings section."""

CriticTargetChoice: TypeAlias = "str | dict[str, Any] | CriticTargetSettings"
"""What critics learn from: a kind, or a settings section."""

OptimizerChoice: TypeAlias = "str | dict[str, Any] | OptimizerSettings | OptimizerFactory"
"""An optimizer of `torch.optim` by name, as a settings section, or a function of the parameters."""


@dataclass(frozen=True)
class Recipe:
    """What makes stages out of a plan.

    Attributes:
        loss: loss(logits, target) -> scalar mean.
        critic: Builds the critic of every stage before the last.
        optimizer: Of every stage.
        schedule: Learning-rate schedule of every stage.
        options: How every stage computes.
        seed: Of critics' weights and dropout.
        log_every: Packets between two flushes of a stage's metrics.
        target: What critics learn from.
    """

    loss: Loss
    critic: CriticBuilder
    optimizer: OptimizerSettings | OptimizerFactory
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    options: StageOptions = field(default_factory=StageOptions)
    seed: int = 0
    log_every: int = 50
    target: CriticTargetSettings = field(default_factory=LabelTarget)


def resolve_critic(choice: CriticChoice) -> CriticBuilder:
    """The builder that a user's choice means.

    Raises:
        UsageError: It means none.
    """
    if isinstance(choice, str):
        choice = {"kind": choice}
    if isinstance(choice, dict):
        adapter: TypeAdapter[CriticSettings] = TypeAdapter(CriticSettings)
        return build_critic(_checked(lambda: adapter.validate_python(choice), "critic"))
    if isinstance(choice, nn.Module):
        return partial(_copied_critic, choice)
    if isinstance(choice, list | tuple):
        return partial(_listed_critic, choice)
    return choice if callable(choice) else build_critic(cast("CriticSettings", choice))


def _copied_critic(critic: nn.Module, _context: CriticContext) -> nn.Module:
    return copy.deepcopy(critic)


def _listed_critic(critics: Sequence[nn.Module], context: CriticContext) -> nn.Module:
    if len(critics) != context.stages - 1:
        raise UsageError(
            f"critic: {len(critics)} modules for {context.stages} stages; every stage but the last needs one"
        )
    return copy.deepcopy(critics[context.stage])


def resolve_target(choice: CriticTargetChoice) -> CriticTargetSettings:
    """What critics learn from, by a user's choice.

    Raises:
        UsageError: Unknown keys or values.
    """
    if isinstance(choice, str):
        choice = {"kind": choice}
    if isinstance(choice, dict):
        adapter: TypeAdapter[CriticTargetSettings] = TypeAdapter(CriticTargetSettings)
        return cast("CriticTargetSettings", _checked(lambda: adapter.validate_python(choice), "critic_target"))
    return choice


def resolve_correction(choice: CorrectionChoice) -> CorrectionSettings | None:
    """The end-to-end steps that a user's choice means.

    Raises:
        UsageError: Unknown keys or values.
    """
    if isinstance(choice, dict):
        return cast(
            "CorrectionSettings", _checked(lambda: CorrectionSettings.model_validate(choice), "global_correction")
        )
    return choice


def resolve_optimizer(choice: OptimizerChoice) -> OptimizerSettings | OptimizerFactory:
    """The optimizer that a user's choice means.

    Raises:
        UsageError: Unknown keys or values.
    """
    if isinstance(choice, str):
        choice = {"kind": choice}
    if isinstance(choice, dict):
        settings: OptimizerSettings = _checked(lambda: OptimizerSettings.model_validate(choice), "optimizer")
        return settings
    return choice


def _checked(validate: Callable[[], Any], section: str) -> Any:
    try:
        return validate()
    except ValidationError as error:
        raise UsageError(explain(error, section)) from None


def critic_contexts(plan: Plan) -> list[CriticContext]:
    """What each critic of a plan may look at, by running the plan's sample through the network once."""
    hiddens, output = trace(plan.module, plan.sample)
    return [
        critic_context(plan.module, hiddens, output, boundary=plan.boundaries[k + 1], stage=k, stages=plan.stages)
        for k in range(plan.stages - 1)
    ]


def build_critics(plan: Plan, builder: CriticBuilder, stages: Sequence[int], seed: int) -> dict[int, nn.Module]:
    """The checked critics of the given stages; weights depend on the seed and the place only.

    The last stage has none, unless the builder has a `closing()` that gives one.

    Raises:
        UsageError: A critic does not fit its stage.
    """
    critics: dict[int, nn.Module] = {}
    closing: Callable[[], nn.Module | None] = getattr(builder, "closing", lambda: None)
    if plan.stages - 1 in stages and plan.stages > 1 and (last := closing()) is not None:
        critics[plan.stages - 1] = last
    if all(k == plan.stages - 1 for k in stages):
        return critics
    for context in critic_contexts(plan):
        if context.stage in stages:
            with seeded(_mixed(seed, context.boundary, 1)):
                critic = builder(context)
            if not isinstance(critic, nn.Module):
                raise UsageError(f"critic: the builder returned {type(critic).__name__}, not an nn.Module")
            check_critic(critic, context)
            critics[context.stage] = critic
    return critics


def build_stages(
    plan: Plan,
    recipe: Recipe,
    stages: Sequence[int],
    device: torch.device,
) -> list[Stage]:
    """Build the given stages of a plan on a device (their layers move there).

    Args:
        plan: The plan.
        recipe: What to make of it.
        stages: Which stages.
        device: Where they compute.

    Raises:
        UsageError: A critic or the optimizer does not fit.
    """
    critics = build_critics(plan, recipe.critic, stages, recipe.seed)
    _leave_evaluation_mode(*plan.module.children())
    built = []
    for index in stages:
        trunk = plan.stage_module(index)
        _materialise(plan, trunk, device, _mixed(recipe.seed, index, 3))
        trunk = trunk.to(device)
        critic = critics[index].to(device) if index in critics else None
        if critic is not None:
            _leave_evaluation_mode(critic)
            _refuse_other_runs(critic, recipe.options)
        if isinstance(recipe.optimizer, OptimizerSettings) and recipe.optimizer.freezes(index):
            nn.ModuleList([trunk, critic] if critic is not None else [trunk]).requires_grad_(False).eval()
        cascade = _build_cascade(recipe, critic, index) if critic is not None else None
        own = critic if cascade is None else None
        choice = (
            recipe.optimizer.of_stage(index) if isinstance(recipe.optimizer, OptimizerSettings) else recipe.optimizer
        )
        optimizers = build_optimizers(choice, trunk, own, owns_head=index == plan.stages - 1)
        gives_back = index > 0 and not isinstance(recipe.target, LabelTarget)
        built.append(
            Stage(
                index,
                trunk,
                critic,
                recipe.loss,
                optimizers,
                device=device,
                seed=_mixed(recipe.seed, index, 2),
                options=recipe.options,
                cascade=cascade,
                per_sample=per_sample(recipe.loss) if gives_back else None,
            )
        )
    return built


def _materialise(plan: Plan, trunk: nn.Module, device: torch.device, seed: int) -> None:
    """Give a stage its weights if the network was built on the meta device.

    Raises:
        UsageError: Nothing says where they come from.
    """
    if not any(parameter.is_meta for parameter in trunk.parameters()):
        return
    weights = plan.module.weights if isinstance(plan.module, Layers) else None
    if weights is None:
        raise UsageError("the network is on the meta device, and `Layers.weights` does not say where its weights are")
    with seeded(seed):
        weights.fill(trunk, device)


def _build_cascade(recipe: Recipe, critic: nn.Module, index: int) -> Cascade | None:
    """What teaches the critic of a stage; None if the labels do.

    Raises:
        UsageError: The critic cannot be taught so.
    """
    target = recipe.target
    if isinstance(target, LabelTarget):
        return None
    if isinstance(critic, Critic):
        raise UsageError(
            f"critic_target {target.kind} teaches critics that lower the run's loss; {type(critic).__name__} has an "
            "objective of its own: choose critic.kind head, conv, mlp_sr or auglocal"
        )
    own = OptimizerSettings(kind=target.optimizer, lr=target.lr)
    optimizers = build_optimizers(own, nn.Sequential(critic), None, owns_head=False)
    if not optimizers:
        raise UsageError(f"critic_target {target.kind}: the critic of stage {index} has nothing to learn with")
    return Cascade(
        per_sample(recipe.loss),
        optimizers,
        lag=target.lag,
        label_share=target.label_share if isinstance(target, MixTarget) else 0.0,
        accumulate=recipe.options.accumulate,
    )


def _refuse_other_runs(critic: nn.Module, options: StageOptions) -> None:
    """Some critics need a second derivative, or a look into the stage: not to be had compiled or recomputed."""
    looks = isinstance(critic, Critic) and (critic.follows_input or critic.needs_first)
    if looks and (options.compile or options.checkpoint_activations):
        name = "compile" if options.compile else "checkpoint_activations"
        raise UsageError(f"training.{name}: critic {type(critic).__name__} cannot look into such a stage; leave it out")


def _leave_evaluation_mode(*modules: nn.Module) -> None:
    """Of modules that are in it as a whole, as pretrained ones come; where only parts are, those are frozen."""
    if not any(part.training for module in modules for part in module.modules()):
        for module in modules:
            module.train()


def _mixed(seed: int, place: int, purpose: int) -> int:
    """A seed of its own for every place and purpose (an affine mix modulo a 61-bit prime, never zero-correlated)."""
    return (seed * 1_000_003 + place * 7_919 + purpose * 104_729 + 12_345) * 2_862_933_555_777_941_757 % (2**61 - 1)


def plan_digest(plan: Plan, recipe: Recipe, capacity: int, itinerary: Itinerary) -> str:
    """What all ranks must agree on, as text. Of the itinerary it is what every rank acts on; rank 0 alone feeds."""
    shapes = {name: list(tensor.shape) for name, tensor in plan.module.state_dict().items()}
    made_of = re.sub(r" at 0x[0-9a-f]+|cuda:\d+", "", repr(recipe))  # addresses and devices are each rank's own
    course = [itinerary.start, itinerary.steps, itinerary.save]
    return json.dumps([plan.boundaries, shapes, made_of, capacity, course])


@dataclass(frozen=True)
class Session:
    """What the workers of one run share.

    Attributes:
        feed: The inlet of the first stage.
        save: Saves a stage.
        post: Takes records.
        log_every: Packets between two flushes of the metrics.
        trace: Packet numbers whose spans are recorded.
        capacity: Packets a link may hold.
        timeout_seconds: Longest wait on a link.
        losses: Samples of the largest packet, if their losses go back (cascade targets); else 0.
        gradients: Whether gradients go back (end-to-end steps).
    """

    feed: Inlet
    save: Callable[[Stage, int], None]
    post: Callable[[Record], None]
    log_every: int
    trace: range
    capacity: int
    timeout_seconds: float
    losses: int = 0
    gradients: bool = False

    def worker(self, stage: Stage, inlet: Inlet | None, outlet: Outlet | None) -> Worker:
        """Join one stage to its links, with a meter of its own."""
        meter = StageMeter(
            stage.index,
            Clock(stage.device),
            self.post,
            every=self.log_every,
            trace=self.trace,
            updates_every=stage.options.accumulate,
        )
        return Worker(stage, inlet or self.feed, outlet or Nowhere(), meter, self.save, self.post)


def join_in_process(session: Session, stages: Sequence[Stage]) -> list[Worker]:
    """Workers of a pipeline in one process."""
    capacity, seconds = session.capacity, session.timeout_seconds
    links = [InProcessLink(s.index, capacity=capacity, timeout_seconds=seconds, device=s.device) for s in stages[:-1]]
    ends = zip(stages, [None, *links], [*links, None], strict=True)
    return [session.worker(stage, inlet, outlet) for stage, inlet, outlet in ends]


def join_ranks(session: Session, stage: Stage, world: World, control: StoreControl, digest: str) -> Worker:
    """This rank's worker of a distributed pipeline."""
    capacity, seconds = session.capacity, session.timeout_seconds
    inlet, outlet = world.connect(
        control,
        stage.device,
        digest,
        capacity=capacity,
        timeout_seconds=seconds,
        losses=session.losses,
        gradients=session.gradients,
    )
    return session.worker(stage, inlet, outlet)
