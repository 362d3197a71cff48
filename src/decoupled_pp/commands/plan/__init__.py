"""`dpp plan`: predicts what every strategy would take, before anything is run.

All files but `measure` import no torch: a prediction from a saved profile takes a second.
"""

from decoupled_pp.commands.plan.command import add_arguments

__all__ = ["add_arguments"]
