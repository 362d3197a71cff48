"""Brings a stage, or the plain network, to the state of a checkpoint: by names, whatever cut it was saved with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.extra_state import extra_state, is_extra, load_extra_state, tensor_state
from decoupled_pp.core.plans import Plan
from decoupled_pp.pipeline.optimizer_state import make_state, named_state, owners, reset_entries
from decoupled_pp.pipeline.stage import Stage
from decoupled_pp.run.checkpoints.opened import Checkpoint
from decoupled_pp.run.checkpoints.parts import TO_TRAIN, name_of_critic


def load_stage(checkpoint: Checkpoint, stage: Stage, plan: Plan) -> list[str]:
    """Bring a stage to the state of the checkpoint, whatever its cut; return notes of what could not be taken over."""
    _refuse_other_accumulation(checkpoint, stage)
    same_cut = checkpoint.boundaries == plan.boundaries
    notes: list[str] = []
    name = name_of_critic(stage, plan)
    wanted = {f"model.{key}": t for key, t in tensor_state(stage.trunk).items()}
    _load_extra_state(checkpoint, stage.trunk, "model.")
    if stage.critic is not None:
        critic = {f"critic.{name}.{key}": t for key, t in tensor_state(stage.critic).items()}
        if all(key in checkpoint.places and checkpoint.places[key][1] == t.shape for key, t in critic.items()):
            wanted |= critic
            _load_extra_state(checkpoint, stage.critic, f"critic.{name}.")
        else:
            notes.append(f"stage {stage.index}: the checkpoint has no critic {name} like this one; it starts anew")
    loaded = {key: p for key, p in stage.named_parameters(name).items() if key in wanted}
    stage.update.show_weights_to_train()
    # Optimizers first: making room for their state takes a step, which changes parameters and groups.
    _load_optimizers(checkpoint, stage, loaded)
    _load_groups(checkpoint, stage, same_cut=same_cut)
    stage.update.show_weights_to_evaluate()
    _load_into(checkpoint, wanted)
    _load_weights_to_train(checkpoint, stage, loaded)
    stage.update.schedules = []
    if same_cut:
        notes += _load_random_stream(checkpoint, stage)
    else:
        notes.append(
            f"stage {stage.index}: cut {checkpoint.boundaries} -> {plan.boundaries}; its random stream starts anew"
        )
    if stage.update.plateau is not None:
        start = f"plateau.stage{stage.index}."
        saved = _begin_with(checkpoint, (start,)) if same_cut else {}
        stage.update.plateau.load({key.removeprefix(start): value for key, value in saved.items()})
    lost = stage.rule.load(_rule_state(checkpoint, stage) if same_cut else {})
    if lost is not None:
        notes.append(f"stage {stage.index}: {lost}")
    stage.update.steps = checkpoint.step
    stage.update.samples = checkpoint.samples
    return notes


def _load_extra_state(checkpoint: Checkpoint, module: nn.Module, prefix: str) -> None:
    """Give the layers of a module their extra state back; its size may be another than here."""
    here = [f"{prefix}{key}" for key in extra_state(module)]
    found = _begin_with(checkpoint, tuple(key for key in here if key in checkpoint.places))
    load_extra_state(module, {key.removeprefix(prefix): content for key, content in found.items()})


def _load_weights_to_train(checkpoint: Checkpoint, stage: Stage, loaded: dict[str, nn.Parameter]) -> None:
    """Load the weights to train with, of optimizers that keep others to evaluate; there may be none such."""
    kept = stage.update.weights_to_train or {}
    names = {parameter: f"{TO_TRAIN}{name}" for name, parameter in loaded.items() if parameter in kept}
    for parameter, name in names.items():
        if name not in checkpoint.places:  # an earlier version saved the weights to train with as those of the model
            kept[parameter].copy_(parameter)
    checkpoint.fill({name: kept[parameter] for parameter, name in names.items() if name in checkpoint.places})


def _load_random_stream(checkpoint: Checkpoint, stage: Stage) -> list[str]:
    """Bring the random stream of a stage to where it was; return a note if that cannot be."""
    key = f"rng.stage{stage.index}"
    state = stage.body.random.state
    if checkpoint.places[key][1] != state.shape:
        return [f"stage {stage.index}: saved on another kind of device; its random stream starts anew"]
    _load_into(checkpoint, {key: state})
    stage.body.random.state = state
    return []


def _rule_state(checkpoint: Checkpoint, stage: Stage) -> dict[str, Any]:
    """Return the state of a stage's rule, without the prefix of the stage."""
    own = f"rule.stage{stage.index}."
    of_0_1_0 = f"lesson.stage{stage.index}."  # version 0.1.0 wrote `rule.stage0.lesson.7.hidden` as this + `7.hidden`
    saved = _begin_with(checkpoint, (own, of_0_1_0))
    return {key.replace(of_0_1_0, "lesson.").removeprefix(own): value for key, value in saved.items()}


def _begin_with(checkpoint: Checkpoint, prefixes: tuple[str, ...]) -> dict[str, Any]:
    """Return all scalars and tensors of a checkpoint whose names begin with one of the prefixes."""
    tensors = {
        key: torch.empty(shape, dtype=dtype)
        for key, (_, shape, dtype) in checkpoint.places.items()
        if key.startswith(prefixes)
    }
    checkpoint.fill(tensors)
    scalars = {key: value for key, value in checkpoint.merged("scalars").items() if key.startswith(prefixes)}
    return scalars | tensors


def _refuse_other_accumulation(checkpoint: Checkpoint, stage: Stage) -> None:
    """Raise UsageError if the number of packets per step has changed: the numbers of packets go on from there."""
    saved = checkpoint.parts[0]["accumulate"]
    if saved != stage.update.accumulate:
        raise UsageError(
            f"checkpoint {checkpoint.path} was made with `training.accumulate` {saved}, not {stage.update.accumulate}; "
            "keep it",
            code="checkpoint-of-other-settings",
            key="training.accumulate",
        )


def _load_into(checkpoint: Checkpoint, wanted: dict[str, Tensor]) -> None:
    """Fill the tensors in place, strictly; those of a `state_dict` are the module's own, so this loads it."""
    for key, tensor in wanted.items():
        if key not in checkpoint.places:
            raise of_another_network(checkpoint, f"it has no {key}")
        shape = checkpoint.places[key][1]
        if shape != tensor.shape:
            raise of_another_network(checkpoint, f"{key} is {tuple(shape)} there and {tuple(tensor.shape)} here")
    checkpoint.fill(wanted)


def _load_optimizers(checkpoint: Checkpoint, stage: Stage, loaded: dict[str, nn.Parameter]) -> None:
    """Load the state of these parameters. Load the parameters afterwards: making room for the state changes them."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in loaded.items()}
    here = owners(stage.all_optimizers, names)
    kinds = checkpoint.merged("owners")
    for name, optimizer in here.items():
        if kinds.get(name, type(optimizer).__name__) != type(optimizer).__name__:
            raise _other_optimizer(checkpoint, f"was trained by {kinds[name]}", name, optimizer)
    scalars = checkpoint.merged("scalars")
    saved = _saved_fields(checkpoint, here)
    make_state(stage.all_optimizers, [loaded[name] for name in saved], stage.body.device)
    for name, field, _ in named_state(stage.all_optimizers, names):
        if field not in saved[name]:
            raise _other_optimizer(checkpoint, f"has no {field!r}", name, here[name])
    tensors: dict[str, Tensor] = {}
    for name, fields in saved.items():
        state = here[name].state[loaded[name]]
        for field in fields:
            key = f"optimizer.{name}.{field}"
            if key in scalars:
                state[field] = scalars[key]
                continue
            if not isinstance(state.get(field), Tensor):  # made later than in the first step
                _, shape, dtype = checkpoint.places[key]
                state[field] = torch.empty(shape, dtype=dtype, device=loaded[name].device)
            tensors[key] = state[field]
    _load_into(checkpoint, tensors)


def _saved_fields(checkpoint: Checkpoint, here: dict[str, Optimizer]) -> dict[str, set[str]]:
    """Return the fields of optimizer state that the checkpoint has of each of these parameters."""
    saved: dict[str, set[str]] = {}
    for key in (*checkpoint.places, *checkpoint.merged("scalars")):
        name, _, field = key.removeprefix("optimizer.").rpartition(".")
        if key.startswith("optimizer.") and name in here:
            saved.setdefault(name, set()).add(field)
    return saved


def _load_groups(checkpoint: Checkpoint, stage: Stage, *, same_cut: bool) -> None:
    """Load what steps have changed in the groups of the optimizers."""
    keys = [key for key in (*checkpoint.places, *checkpoint.merged("scalars")) if key.startswith("groups.")]
    if keys and not same_cut:
        raise UsageError(
            f"checkpoint {checkpoint.path}: its optimizers keep state of a whole stage ({keys[0].split('.')[-1]!r} in "
            f"param_groups); go on with its `cut`, layers {list(checkpoint.boundaries)}",
            code="optimizer-state-of-another-cut",
            key="cut",
        )
    start = f"groups.stage{stage.index}."
    saved = {key.removeprefix(start): value for key, value in _begin_with(checkpoint, (start,)).items()}
    try:
        reset_entries(stage.all_optimizers, stage.first_groups, saved)
    except IndexError:
        raise UsageError(
            f"checkpoint {checkpoint.path} has more param_groups of stage {stage.index} than there are here; use the "
            "`optimizer` it was made with",
            code="checkpoint-of-another-optimizer",
            key="optimizer",
        ) from None


def _other_optimizer(checkpoint: Checkpoint, what: str, name: str, optimizer: Optimizer) -> UsageError:
    return UsageError(
        f"checkpoint {checkpoint.path} is of another optimizer: {name} {what} there, and {type(optimizer).__name__} "
        "with these settings trains it here; use the `optimizer` it was made with",
        code="checkpoint-of-another-optimizer",
        key="optimizer",
    )


def load_model(checkpoint: Checkpoint, module: torch.nn.Module) -> None:
    """Fill the user's whole module with the checkpoint's weights and buffers, strictly by its own names."""
    refuse_other_network(checkpoint, module)
    checkpoint.fill({f"model.{name}": tensor for name, tensor in tensor_state(module).items()})
    _load_extra_state(checkpoint, module, "model.")


def refuse_other_network(checkpoint: Checkpoint, module: torch.nn.Module) -> None:
    """Raise UsageError unless the checkpoint has exactly the weights and buffers of this network, in their shapes."""
    # A stage alone cannot tell: a weight that it lacks may be another stage's.
    here: dict[str, torch.Size | None] = {f"model.{key}": tensor.shape for key, tensor in tensor_state(module).items()}
    here |= {f"model.{key}": None for key in module.state_dict() if is_extra(key)}  # of any size
    there: dict[str, torch.Size | None] = {}
    for key, (_, shape, _) in checkpoint.places.items():
        if key.startswith("model."):
            there[key] = None if is_extra(key) else shape
    for key in (*here, *there):
        if key not in there:
            raise of_another_network(checkpoint, f"it has no {key}")
        if key not in here:
            raise of_another_network(checkpoint, f"it has {key}, which this network has not")
        if here[key] != there[key]:
            raise of_another_network(checkpoint, f"{key} is {_shown(there[key])} there and {_shown(here[key])} here")


def _shown(shape: torch.Size | None) -> str:
    return "extra state" if shape is None else str(tuple(shape))


def with_cut_of(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """Return the plan with the checkpoint's cut if it was cut by time and has as many stages and layers."""
    # Timing noise can move a cut, and a critic whose place moves starts anew.
    same_stages = len(checkpoint.boundaries) == len(plan.boundaries)
    same_layers = checkpoint.boundaries[-1] == plan.boundaries[-1]
    if plan.layer_seconds is not None and same_stages and same_layers:
        return replace(plan, boundaries=checkpoint.boundaries)
    return plan


def of_another_network(checkpoint: Checkpoint, why: str) -> UsageError:
    """Return the error of a checkpoint that does not fit the network."""
    return UsageError(
        f"checkpoint {checkpoint.path} is of another network: {why}; use the settings it was made with",
        code="checkpoint-of-another-network",
    )
