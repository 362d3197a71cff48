"""Updates: they turn the gradients of a stage into new weights; `table.py` is the table of kinds."""
