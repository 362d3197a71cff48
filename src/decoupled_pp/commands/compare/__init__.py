"""`dpp compare`: strategies side by side on one configuration."""

from decoupled_pp.commands.compare.command import add_arguments

__all__ = ["add_arguments"]
