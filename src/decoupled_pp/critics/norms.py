"""Takes computed weights (weight_norm, spectral_norm, parametrizations) off a copied layer, and puts them back on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias, cast

from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from decoupled_pp.core.torch_private import forward_pre_hooks

_POWER_ITERATIONS = 15
"""Computations of a weight after which a norm that goes on from one to the next has settled, as torch has it."""

_PutBack: TypeAlias = Callable[[], object]


@contextmanager
def plain_weights(layer: nn.Module) -> Iterator[list[nn.Module]]:
    """Let all weights in a layer be parameters of their own inside, which an initialisation can fill.

    Yields the parametrizations that were taken off, which may have parameters too.
    """
    modules = list(layer.modules())
    computed = [one for module in modules for name in _parametrized(module) for one in _chain(module, name)]
    put_back = [back for module in modules for back in _taken_off(module)]
    yield computed
    for back in put_back:
        back()


def _taken_off(module: nn.Module) -> list[_PutBack]:
    put_back = [back for hook in forward_pre_hooks(module) for back in _without_hook(module, hook)]
    return put_back + [_without_parametrizations(module, name) for name in _parametrized(module)]


def _parametrized(module: nn.Module) -> list[str]:
    """Return the names of the module's own parametrized tensors."""
    if not parametrize.is_parametrized(module):
        return []
    return [name for name, _ in cast(nn.Module, module.parametrizations).named_children()]


def _chain(module: nn.Module, name: str) -> list[nn.Module]:
    return list(cast(nn.ModuleDict, module.parametrizations)[name].children())


def _without_hook(module: nn.Module, hook: object) -> list[_PutBack]:
    """Take off one of the older norms, which are hooks."""
    if isinstance(hook, WeightNorm):
        utils.remove_weight_norm(module, hook.name)
        return [partial(utils.weight_norm, module, hook.name, hook.dim)]
    if isinstance(hook, SpectralNorm):
        utils.remove_spectral_norm(module, hook.name)
        return [partial(utils.spectral_norm, module, hook.name, hook.n_power_iterations, hook.eps, hook.dim)]
    return []


def _without_parametrizations(module: nn.Module, name: str) -> _PutBack:
    chain = _chain(module, name)
    # torch keeps the computed weight as a property of a class that copies share, and removes it there.
    shared = type(module)
    members = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)
    parametrize.remove_parametrizations(module, name)

    def put_back() -> None:
        for one in chain:
            parametrize.register_parametrization(module, name, one)
        for _ in range(_POWER_ITERATIONS):
            getattr(module, name)

    return put_back
