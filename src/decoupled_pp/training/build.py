"""Builds the stages of a plan from a recipe; knows all the parts of a stage and does nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from decoupled_pp.core.device import seeded
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.extra_state import tensor_state
from decoupled_pp.core.module_state import move
from decoupled_pp.core.objective import Critic, CriticBuilder, CriticContext, Unjudged
from decoupled_pp.core.packets import Loss
from decoupled_pp.core.plans import Layers, Plan
from decoupled_pp.critics import check_critic
from decoupled_pp.models.cutting.closing import loss_of_critic
from decoupled_pp.models.cutting.layers import critic_context, refuse_hooks, trace
from decoupled_pp.pipeline.body import Body
from decoupled_pp.pipeline.feed import Itinerary
from decoupled_pp.pipeline.groups import refuse_unmatched
from decoupled_pp.pipeline.losses import find_loss
from decoupled_pp.pipeline.neighbours import Neighbours
from decoupled_pp.pipeline.optim import build_optimizers
from decoupled_pp.pipeline.pace import Pace
from decoupled_pp.pipeline.probes import ActivationProbe, Probe
from decoupled_pp.pipeline.rules.rule import RuleParts
from decoupled_pp.pipeline.rules.table import RULES, build_rule
from decoupled_pp.pipeline.schedules import Plateau
from decoupled_pp.pipeline.stage import Stage
from decoupled_pp.pipeline.updates.table import UPDATES
from decoupled_pp.settings.run import ScheduleSettings, StageSettings, ValidationSettings
from decoupled_pp.training.recipe import Recipe


@dataclass(frozen=True)
class Judging:
    """The critic of a stage, None if its output is the network's, and the losses of what it gives."""

    critic: nn.Module | None
    loss: Loss
    held_out_loss: Loss


def build_critics(plan: Plan, recipe: Recipe, stages: Sequence[int]) -> dict[int, Judging]:
    """Build and check the critics of the given stages; their weights depend on the seed and the place only.

    The last stage has none, unless the builder has a `closing()` that gives one.
    """
    losses = find_loss(recipe.loss), recipe.scored_by()
    last = plan.stages - 1
    if not recipe.target.critic_passes:
        return {k: Judging(None if k == last else Unjudged(), *losses) for k in stages}
    closing: Callable[[], nn.Module | None] = getattr(recipe.critic, "closing", lambda: None)
    judging = {last: Judging(closing() if plan.stages > 1 else None, *losses)} if last in stages else {}
    before = [k for k in stages if k != last]
    if not before:
        return judging
    hiddens, output = trace(plan.module, plan.sample)
    for k in before:
        boundary = plan.boundaries[k + 1]
        context = critic_context(
            plan.module, hiddens, output, losses[0], boundary=boundary, stage=k, stages=plan.stages
        )
        critic = _build_critic(recipe.critic, context, _mixed(recipe.seed, boundary, 1))
        judging[k] = Judging(critic, *(loss_of_critic(loss, critic, context) for loss in losses))
    return judging


def build_stages(plan: Plan, recipe: Recipe, stages: Sequence[int], device: torch.device) -> list[Stage]:
    """Build the given stages of a plan on a device (their layers move there)."""
    refuse_hooks(plan.module)  # they may have come after the cut
    refuse_unmatched(recipe.optimizer, plan.module)
    judging = build_critics(plan, recipe, stages)
    _leave_evaluation_mode(*plan.module.children())
    return [_build_stage(plan, recipe, index, judging[index], device) for index in stages]


def _build_stage(plan: Plan, recipe: Recipe, index: int, judging: Judging, device: torch.device) -> Stage:
    critic = judging.critic
    trunk = plan.stage_module(index)
    _materialise(plan, trunk, device, _mixed(recipe.seed, index, 3))
    move(trunk, device)
    modules: list[nn.Module] = [trunk]
    if critic is not None:
        move(critic, device)
        _leave_evaluation_mode(critic)
        _refuse_unreachable(critic, recipe.training)
        modules.append(critic)
    if recipe.freezes(index):
        Pace.freeze(*modules)
    seed = _mixed(recipe.seed, index, 2)
    body = Body(
        index,
        trunk,
        critic,
        judging.loss,
        device=device,
        seed=seed,
        training=recipe.training,
        held_out_loss=judging.held_out_loss,
    )
    _refuse_deaf_plateau(body, recipe)
    optimizers = _optimizers_of(index, body, plan, recipe)
    return assemble_stage(index, plan.stages, body, optimizers, recipe)


def _optimizers_of(
    index: int, body: Body, plan: Plan, recipe: Recipe, beside: Iterable[nn.Parameter] = ()
) -> list[Optimizer]:
    """Build the optimizers of one stage; a critic that its rule updates is left to the rule."""
    owned = None if RULES[recipe.target.kind].owns_critic else body.critic
    is_last = index == plan.stages - 1
    return build_optimizers(recipe.optimizer_of(index), body.trunk, owned, owns_head=is_last, beside=beside)


def renew_optimizers(stage: Stage, plan: Plan, recipe: Recipe) -> bool:
    """Give the optimizers of a stage what requires a gradient and is not theirs yet: unfrozen, or put in since.

    Return whether there was any.
    """
    held = [p for optimizer in stage.all_optimizers for group in optimizer.param_groups for p in group["params"]]
    known = set(map(id, held))
    trainable = [p for module in stage.body.modules for p in module.parameters() if p.requires_grad]
    if recipe.freezes(stage.index) or all(id(parameter) in known for parameter in trainable):
        return False
    # Those that are frozen now stay, with their state, for the day when they train again.
    stage.take_optimizers(_optimizers_of(stage.index, stage.body, plan, recipe, beside=held))
    return True


def assemble_stage(index: int, stages: int, body: Body, optimizers: list[Optimizer], recipe: Recipe) -> Stage:
    """Join the parts of one stage."""
    update = UPDATES["alone"](optimizers, recipe.training, sums=body.loss.sums)
    if isinstance(recipe.schedule, ScheduleSettings) and recipe.has_plateau:
        update.plateau = Plateau(recipe.schedule)
    probes = _build_probes(body, recipe.validation)
    pace = Pace(recipe.training.stagger * index, recipe.training.critic_warmup)
    parts = RuleParts(index, stages, body, update, pace, probes)
    return Stage(index, body, update, build_rule(parts, recipe.target, recipe.correction), probes)


def _build_probes(body: Body, validation: ValidationSettings) -> list[Probe]:
    """Build the probes of a stage: activations, and nearest neighbours if they are asked for."""
    kept: list[Tensor] = [tensor for part in body.modules for tensor in (*part.parameters(), *part.buffers())]
    probes: list[Probe] = [ActivationProbe(kept)]
    if validation.knn is not None:
        probes.append(Neighbours(validation.knn, validation.knn_samples))
    return probes


def plan_digest(plan: Plan, recipe: Recipe, itinerary: Itinerary) -> str:
    """Return as text what all ranks must agree on: plan, recipe, and the part of the itinerary that each acts on."""
    shapes = {name: list(tensor.shape) for name, tensor in tensor_state(plan.module).items()}
    made_of = re.sub(r" at 0x[0-9a-f]+|cuda:\d+", "", repr(recipe))  # addresses and devices are each rank's own
    course = [itinerary.start, itinerary.steps, itinerary.save]
    return json.dumps([plan.boundaries, shapes, made_of, course])


def _build_critic(builder: CriticBuilder, context: CriticContext, seed: int) -> nn.Module:
    with seeded(seed):
        critic = builder(context)
        if not isinstance(critic, nn.Module):
            raise UsageError(
                f"`critic`: the builder returned {type(critic).__name__}; it must return an nn.Module",
                code="critic-is-no-module",
                key="critic",
            )
        check_critic(critic, context)  # with the same seed: a lazy critic draws its weights here
    return critic


def _materialise(plan: Plan, trunk: nn.Module, device: torch.device, seed: int) -> None:
    """Give a stage its weights if the network was built on the meta device."""
    if not any(parameter.is_meta for parameter in trunk.parameters()):
        return
    weights = plan.module.weights if isinstance(plan.module, Layers) else None
    if weights is None:
        raise UsageError(
            "the network is on the meta device, and `Layers.weights` does not say where its weights are; set it, or "
            "build the network on the CPU",
            code="no-source-of-weights",
        )
    with seeded(seed):
        weights.fill(trunk, device)


def _refuse_unreachable(critic: nn.Module, training: StageSettings) -> None:
    """Raise UsageError if a critic looks into the stage and the stage is compiled or recomputed.

    Such critics need a second derivative, or the output of the first layer: neither is to be had then.
    """
    looks_inside = isinstance(critic, Critic) and (critic.follows_input or critic.needs_first)
    if looks_inside and (training.compile or training.checkpoint_activations):
        key = "training.compile" if training.compile else "training.checkpoint_activations"
        raise UsageError(
            f"`{key}`: critic {type(critic).__name__} cannot look into such a stage; leave it out, or choose another "
            "`critic.kind`",
            code="critic-cannot-look-inside",
            key=key,
        )


def _refuse_deaf_plateau(body: Body, recipe: Recipe) -> None:
    """Raise UsageError if a plateau schedule is to follow the loss of a critic that has none."""
    if recipe.has_plateau and not body.judge.exits:
        raise UsageError(
            "`schedule.kind` plateau follows the held-out loss of every stage, and critic "
            f"{type(body.critic).__name__} makes no logits; use cosine or linear, or `critic.kind` head",
            code="plateau-without-validation",
            key="schedule.kind",
        )


def _leave_evaluation_mode(*modules: nn.Module) -> None:
    """Switch modules to training mode if every submodule is in evaluation mode, as `from_pretrained` returns models.

    If only some are, the user froze them: they stay as they are.
    """
    if not any(part.training for module in modules for part in module.modules()):
        for module in modules:
            module.train()


def _mixed(seed: int, place: int, purpose: int) -> int:
    """Return a seed of its own for every place and purpose (an affine mix modulo a 61-bit prime)."""
    return (seed * 1_000_003 + place * 7_919 + purpose * 104_729 + 12_345) * 2_862_933_555_777_941_757 % (2**61 - 1)
