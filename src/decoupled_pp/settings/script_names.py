"""Maps fields of sections to the arguments of `Trainer`, `fit` and `partition` that set them in a script.

A script may give a section as a dictionary, `training={"clip_norm": 1}`, or its fields as arguments, `clip_norm=1`.
"""

from __future__ import annotations

from types import MappingProxyType

from decoupled_pp.settings import run
from decoupled_pp.settings.sections import Section

# Not all fields of a run's `logging` make sense in a script, which writes no files.
_SECTIONS: dict[str, type[Section]] = {
    "training": run.TrainingSettings,
    "links": run.LinkSettings,
    "validation": run.ValidationSettings,
    "checkpoint": run.CheckpointSettings,
    "logging": run.MetricsSettings,
    "balance": run.BalanceSettings,
}

TRAINER_SECTIONS = {key: kind for key, kind in _SECTIONS.items() if key != "balance"} | {"training": run.StageSettings}
"""The sections that `Trainer` takes: key in the settings -> class."""


def _names() -> dict[str, str]:
    names = {}
    for section, kind in _SECTIONS.items():
        for field, info in kind.model_fields.items():
            extra = info.json_schema_extra
            names[f"{section}.{field}"] = str(extra["in_scripts"]) if isinstance(extra, dict) else field
    return names


SCRIPT_NAMES = MappingProxyType(_names())
"""Key in the settings file -> argument in a script."""
