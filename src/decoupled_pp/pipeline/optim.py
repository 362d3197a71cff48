"""Builds the optimizers of a stage, from `torch.optim` by name or the user's factory."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from decoupled_pp.core.device import seeded
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.factory import call_factory
from decoupled_pp.core.suggestions import did_you_mean
from decoupled_pp.pipeline.groups import named_parameters, parameter_groups
from decoupled_pp.settings.run import OptimizerSettings

_UNFIT = {
    "LBFGS": "evaluates the loss several times in a step (by a closure), and a packet is computed once; use AdamW",
    "SparseAdam": "takes sparse gradients alone, and they are made dense before every step; use Adam",
    "Optimizer": "is the base class of all optimizers; use AdamW",
}
"""Classes of `torch.optim` that no stage can use, and why."""

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Makes the optimizer of one stage from its trainable parameters (its critic's included)."""

_Groups: TypeAlias = list[dict[str, Any]]


def build_optimizers(
    choice: OptimizerSettings | OptimizerFactory,
    trunk: nn.Module,
    critic: nn.Module | None,
    *,
    owns_head: bool,
    beside: Iterable[nn.Parameter] = (),
) -> list[Optimizer]:
    """Build the optimizers of one stage: one, or two for Muon, or none if nothing requires a gradient.

    `owns_head` is true if the trunk's last layer is the network's head, which Muon leaves to AdamW. Parameters that are
    `beside` the trainable ones are taken although they are frozen now.

    Raises:
        UsageError: Unknown name, wrong arguments, or a factory that returns something else.
    """
    # Layers and critic are updated together, as in decoupled greedy learning (Belilovsky et al. 2020).
    kept = {id(parameter) for parameter in beside}
    named = {k: p for k, p in named_parameters(trunk, critic).items() if p.requires_grad or id(p) in kept}
    if not named:
        return []
    if not isinstance(choice, OptimizerSettings):
        return [_checked(choice(list(named.values())), named, "the optimizer factory")]
    groups = parameter_groups(choice, named, [trunk] if critic is None else [trunk, critic])
    arguments = {"lr": choice.lr, **choice.arguments}
    if ":" in choice.kind:
        given = groups if choice.groups or choice.no_decay else list(named.values())
        return [_checked(call_factory(choice.kind, "optimizer.kind", given, **arguments), named, choice.kind)]
    kind = find_optimizer(choice.kind)
    check_arguments(kind, choice)
    try:
        if kind.__name__ == "Muon":
            return _muon(kind, groups, hidden_matrices(trunk, owns_head), arguments)
        return [kind(groups, **_fused(kind, groups, arguments))]
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"`optimizer`: torch.optim.{kind.__name__} refuses {arguments}: {error}; change `optimizer.arguments`",
            code="optimizer-refuses-arguments",
            key="optimizer.arguments",
        ) from error


def check_arguments(kind: type[Optimizer], choice: OptimizerSettings) -> None:
    """Raise UsageError for arguments that this class of `torch.optim` does not take."""
    _check_arguments(kind, choice.arguments, "optimizer.arguments")
    for number, entry in enumerate(choice.groups):
        rate = {"lr"}  # its bounds are checked with the settings
        own = {name: value for name, value in entry.arguments.items() if name not in rate}
        _check_arguments(kind, own, f"optimizer.groups.{number}")
    if choice.no_decay and "weight_decay" not in inspect.signature(kind).parameters:
        raise UsageError(
            f"`optimizer.no_decay`: torch.optim.{kind.__name__} has no weight decay; leave it out",
            code="optimizer-refuses-arguments",
            key="optimizer.no_decay",
        )


def _check_arguments(kind: type[Optimizer], arguments: Mapping[str, Any], section: str) -> None:
    """Raise UsageError for what torch's own checks miss or do not explain: unknown names, values of another form."""
    parameters = inspect.signature(kind).parameters
    known = {name: parameter.default for name, parameter in parameters.items() if name not in ("params", "lr")}
    for name, value in arguments.items():
        if name not in known:
            fault = f"has no such argument{did_you_mean(name, known)}; one of {', '.join(known)}"
        elif isinstance(known[name], tuple) and not _is_list_like(value, known[name]):
            fault = f"takes a list of {len(known[name])} like {list(known[name])}, not {value!r}"
        elif isinstance(known[name], float) and not isinstance(value, int | float | torch.Tensor):
            fault = f"takes a number like {known[name]}, not {value!r}"
        else:
            continue
        key = f"{section}.{name}"
        raise UsageError(f"`{key}`: torch.optim.{kind.__name__} {fault}", code="optimizer-refuses-arguments", key=key)


def _is_list_like(value: object, default: tuple[Any, ...]) -> bool:
    return isinstance(value, list | tuple) and len(value) == len(default)


def find_optimizer(name: str) -> type[Optimizer]:
    """Return the class of `torch.optim` with this name, in any case; UsageError if a stage cannot use any such."""
    # Read from torch, so that an optimizer of a newer release needs no entry here.
    classes = {key: value for key, value in vars(torch.optim).items() if isinstance(value, type)}
    found = {key: value for key, value in classes.items() if issubclass(value, Optimizer)}
    exact = {key.lower(): key for key in found}.get(name.lower(), name)
    usable = sorted(found.keys() - _UNFIT.keys())
    if exact in usable:
        return found[exact]
    fault = f"torch.optim has no {name!r}{did_you_mean(name, usable)}"
    if exact in _UNFIT:
        fault = f"torch.optim.{exact} {_UNFIT[exact]}"
    raise UsageError(
        f"`optimizer.kind`: {fault}; one of {', '.join(usable)}", code="unknown-optimizer", key="optimizer.kind"
    )


def hidden_matrices(trunk: nn.Module, owns_head: bool) -> set[int]:
    """Return the ids of the weights Muon is made for: those of `nn.Linear` layers other than the network's head."""
    layers = list(trunk.children())
    hidden = layers[:-1] if owns_head else layers
    modules = [module for layer in hidden for module in layer.modules()]
    return {id(module.weight) for module in modules if isinstance(module, nn.Linear)}


def make_gradients_dense(optimizers: Iterable[Optimizer]) -> None:
    """Make sparse gradients (`nn.Embedding(sparse=True)`) dense: most optimizers and clipping take no others."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                    parameter.grad = parameter.grad.to_dense()


def _fused(kind: type[Optimizer], groups: _Groups, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with torch's fused form, unless there is none or the user chose a form."""
    takes = inspect.signature(kind).parameters
    chosen = arguments.keys() & {"fused", "foreach", "differentiable"}
    places = {"cpu"} if kind is torch.optim.Adagrad else {"cpu", "cuda"}  # torch has no fused Adagrad on CUDA
    parameters = [parameter for group in groups for parameter in group["params"]]
    fits = all(p.is_floating_point() and p.device.type in places for p in parameters)
    if "fused" in takes and not chosen and fits:
        return {**arguments, "fused": True}
    return arguments


def _muon(kind: type[Optimizer], groups: _Groups, matrices: set[int], arguments: dict[str, Any]) -> list[Optimizer]:
    """Build Muon for the hidden matrices and AdamW for all else (torch's Muon takes 2-D parameters only)."""
    hidden = [{**group, "params": [p for p in group["params"] if id(p) in matrices]} for group in groups]
    others = [{**_common(group), "params": [p for p in group["params"] if id(p) not in matrices]} for group in groups]
    made: list[Optimizer] = []
    if any(group["params"] for group in hidden):
        # "match_rms_adamw" scales Muon's update so that one learning rate serves both (Liu et al. 2025, 2502.16982).
        made.append(kind(hidden, **{"adjust_lr_fn": "match_rms_adamw", **arguments}))
    if any(group["params"] for group in others):
        adamw = torch.optim.AdamW
        made.append(adamw(others, **_fused(adamw, others, _common(arguments))))
    return made


def _common(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of Muon that mean the same to AdamW."""
    return {key: value for key, value in arguments.items() if key in ("lr", "weight_decay")}


def _checked(optimizer: object, named: Mapping[str, nn.Parameter], source: str) -> Optimizer:
    """Return what a factory returned, if it can train a stage."""
    if not isinstance(optimizer, Optimizer):
        raise UsageError(
            f"`optimizer`: {source} returned {type(optimizer).__name__}; it must return a torch.optim.Optimizer",
            code="optimizer-is-none",
            key="optimizer",
        )
    given = {id(parameter) for parameter in named.values()}
    if any(id(parameter) not in given for group in optimizer.param_groups for parameter in group["params"]):
        raise UsageError(
            f"`optimizer`: {source} returned an optimizer of other parameters than it was given; build it from its "
            "argument, the parameters of one stage",
            code="optimizer-of-other-parameters",
            key="optimizer",
        )
    refuse_closure(optimizer)
    return optimizer


def refuse_closure(optimizer: Optimizer) -> None:
    """Raise UsageError if a step of the optimizer wants the loss once more, at other weights."""
    if all(callable(getattr(optimizer, name, None)) for name in ("first_step", "second_step")):
        # Sharpness-aware ones: some step without a closure, and are then no more than the optimizer that they wrap.
        raise _needs_loss_again(optimizer)
    # By a step of a copy with other parameters, because steps of some optimizers move weights without gradients. Only
    # its complaint matters.
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        tried = copy.deepcopy(optimizer, {id(parameter): nn.Parameter(torch.zeros(1)) for parameter in held})
        set_mode([tried], training=True)
        with seeded(0):  # a step may draw random numbers
            tried.step()
    except Exception as error:
        if "closure" in str(error) or isinstance(error, NotImplementedError):
            raise _needs_loss_again(optimizer) from error


def _needs_loss_again(optimizer: Optimizer) -> UsageError:
    return UsageError(
        f"`optimizer`: {type(optimizer).__name__} needs a closure that evaluates the loss again, and a packet is "
        "computed once; use an optimizer whose step() takes none, such as AdamW",
        code="optimizer-needs-closure",
        key="optimizer",
    )


def has_modes(optimizer: Optimizer) -> bool:
    """Return whether the optimizer keeps weights to train with and others to evaluate, as schedule-free ones do."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def set_mode(optimizers: Iterable[Optimizer], *, training: bool) -> None:
    """Let optimizers that keep both show the weights to train with, or those to evaluate."""
    for optimizer in optimizers:
        if has_modes(optimizer):
            getattr(optimizer, "train" if training else "eval")()
