"""decoupled_pp: pipeline-parallel training without the backward pass between GPUs.

The public names are loaded when they are first used (PEP 562), so that parts which need no torch, such as the planner's
simulation, can be imported without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decoupled_pp.common_plan import partition
    from decoupled_pp.contracts import (
        Batch,
        BatchSource,
        CriticContext,
        Data,
        DataInfo,
        Exit,
        LinkError,
        Payload,
        Plan,
        Report,
        TrainingError,
        UsageError,
    )
    from decoupled_pp.models.huggingface import split_transformers
    from decoupled_pp.models.transformers_export import save_transformers
    from decoupled_pp.objective import Critic, View
    from decoupled_pp.shards import write_shards
    from decoupled_pp.splitting import cut_after, flatten, split_blocks, untie
    from decoupled_pp.splitting.traced import split_traced
    from decoupled_pp.trainer import Trainer

__all__ = [
    "Batch",
    "BatchSource",
    "Critic",
    "CriticContext",
    "Data",
    "DataInfo",
    "Exit",
    "LinkError",
    "Payload",
    "Plan",
    "Report",
    "Trainer",
    "TrainingError",
    "UsageError",
    "View",
    "cut_after",
    "flatten",
    "partition",
    "save_transformers",
    "split_blocks",
    "split_traced",
    "split_transformers",
    "untie",
    "write_shards",
]
__version__ = "0.1.0"

_HOMES = {
    "Trainer": "trainer",
    "partition": "common_plan",
    "Critic": "objective",
    "View": "objective",
    "cut_after": "splitting",
    "flatten": "splitting",
    "split_blocks": "splitting",
    "split_traced": "splitting.traced",
    "save_transformers": "models.transformers_export",
    "split_transformers": "models.huggingface",
    "untie": "splitting",
    "write_shards": "shards",
}
"""Where a public name comes from, unless it is in `contracts`."""


def __getattr__(name: str) -> Any:
    """Load a public name; the next use finds it without coming here."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'contracts')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
