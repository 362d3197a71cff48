"""The table of updates."""

from __future__ import annotations

from decoupled_pp.pipeline.updates.update import Update

UPDATES: dict[str, type[Update]] = {"alone": Update}
"""How a stage is held -> its update; `alone`: by one rank."""
