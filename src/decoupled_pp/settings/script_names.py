"""Maps fields of sections to the arguments of `Trainer`, `fit` and `partition` that set them in a script.

Sections are the only declaration of an option. A script may give a section as a dictionary,
`training={"clip_norm": 1}`, or its fields as arguments, `clip_norm=1`; this table says which argument is which field.
"""

from __future__ import annotations

from types import MappingProxyType

from decoupled_pp.settings.run import (
    BalanceSettings,
    CheckpointSettings,
    LinkSettings,
    MetricsSettings,
    StageSettings,
    TrainingSettings,
    ValidationSettings,
)
from decoupled_pp.settings.sections import Section

_SECTIONS: dict[str, type[Section]] = {
    "training": TrainingSettings,
    "links": LinkSettings,
    "validation": ValidationSettings,
    "checkpoint": CheckpointSettings,
    "logging": MetricsSettings,
    "balance": BalanceSettings,
}

TRAINER_SECTIONS: dict[str, type[Section]] = {**_SECTIONS, "training": StageSettings}
del TRAINER_SECTIONS["balance"]
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
