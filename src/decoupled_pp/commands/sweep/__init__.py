"""`dpp sweep`: variants of one configuration, over seeds, in one table."""

from decoupled_pp.commands.sweep.command import add_arguments

__all__ = ["add_arguments"]
