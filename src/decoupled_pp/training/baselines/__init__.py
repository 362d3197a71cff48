"""Baselines for decoupled runs: the same network trained by backpropagation, in one process and pipelined."""

from decoupled_pp.training.baselines.strategy import Strategy, Training
from decoupled_pp.training.baselines.table import BASELINES, build_baseline, stages_needed

__all__ = ["BASELINES", "Strategy", "Training", "build_baseline", "stages_needed"]
