"""Keeps and shows a run: its folder, log, terminal view, pictures, trace, report and checkpoints."""
