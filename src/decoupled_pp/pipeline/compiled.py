"""Compiles one part of a stage by `torch.compile`: for itself, and never quietly left uncompiled."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from decoupled_pp.core.errors import TrainingError
from decoupled_pp.core.torch_private import compiler_config, recompile_limit_hit


def compiled(function: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
    """Compile a module or a function of a payload; TrainingError where the compiler would give up and run it as it is.

    The compiler remembers by the name (such as "trunk 2") which sizes change.
    """
    config = compiler_config()

    def run(payload: Any) -> Any:
        return function(payload)

    # The compiler keeps up to `recompile_limit` versions per code object, and runs further ones uncompiled. Stages of
    # one process would share that limit: every trunk is an `nn.Sequential`. So each part gets a code object of its own.
    code = run.__code__.replace(co_name=name, co_qualname=name)
    fast = torch.compile(FunctionType(code, run.__globals__, name, None, run.__closure__))

    def call(payload: Any) -> Any:
        try:
            # For this call alone: what else the user compiles in this process keeps torch's own behaviour.
            with config.patch(fail_on_recompile_limit_hit=True):
                return fast(payload)
        except recompile_limit_hit() as error:
            raise TrainingError(
                f"`training.compile`: {name} would have to be compiled more than {config.recompile_limit} times, for "
                "inputs of so many forms; feed fewer (sizes that change, dtypes), raise "
                "torch._dynamo.config.recompile_limit, or set `training.compile` to false",
                code="too-many-recompilations",
                key="training.compile",
            ) from error

    return call
