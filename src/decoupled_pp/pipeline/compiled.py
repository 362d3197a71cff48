"""`torch.compile` for one part of a stage: compiled for itself, and never quietly left uncompiled."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from decoupled_pp.core.errors import TrainingError
from decoupled_pp.core.torch_private import compiler_config, recompile_limit_hit


def compiled(function: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
    """The compiled `function`.

    The compiler keeps what it has made by code object, up to `recompile_limit` versions, and runs the rest uncompiled.
    Stages of one process (every trunk is an `nn.Sequential`) would share that limit; so each part has a code object of
    its own here.

    Args:
        function: A module, or a function of a payload.
        name: What to call it, e.g. "trunk 2"; the compiler keeps which sizes change by this name.

    Returns:
        The same function. It raises TrainingError where the compiler would give up and run it uncompiled.
    """
    config = compiler_config()

    def run(payload: Any) -> Any:
        return function(payload)

    code = run.__code__.replace(co_name=name, co_qualname=name)
    fast = torch.compile(FunctionType(code, run.__globals__, name, None, run.__closure__))

    def call(payload: Any) -> Any:
        try:
            with config.patch(fail_on_recompile_limit_hit=True):
                return fast(payload)
        except recompile_limit_hit() as error:
            raise TrainingError(
                f"compile: {name} would have to be compiled more than {config.recompile_limit} times, for inputs of so "
                "many forms; feed fewer (sizes that change, dtypes), raise torch._dynamo.config.recompile_limit, or "
                "leave compile off"
            ) from error

    return call
