"""Proposes modules after which a model may be cut, so that the parts have about as much work."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.device import untouched
from decoupled_pp.core.torch_private import own_parameters, pytree
from decoupled_pp.models.splitting.arguments import fails_on_sample
from decoupled_pp.models.splitting.call import forward_call, network_output

_DEPTHS = 6  # levels of nesting that are looked at


def proposals(model: nn.Module, sample: Any, stages: int) -> Iterator[list[str]]:
    """Yield lists of names of modules to cut after, the coarsest first.

    A cut is after a module that runs once and at one level with the others; its work is estimated as multiplications.
    """
    order, work = _run(model, sample)
    seen: list[list[str]] = []
    for depth in range(1, _DEPTHS):
        units = [name for name in order if name.count(".") + 1 == depth or _is_leaf_above(name, depth, model)]
        names = _even(units, order, work, stages)
        if names and names not in seen:
            seen.append(names)
            yield names


def _is_leaf_above(name: str, depth: int, model: nn.Module) -> bool:
    return name.count(".") + 1 < depth and not any(model.get_submodule(name).children())


def _run(model: nn.Module, sample: Any) -> tuple[list[str], dict[str, float]]:
    """Return the names of the modules that end once, in that order, and the work of each with all in it."""
    call, inputs = forward_call(model, sample, {}, network_output)
    names = {module: name for name, module in model.named_modules() if name}
    ended: list[str] = []
    work: defaultdict[str, float] = defaultdict(float)

    def note(module: nn.Module, _: Any, result: Any) -> None:
        name = names[module]
        ended.append(name)
        cost = _multiplications(module, result)
        for length in range(name.count(".") + 1):
            work[name.rsplit(".", length)[0]] += cost

    with ExitStack() as hooks, torch.no_grad(), untouched(model, inputs[0].device):
        model.eval()
        for module in names:
            hooks.callback(module.register_forward_hook(note).remove)
        try:
            call.run(model, inputs)
        except Exception as error:
            raise fails_on_sample(model, error) from error
    times = Counter(ended)
    return [name for name in ended if times[name] == 1], dict(work)


def _multiplications(module: nn.Module, result: Any) -> float:
    """Estimate the multiplications of a module without those of its parts, from its weights and its result."""
    made = sum(leaf.numel() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
    weights = [one for one in own_parameters(module).values() if one is not None and one.dim() > 1]
    return 1.0 + sum(weight.numel() / weight.shape[0] * made for weight in weights)


def _even(units: list[str], order: list[str], work: dict[str, float], stages: int) -> list[str]:
    """Return the units after which the work is closest to equal shares; none if they are too few."""
    total = sum(work[name] for name in units)
    done = 0.0
    ends: list[float] = []
    for name in units:
        done += work[name]
        ends.append(done / total if total else 0.0)
    names: list[str] = []
    first = 0
    for cut in range(1, stages):
        last = len(units) - 1 - (stages - 1 - cut)  # every later part needs a unit
        if first >= last:
            return []
        place = min(range(first, last), key=lambda index: abs(ends[index] - cut / stages))
        names.append(units[place])
        first = place + 1
    return names
