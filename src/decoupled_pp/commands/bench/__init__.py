"""`dpp bench`: measures speed and memory on this machine."""

from decoupled_pp.commands.bench.command import add_arguments

__all__ = ["add_arguments"]
