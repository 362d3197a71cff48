"""Bring a stage, or the plain network, to the state of a checkpoint: by names, whatever cut it was saved with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from decoupled_pp.checkpoint import Checkpoint, name_of_critic
from decoupled_pp.contracts import Plan, UsageError
from decoupled_pp.stage import Stage


def load_stage(checkpoint: Checkpoint, stage: Stage, plan: Plan) -> list[str]:
    """Bring a stage to the state of the checkpoint, by parameter names, whatever cut it was saved with.

    Returns:
        What could not be taken over, in words (a critic whose place moved, the random stream of another cut).

    Raises:
        UsageError: A parameter of the stage is missing in the checkpoint, or has another shape.
    """
    _refuse_other_training(checkpoint, stage)
    notes: list[str] = []
    _load_into(checkpoint, {f"model.{name}": t for name, t in stage.trunk.state_dict().items()})
    name = name_of_critic(stage, plan)
    kept = True
    if stage.critic is not None:
        critic = {f"critic.{name}.{key}": t for key, t in stage.critic.state_dict().items()}
        kept = all(key in checkpoint.places and checkpoint.places[key][1] == t.shape for key, t in critic.items())
        if kept:
            _load_into(checkpoint, critic)
        else:
            notes.append(f"stage {stage.index}: the checkpoint has no critic {name} like this one; it starts anew")
    _load_optimizers(checkpoint, stage, name, with_critic=kept)
    random_stream, state = f"rng.stage{stage.index}", stage.random.state
    if checkpoint.boundaries != plan.boundaries:
        notes.append(
            f"stage {stage.index}: cut {checkpoint.boundaries} -> {plan.boundaries}; its random stream starts anew"
        )
    elif checkpoint.places[random_stream][1] != state.shape:
        notes.append(f"stage {stage.index}: saved on another kind of device; its random stream starts anew")
    else:
        _load_into(checkpoint, {random_stream: state})
        stage.random.state = state
    stage.updates = checkpoint.step
    stage.samples = checkpoint.samples
    return notes


def _refuse_other_training(checkpoint: Checkpoint, stage: Stage) -> None:
    """What a run cannot change on its way: packets per step (their numbers count on), and the optimizers' kinds."""
    saved = checkpoint.parts[0]["accumulate"]
    if saved != stage.options.accumulate:
        raise UsageError(
            f"checkpoint {checkpoint.path} was made with accumulate {saved}, not {stage.options.accumulate}; keep it"
        )
    kinds = {kind for part in checkpoint.parts for kind in part["optimizers"]}
    for optimizer in stage.optimizers:
        if type(optimizer).__name__ not in kinds:
            raise UsageError(
                f"checkpoint {checkpoint.path} has the state of {', '.join(sorted(kinds)) or 'no optimizer'}, not of "
                f"{type(optimizer).__name__}; use the optimizer it was made with"
            )


def _load_into(checkpoint: Checkpoint, wanted: dict[str, Tensor]) -> None:
    """Fill the tensors in place."""
    for key, tensor in wanted.items():
        if key not in checkpoint.places:
            raise _of_another_plan(checkpoint, f"it has no {key}")
        shape = checkpoint.places[key][1]
        if shape != tensor.shape:
            raise _of_another_plan(checkpoint, f"{key} is {tuple(shape)} there and {tuple(tensor.shape)} here")
    checkpoint.fill(wanted)


def _load_optimizers(checkpoint: Checkpoint, stage: Stage, name: str, *, with_critic: bool) -> None:
    scalars = {key: value for part in checkpoint.parts for key, value in part["scalars"].items()}
    parameters = stage.named_parameters(name)
    owners = {
        p: optimizer for optimizer in stage.optimizers for group in optimizer.param_groups for p in group["params"]
    }
    wanted: dict[str, Tensor] = {}
    for key in (*checkpoint.places, *scalars):
        if not key.startswith("optimizer."):
            continue
        parameter_name, _, field = key.removeprefix("optimizer.").rpartition(".")
        parameter = parameters.get(parameter_name)
        if parameter is None or parameter not in owners or (parameter_name.startswith("critic.") and not with_critic):
            continue
        state = owners[parameter].state[parameter]
        if key in scalars:
            state[field] = scalars[key]
            continue
        _, shape, dtype = checkpoint.places[key]
        device = _home(owners[parameter], parameter, field)
        state[field] = wanted[key] = torch.empty(shape, dtype=dtype, device=device)
    _load_into(checkpoint, wanted)


def _home(optimizer: Optimizer, parameter: Tensor, field: str) -> torch.device:
    """Where torch keeps a state: beside its parameter; step counters on the CPU unless a fused kernel reads them."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    fused = group.get("fused") or group.get("capturable")
    return torch.device("cpu") if field == "step" and not fused else parameter.device


def load_model(checkpoint: Checkpoint, module: torch.nn.Module) -> None:
    """Fill the user's whole module with the checkpoint's weights and buffers, strictly by its own names.

    Raises:
        UsageError: The checkpoint is of another network.
    """
    refuse_other_network(checkpoint, module)
    _load_into(checkpoint, {f"model.{name}": tensor for name, tensor in module.state_dict().items()})


def refuse_other_network(checkpoint: Checkpoint, module: torch.nn.Module) -> None:
    """Raises UsageError unless the checkpoint has exactly the weights and buffers of this network, in their shapes.

    A stage alone cannot tell: what the checkpoint has and it has not may be another stage's.
    """
    here = {f"model.{name}": tensor.shape for name, tensor in module.state_dict().items()}
    there = {key: shape for key, (_, shape, _) in checkpoint.places.items() if key.startswith("model.")}
    for key in (*here, *there):
        if key not in there:
            raise _of_another_plan(checkpoint, f"it has no {key}")
        if key not in here:
            raise _of_another_plan(checkpoint, f"it has {key}, which this network has not")
        if here[key] != there[key]:
            raise _of_another_plan(checkpoint, f"{key} is {tuple(there[key])} there and {tuple(here[key])} here")


def with_cut_of(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """The plan, cut as the checkpoint is if only a new measurement says otherwise (noise)."""
    same = (len(checkpoint.boundaries), checkpoint.boundaries[-1]) == (len(plan.boundaries), plan.boundaries[-1])
    return replace(plan, boundaries=checkpoint.boundaries) if plan.layer_seconds is not None and same else plan


def _of_another_plan(checkpoint: Checkpoint, why: str) -> UsageError:
    return UsageError(f"checkpoint {checkpoint.path} is of another plan: {why}; use the config it was made with")
