"""The report of runs that did not all go well."""

import json

import pytest
from compared import contender, run

from decoupled_pp.commands.compare.pages import Comparison, Setup, write_pages
from recorded import stage_summary

SETUP = Setup(
    config="x.yaml", command="dpp compare x.yaml", ranks=2, micro_batches=2, batch_size=4, tokens_per_sample=None,
    threads=1,
)  # fmt: skip


def test_a_contender_that_diverged_is_in_the_report(tmp_path):
    runs = [run("1f1b", losses=(3.0, None, None)), run("zbv", losses=(3.0, 1.5, 1.25))]
    entries = [contender("1f1b"), contender("zbv")]
    write_pages(tmp_path, Comparison(SETUP, entries, runs, {}))
    found = json.loads((tmp_path / "compare.json").read_text(), parse_constant=pytest.fail)
    assert found["targets"] == {"0": 1.25}
    assert found["strategies"]["1f1b"]["val_loss"]["median"] is None
    text = (tmp_path / "compare.md").read_text()
    assert "| 1f1b | inf |" in text and "| not reached | 0 of 1 |" in text
    assert "inf" in (tmp_path / "report.html").read_text()


def test_runs_too_short_for_a_rate_have_a_report(tmp_path):
    rows = [stage_summary(critic_parameters=5), stage_summary()]
    runs = [run("decoupled", mean=None, stages=rows), run("1f1b", mean=None)]
    entries = [contender("decoupled"), contender("1f1b")]
    write_pages(tmp_path, Comparison(SETUP, entries, runs, {}))
    assert "measured: -." in (tmp_path / "compare.md").read_text()
