"""`dpp sweep` end to end, and its differences by hand."""

import json
from pathlib import Path

import pytest

from decoupled_pp.commands.child import Trial
from decoupled_pp.commands.sweep.command import load_sweep
from decoupled_pp.commands.sweep.figures import figures
from decoupled_pp.commands.sweep.runs import Outcome
from decoupled_pp.core.errors import UsageError
from decoupled_pp.settings.load import load_settings
from kit import dpp, refused
from recorded import report, stage_summary

ROOT = Path(__file__).parents[3]
CONFIG = """
name: tiny
data: {kind: digits, batch_size: 64}
model: {kind: mlp, width: 16, depth: 3}
stages: 2
training: {steps: 20}
"""
SWEEP = """
config: tiny.yaml
seeds: [3]
reference: plain
also: {more: {data.validation_fraction: 0.5}}
variants:
  plain: {strategy: backprop}
  head: {critic: {kind: head}, optimizer.lr: 0.002}
  broken: {optimizer.lr: 1.0e+6, optimizer.kind: SGD}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "few.yaml").write_text(SWEEP)
    return tmp_path


def sweep(*arguments):
    return dpp("sweep", "few.yaml", *arguments)


@pytest.mark.slow
def test_variants_over_seeds(here, capsys):
    assert sweep("--jobs=2") == 0
    found = json.loads((here / "runs" / "few" / "sweep.json").read_text(), parse_constant=pytest.fail)
    assert found["variants"].keys() == {"plain", "head"}
    assert found["variants"]["plain"]["loss_change"] == {"median": 0, "min": 0, "max": 0}
    assert len(found["variants"]["plain"]["exits"]) == 1 and len(found["variants"]["head"]["exits"]) == 2
    failed = [one for one in found["runs"] if one["failure"]]
    assert [(one["variant"], one["seed"]) for one in failed] == [("broken", 3)]
    other = found["variants"]["head"]["also"]["more"]
    assert other["loss"]["median"] != found["variants"]["head"]["loss"]["median"] and other["loss_change"] is not None
    assert found["variants"]["plain"]["also"]["more"]["loss_change"] == {"median": 0, "min": 0, "max": 0}
    text = (here / "runs" / "few" / "sweep.md").read_text()
    assert "| head | 1 |" in text and "- broken-3 failed: " in text
    assert (here / "runs" / "few" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    before = (here / "runs" / "few" / "head-3" / "summary.json").stat().st_mtime_ns
    assert sweep("--jobs=2") == 2 and "--overwrite" in capsys.readouterr().err
    assert sweep("--resume") == 0
    assert (here / "runs" / "few" / "head-3" / "summary.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (SWEEP.replace("reference: plain", "reference: plane"), "plane"),
        (SWEEP.replace("critic: {kind: head}", "critic: {kind: hat}"), "hat"),
        (SWEEP.replace("also:", "tune: {optimizer.lr: []}\nalso:"), "tune"),
        (SWEEP.replace("also:", "tune: {optimizer.lr: [0.1]}\nalso:"), "variant head sets `optimizer.lr`"),
    ],
)
def test_bad_input(text, part, here, capsys):
    (here / "few.yaml").write_text(text)
    assert sweep() == 2
    assert part in capsys.readouterr().err
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("text", "code", "part"),
    [
        (SWEEP.replace("seeds", "sedes"), "bad-sweep-file", "sedes"),
        (SWEEP.replace("[3]", "[]"), "bad-sweep-file", "seeds"),
        ("config: [", "not-yaml", "line 1"),
    ],
)
def test_a_file_that_is_no_sweep(text, code, part, here):
    (here / "few.yaml").write_text(text)
    with refused(code, UsageError, part):
        load_sweep(here / "few.yaml")


def test_a_sweep_that_is_not_there(tmp_path):
    with refused("sweep-not-readable", UsageError, "nowhere.yaml"):
        load_sweep(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_published_sweeps_are_sound(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = load_sweep(path)
    for variant in sweep.variants.values():
        load_settings(sweep.config, tuple(f"{key}={json.dumps(value)}" for key, value in variant.items()))


def outcome(variant, seed, loss, accuracy):
    seconds = {"wait_in": 9, "forward": 4, "wait_out": 9, "critic": 2, "backward": 3, "step": 1}
    rows = (
        stage_summary(critic_time_fraction=0.2, critic_parameters=7, parameters=13, phase_seconds=seconds),
        stage_summary(critic_time_fraction=0.0, critic_parameters=0, parameters=13, phase_seconds=seconds),
    )
    name = f"{variant}-{seed}"
    trial = Trial(entry=variant, name=name, folder=None, config="x.yaml", overrides=(), seed=seed, threads=1)
    return Outcome(trial, report(loss, accuracy, per_stage=rows))


def test_differences_are_taken_seed_by_seed():
    runs = [
        outcome("a", 0, 1.0, 0.90),
        outcome("a", 1, 2.0, 0.80),
        outcome("b", 0, 1.1, 0.91),
        outcome("b", 1, 2.4, 0.77),
    ]
    row = figures(runs, "a").variants["b"]
    assert dict(row.loss_change) == pytest.approx({"median": 15, "min": 10, "max": 20})
    assert dict(row.accuracy_change) == pytest.approx({"median": -1, "min": -3, "max": 1})
    assert (row.critic_share, row.critic_parameters) == (pytest.approx(0.235), 7)  # (2 + 1 x 7/20) of 10


def test_a_seed_without_the_reference_has_no_difference():
    runs = [outcome("a", 0, 1.0, None), outcome("b", 1, 2.0, None)]
    row = figures(runs, "a").variants["b"]
    assert row.loss_change is None and row.accuracy_change is None and row.accuracy is None


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"data": {"kind": "idx", "folder": "nowhere"}}, "nowhere"),
        ({"data.kind": "text", "data.files": ["no*.txt"]}, "data.files"),
        ({"optimizer.arguments": {"momentun": 0.9}}, "momentun"),
        ({"stages": 9, "critic.kind": "head"}, "9"),
        ({"start_from": "no-run"}, "no-run"),
        ({"loss": "package:function"}, "package"),
    ],
)
def test_every_variant_is_tried_before_anything_is_written(change, part, here, capsys):
    """The first would run; none does, and no folder is made."""
    variants = {"good": {}, "bad": change}
    (here / "few.yaml").write_text(json.dumps({"config": "tiny.yaml", "seeds": [3], "variants": variants}))
    assert sweep() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("dpp: ") and part in said
    assert not (here / "runs").exists()


def test_other_held_out_data_are_tried_too(here, capsys):
    (here / "few.yaml").write_text(SWEEP.replace("data.validation_fraction: 0.5", "data: {kind: idx, folder: none}"))
    assert sweep() == 2
    assert "none" in capsys.readouterr().err and not (here / "runs").exists()


def test_variants_with_one_run_folder_are_refused(here, capsys):
    (here / "few.yaml").write_text(SWEEP.replace("  broken:", '  "pla in": {}\n  pla,in: {}\n  broken:'))
    assert sweep() == 2 and "pla_in" in capsys.readouterr().err
    assert not (here / "runs").exists()


@pytest.mark.slow
def test_tuning_takes_the_best_of_the_first_seed_for_every_variant(here):
    """Plain and decoupled get the same values; the other seeds run with the best alone; a diverged run never wins."""
    text = SWEEP.replace("seeds: [3]", "seeds: [3, 4]\ntune: {optimizer.lr: [1.0e-4, 0.1, 1.0e+6]}")
    (here / "few.yaml").write_text(text.split("  head:")[0] + "  two halves: {}\n")
    assert sweep("--set=optimizer.kind=SGD", "--set=training.steps=8") == 0
    found = json.loads((here / "runs" / "few" / "sweep.json").read_text())
    assert {name: row["tuned"] for name, row in found["variants"].items()} == {
        "plain": {"optimizer.lr": 0.1},
        "two halves": {"optimizer.lr": 0.1},
    }
    assert [row["seeds"] for row in found["variants"].values()] == [2, 2]
    assert sorted(path.name for path in (here / "runs" / "few").glob("*-4/")) == ["plain-0.1-4", "two_halves-0.1-4"]
    assert len(found["runs"]) == 2 * (3 + 1)
    assert found["variants"]["two halves"]["plain"] == "plain" and found["variants"]["plain"]["depth"] is None
    assert (
        "every variant was tuned alike: optimizer.lr of 0.0001, 0.1, 1000000.0"
        in (here / "runs" / "few" / "sweep.md").read_text()
    )
