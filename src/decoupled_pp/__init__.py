"""decoupled_pp: pipeline-parallel training without the backward pass between GPUs.

The public names are loaded when they are first used (PEP 562), so that parts which need no torch, such as the planner's
simulation, can be imported without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decoupled_pp.core.contracts import (
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
    from decoupled_pp.core.objective import Critic, View
    from decoupled_pp.models.huggingface import split_transformers
    from decoupled_pp.models.splitting import cut_after, flatten, split_blocks, untie
    from decoupled_pp.models.splitting.traced import split_traced
    from decoupled_pp.models.transformers_export import save_transformers
    from decoupled_pp.run.checkpoints.shards import write_shards
    from decoupled_pp.training.partition import partition
    from decoupled_pp.training.trainer import Trainer

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
    "Trainer": "training.trainer",
    "partition": "training.partition",
    "Critic": "core.objective",
    "View": "core.objective",
    "cut_after": "models.splitting",
    "flatten": "models.splitting",
    "split_blocks": "models.splitting",
    "split_traced": "models.splitting.traced",
    "save_transformers": "models.transformers_export",
    "split_transformers": "models.huggingface",
    "untie": "models.splitting",
    "write_shards": "run.checkpoints.shards",
}
"""Where a public name comes from, unless it is in `core.contracts`."""


def __getattr__(name: str) -> Any:
    """Load a public name; the next use finds it without coming here."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'core.contracts')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
