"""Critics: one file for each; `table.py` is the table of kinds."""

from decoupled_pp.critics.check import check_critic
from decoupled_pp.critics.table import KINDS, build_critic

__all__ = [
    "KINDS",
    "build_critic",
    "check_critic",
]
