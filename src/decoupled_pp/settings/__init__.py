"""Declares every option of a run, once: its name, type, default and check."""
