"""Today's planner agrees with the published periods of emulated pipelines, as `docs/planner.md` says.

From the passes and messages that were measured beside them, on 2, 4 and 8 ranks; 16 ranks fill the 2 cores they ran on.
"""

import json
from pathlib import Path

import pytest

from decoupled_pp.benchmarks.predicted import Emulation, MessageCost, predicted_period
from decoupled_pp.planner.orders import stages_per_rank

FOLDER = Path(__file__).parents[2] / "docs" / "results" / "schedules_compared"
PUBLISHED = sorted(FOLDER.glob("ranks-[248]-*.json"))
GOAL = 0.05


def ratio(figures, strategy):
    """Measured over predicted; times in milliseconds."""
    own = {key: values["median"] for key, values in figures[strategy].items()}
    emulation = Emulation(
        ranks=figures["ranks"],
        micro_batches=figures["micro_batches"],
        steps=figures["steps"],
        packets=figures["packets"],
        fill=12,
        capacity=figures["capacity"],
        message_bytes=1,
        forward=figures["forward_ms"],
        backward=figures["backward_ms"],
        factors=lambda rank, number: (1.0, 1.0),
    )
    passes = own["forward_pass_ms"], own["input_pass_ms"], own["weights_pass_ms"]
    stages = {stage: passes for stage in range(figures["ranks"] * stages_per_rank(strategy))}
    message = MessageCost(*(own[f"message_{part}_us"] / 1000 for part in ("latency", "transfer", "host")))
    return own["period_ms"] / predicted_period(strategy, [stages], message, emulation)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_predicted_beside_measured(path):
    figures = json.loads(path.read_text())
    measured = [kind for kind in figures["strategies"] if kind not in figures["refused"]]
    assert len(measured) == 7
    far = {kind: ratio(figures, kind) for kind in measured}
    assert {kind: value for kind, value in far.items() if abs(value - 1) > GOAL} == {}


def test_there_is_something_to_compare_with():
    assert len(PUBLISHED) == 9
