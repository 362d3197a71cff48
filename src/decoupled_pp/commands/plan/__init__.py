"""What a pipeline would take before it is run: orders of compute, a simulation of them, and predictions.

`orders`, `programs`, `simulate`, `profile`, `predict`, `transformer` and `scaling` import no torch; `measure` does.
"""
