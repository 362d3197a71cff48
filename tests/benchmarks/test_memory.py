"""`dpp bench memory`: what a decoupled rank holds depends on neither ranks nor micro-batches; table and figure."""

import json
import subprocess
import sys

import pytest

from benchmarks.memory import draw, table
from benchmarks.memory_measure import GptSize, measure
from benchmarks.schedule import STRATEGIES
from decoupled_pp.core.errors import UsageError
from kit import refused, run_dpp
from ranks import launch

SMALL = GptSize(width=8, tokens=6, batch=2)


def _bytes_of(results, strategy):
    return {one["micro_batches"]: one["bytes"] for one in results if one["strategy"] == strategy}


def _measured(strategies, multiples, size, folder):
    results = [r.value for r in launch(measure, strategies, multiples, SMALL, size=size, folder=folder)]
    assert all(one == results[0] for one in results)
    return results[0]


def test_every_strategy_on_two_ranks(tmp_path):
    results = _measured(STRATEGIES, [1, 2], 2, tmp_path)
    found = {kind: _bytes_of(results, kind) for kind in STRATEGIES}
    assert all(peak > 0 for kind in STRATEGIES for peaks in found[kind].values() for peak in peaks)
    assert found["decoupled"][2] == found["decoupled"][4]
    assert found["gpipe"][4][0] == 2 * found["gpipe"][2][0]  # all micro-batches are in flight before the first backward
    assert found["1f1b"][2][0] < 1.01 * found["1f1b"][4][0] < 1.03 * found["1f1b"][2][0]


def test_a_decoupled_rank_holds_the_same_among_more_ranks(tmp_path):
    two = _bytes_of(_measured(["decoupled"], [1], 2, tmp_path / "2"), "decoupled")[2]
    four = _bytes_of(_measured(["decoupled"], [1], 4, tmp_path / "4"), "decoupled")[4]
    assert (four[0], four[-1]) == (two[0], two[-1])  # with the embedding, with the head
    assert max(four) <= max(two)


def test_table_and_figure(tmp_path):
    one = {"ranks": 2, "micro_batches": 2}
    results = [
        {**one, "strategy": "decoupled", "bytes": [2048, 1024]},
        {**one, "strategy": "zbv", "refused": "too few"},
    ]
    text = table(results, ["decoupled", "zbv"])
    assert "| 2 | 2 | 2 | refused |\n" in text
    assert "zbv: not measured: too few\n" in text
    draw(results, ["decoupled", "zbv"], tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_the_whole_command(tmp_path):
    command = [sys.executable, "-m", "decoupled_pp", "bench", "memory", f"--output={tmp_path}"]
    subprocess.run([*command, "--ranks=2", "--strategies=decoupled,gpipe"], check=True, capture_output=True, timeout=90)
    written = json.loads((tmp_path / "memory.json").read_text())
    assert written["arguments"]["width"] == 64
    found = {(one["strategy"], one["micro_batches"]): max(one["bytes"]) for one in written["measurements"]}
    assert found["decoupled", 2] == found["decoupled", 8]
    assert {count: round(found["gpipe", count] / 1024) for count in (2, 4, 8)} == {
        2: 4904,
        4: 9808,
        8: 19616,
    }  # as published
    assert {path.name for path in tmp_path.iterdir()} == {"memory.json", "memory.md", "memory.png"}


@pytest.mark.parametrize(
    ("option", "code", "part"),
    [
        ("--ranks=2,1", "option-unreadable", "--ranks 2,1"),
        ("--ranks=2.5", "option-unreadable", "whole numbers"),
        ("--strategies=backprop", "unknown-strategy", "'backprop'"),
    ],
)
def test_bad_input(option, code, part, tmp_path):
    with refused(code, UsageError, part):
        run_dpp("bench", "memory", f"--output={tmp_path / 'out'}", option)
    assert not (tmp_path / "out").exists()
