"""How the gradients of a stage become new weights; `table.py` is the table of kinds."""
