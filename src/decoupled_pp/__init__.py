"""decoupled_pp: pipeline-parallel training without the backward pass between GPUs."""

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
from decoupled_pp.trainer import Trainer, partition

__all__ = [
    "Batch",
    "BatchSource",
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
    "partition",
]
__version__ = "0.1.0"
