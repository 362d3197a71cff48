"""decoupled_pp: pipeline-parallel training without the backward pass between GPUs.

The public names are loaded when they are first used (PEP 562), so that parts which need no torch, such as the planner's
simulation, can be imported without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decoupled_pp.core.datasets import BatchSource, Data, DataInfo
    from decoupled_pp.core.errors import LinkError, TrainingError, UsageError
    from decoupled_pp.core.objective import Critic, CriticContext, View
    from decoupled_pp.core.packets import Batch, Payload
    from decoupled_pp.core.plans import Plan
    from decoupled_pp.core.reports import Exit, Report
    from decoupled_pp.models.huggingface import split_transformers
    from decoupled_pp.models.split import split
    from decoupled_pp.models.splitting import cut_after, flatten, split_blocks, untie
    from decoupled_pp.models.splitting.traced import split_traced
    from decoupled_pp.models.transformers_export import save_transformers
    from decoupled_pp.run.checkpoints.shards import write_shards
    from decoupled_pp.run.saved import load
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
    "load",
    "partition",
    "save_transformers",
    "split",
    "split_blocks",
    "split_traced",
    "split_transformers",
    "untie",
    "write_shards",
]
__version__ = "0.1.0"

_HOMES = {
    "Batch": "core.packets",
    "BatchSource": "core.datasets",
    "Critic": "core.objective",
    "CriticContext": "core.objective",
    "Data": "core.datasets",
    "DataInfo": "core.datasets",
    "Exit": "core.reports",
    "LinkError": "core.errors",
    "Payload": "core.packets",
    "Plan": "core.plans",
    "Report": "core.reports",
    "Trainer": "training.trainer",
    "TrainingError": "core.errors",
    "UsageError": "core.errors",
    "View": "core.objective",
    "cut_after": "models.splitting",
    "flatten": "models.splitting",
    "load": "run.saved",
    "partition": "training.partition",
    "save_transformers": "models.transformers_export",
    "split": "models.split",
    "split_blocks": "models.splitting",
    "split_traced": "models.splitting.traced",
    "split_transformers": "models.huggingface",
    "untie": "models.splitting",
    "write_shards": "run.checkpoints.shards",
}
"""The file that each public name comes from."""


def __getattr__(name: str) -> Any:
    """Load a public name; the next use finds it without coming here."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
