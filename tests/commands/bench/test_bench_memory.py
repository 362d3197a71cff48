"""`dpp bench memory`: what a decoupled rank holds depends on neither ranks nor micro-batches; table and figure."""

import argparse
import json

import pytest

from decoupled_pp.commands.bench import memory
from decoupled_pp.commands.bench.memory_report import table
from decoupled_pp.commands.bench.schedule import STRATEGIES
from decoupled_pp.commands.main import main
from ranks import launch


def _chosen(*strategies):
    return argparse.Namespace(strategies=list(strategies), width=8, tokens=6, batch=2, ranks="2,4", per_rank="1,2")


def _bytes_of(results, strategy):
    return {one["micro_batches"]: one["bytes"] for one in results if one["strategy"] == strategy}


def _measured(strategies, multiples, size, folder):
    results = [r.value for r in launch(memory.measure, _chosen(*strategies), multiples, size=size, folder=folder)]
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


def test_table_and_figure(tmp_path, capsys):
    one = {"ranks": 2, "micro_batches": 2}
    results = [
        {**one, "strategy": "decoupled", "bytes": [2048, 1024]},
        {**one, "strategy": "zbv", "refused": "too few"},
    ]
    memory.report(results, _chosen("decoupled", "zbv"), tmp_path)
    text = (tmp_path / "memory.md").read_text()
    assert text == table(results, ["decoupled", "zbv"]) == capsys.readouterr().out
    assert "| 2 | 2 | 2 | refused |\n" in text
    assert "zbv: not measured: too few\n" in text
    assert json.loads((tmp_path / "memory.json").read_text())["measurements"] == results
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--ranks=2,1"], "--ranks '2,1': each must be at least 2"),
        (["--per-rank=x"], "--per-rank 'x' must be whole numbers with commas between them"),
        (["--strategies=backprop"], "--strategies: 'backprop' is not known; of decoupled, gpipe"),
        (["--width=6"], "--width 6 must be a multiple of 4 (heads); --tokens 64 and --batch 4 at least 1"),
    ],
)
def test_bad_input(arguments, line, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "memory", "--output", str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
