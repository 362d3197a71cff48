"""From a list of layers to a plan: measure, cut, check.

The package is named so because `dpp.partition` is the public function.
"""

from decoupled_pp.models.cutting.cut import Fits, listed_cut, minmax_cut, uniform_cut
from decoupled_pp.models.cutting.layers import as_sequential, critic_context, trace
from decoupled_pp.models.cutting.measure import measure_critics, measure_layers, measure_passes
from decoupled_pp.models.cutting.network import By, cut_network
from decoupled_pp.models.cutting.objective import stand_in_objective
from decoupled_pp.models.cutting.shared import refuse_shared

__all__ = [
    "By",
    "Fits",
    "as_sequential",
    "critic_context",
    "cut_network",
    "listed_cut",
    "measure_critics",
    "measure_layers",
    "measure_passes",
    "minmax_cut",
    "refuse_shared",
    "stand_in_objective",
    "trace",
    "uniform_cut",
]
