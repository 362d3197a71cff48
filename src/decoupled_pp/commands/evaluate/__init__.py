"""`dpp evaluate`: scores, costs and gradients of the exits of a finished run."""

from decoupled_pp.commands.evaluate.command import add_arguments

__all__ = ["add_arguments"]
