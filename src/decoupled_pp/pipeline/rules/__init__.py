"""Training rules: each says what a stage does with a training packet; `table.py` is the table of kinds."""
