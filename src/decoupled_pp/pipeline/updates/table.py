"""Holds the table of updates."""

from __future__ import annotations

from decoupled_pp.pipeline.updates.update import Update

UPDATES: dict[str, type[Update]] = {"alone": Update}
"""Name of who holds a stage -> its update; `alone`: one rank."""
