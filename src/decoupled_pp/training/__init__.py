"""Trains a plan: the public `Trainer` and `partition`, runs from settings, and the baselines by backpropagation."""
