"""Predictions agree within 5 % with the published periods of emulated pipelines, where `docs/planner.md` says so."""

import json
from pathlib import Path

import pytest

from decoupled_pp.planner.predict import Setting, StageCosts, predict_stages
from decoupled_pp.planner.simulate import Link

PUBLISHED = sorted((Path(__file__).parents[2] / "docs" / "results" / "schedules_compared").glob("ranks-*.json"))
MESSAGE = Link(latency=260e-6, host=120e-6)
"""A message between neighbours, measured by `dpp bench schedule --ranks 4` on such a machine."""


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
@pytest.mark.parametrize(("strategy", "link"), [("decoupled", Link()), ("1f1b", MESSAGE)])
def test_predicted_beside_measured(strategy, link, path):
    figures = json.loads(path.read_text())
    ranks, count = figures["ranks"], figures["micro_batches"]
    alone = figures[strategy]["alone_ms"]["median"]
    stage = StageCosts(alone / 3, alone / 3, alone / 3, 0.0, 0, 0)
    link = Link(link.latency * 1e3, link.bandwidth, link.host * 1e3)  # in milliseconds, as the figures
    predicted = predict_stages(strategy, [stage] * ranks, Setting(ranks, count, link, figures["capacity"]), 1)
    assert figures[strategy]["period_ms"]["median"] == pytest.approx(predicted.step_seconds / count, rel=0.05)


def test_there_is_something_to_compare_with():
    assert len(PUBLISHED) == 12
