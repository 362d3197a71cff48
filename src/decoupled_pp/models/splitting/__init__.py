"""Any model as a list of layers."""

from decoupled_pp.models.splitting.blocks import split_blocks
from decoupled_pp.models.splitting.sequential import cut_after, flatten
from decoupled_pp.models.splitting.split import Split
from decoupled_pp.models.splitting.tying import untie

__all__ = ["Split", "cut_after", "flatten", "split_blocks", "untie"]
