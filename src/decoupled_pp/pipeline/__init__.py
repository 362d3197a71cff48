"""The method: one stage, its training rule, and the loop of one rank. Read `stage.py` and `runtime.py` first."""
