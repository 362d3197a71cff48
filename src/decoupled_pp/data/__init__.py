"""Data sets as seeded, resumable micro-batches; `table.py` is the table of kinds."""

from decoupled_pp.data.iterables import ListedBatches, as_source
from decoupled_pp.data.table import KINDS, open_data

__all__ = [
    "KINDS",
    "ListedBatches",
    "as_source",
    "open_data",
]
