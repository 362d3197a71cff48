"""Checkpoints: one consistent cut of all stages, saved, found, resumed and exported."""
