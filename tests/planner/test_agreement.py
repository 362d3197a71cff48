"""The simulation, given the measured parts of published runs, agrees with their periods as `docs/planner.md` says."""

import json
from pathlib import Path

import pytest

from decoupled_pp.benchmarks.predicted import Emulation, MessageCost, predicted_period
from decoupled_pp.planner.orders import stages_per_rank

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PUBLISHED = sorted((RESULTS / "schedules_compared").glob("ranks-*.json"))
STRATEGIES = ("decoupled", "gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv", "deepspeed")
CROWDED = 16
"""Ranks from which on the ranks' own Python fills the two cores of the machine, which the simulation does not know."""


def recomputed(figures, kind):
    """Milliseconds per micro-batch from the median pass and message of a run."""
    own = {key: value["median"] / 1e3 for key, value in figures[kind].items() if key.endswith("_pass_ms")}
    passes = (own["forward_pass_ms"], own["input_pass_ms"], own["weights_pass_ms"])
    per_rank = 1 if kind == "decoupled" else stages_per_rank(kind)
    stages = iter(range(per_rank * figures["ranks"]))
    message = (figures[kind][f"message_{part}_us"]["median"] / 1e6 for part in ("latency", "transfer", "host"))
    emulation = Emulation(
        ranks=figures["ranks"],
        micro_batches=figures["micro_batches"],
        steps=figures["steps"],
        packets=figures["packets"],
        fill=max(5, figures["packets"] // 5),
        capacity=figures["capacity"],
        message_bytes=4096,
        forward=figures["forward_ms"] / 1e3,
        backward=figures["backward_ms"] / 1e3,
        factors=lambda rank, number: (1.0, 1.0),
    )
    all_passes = [{next(stages): passes for _ in range(per_rank)} for _ in range(figures["ranks"])]
    return 1e3 * predicted_period(kind, all_passes, MessageCost(*message), emulation)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", STRATEGIES)
def test_predicted_beside_measured(kind, path):
    figures = json.loads(path.read_text())
    predicted, published = recomputed(figures, kind), figures[kind]["predicted_ms"]["median"]
    assert predicted == pytest.approx(published, rel=0.02)  # medians of passes, not every rank's own
    if figures["ranks"] < CROWDED:
        assert figures[kind]["period_ms"]["median"] == pytest.approx(published, rel=0.05)


def test_there_is_something_to_compare_with():
    assert len(PUBLISHED) == 12
