"""`dpp plan`: a profile measured once serves again, one strategy does not stop the others, bad input is one line."""

import json

import pytest

from decoupled_pp.commands.plan.costs import read_profile, stage_costs
from decoupled_pp.commands.plan.predict import STRATEGIES
from decoupled_pp.core.errors import UsageError
from kit import refused, run_dpp

CONFIG = "configs/small/digits.yaml"


def test_a_network_is_measured_planned_and_planned_again(tmp_path, capsys):
    saved, first, second = (str(tmp_path / name) for name in ("profile.json", "first.json", "second.json"))
    assert run_dpp("plan", CONFIG, "--ranks=2", f"--save-profile={saved}", f"--output={first}") == 0
    told = capsys.readouterr().out
    assert run_dpp("plan", CONFIG, "--ranks=2", f"--profile={saved}", f"--output={second}") == 0
    assert capsys.readouterr().out == told  # the same costs, the same prediction
    figures = json.loads((tmp_path / "second.json").read_text())
    assert figures == json.loads((tmp_path / "first.json").read_text())
    assert set(figures["predictions"]) | set(figures["refused"]) == set(STRATEGIES)
    one_way = figures["predictions"]["decoupled"]["traffic"]
    assert all(way["gradients"] == 0 for way in one_way)
    assert "Assumptions" in told and "Memory of every rank" in told


def test_the_cut_is_a_table_and_a_picture(tmp_path, capsys):
    """One row for every stage; the figures of a stage are the sums of its layers and its critic."""
    picture, saved = tmp_path / "cut.png", tmp_path / "profile.json"
    arguments = [CONFIG, "--ranks=2", "--strategies=decoupled", f"--picture={picture}", f"--save-profile={saved}"]
    assert run_dpp("plan", *arguments) == 0
    told = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = told[told.index("The decoupled cut") :].splitlines()[1:4]
    assert [line.split()[0] for line in lines] == ["stage", "0", "1"]
    profile = read_profile(saved.read_text())
    costs = stage_costs(profile, (0, 2, 5), critics=True)
    assert costs[0].critic == profile.critics[1].seconds and costs[1].critic == 0
    assert sum(one.forward for one in costs) == pytest.approx(sum(layer.forward for layer in profile.layers))
    assert costs[0].memory == sum(layer.memory for layer in profile.layers[:2]) + profile.critics[1].memory


def test_uneven_devices_and_their_memory_are_respected(tmp_path, capsys):
    """The layers are the same ones: half the speed takes twice the time, and what does not fit is said."""
    saved, figures = str(tmp_path / "profile.json"), tmp_path / "figures.json"
    assert run_dpp("plan", CONFIG, "--ranks=2", f"--save-profile={saved}", f"--output={figures}") == 0
    alike = json.loads(figures.read_text())["predictions"]
    capsys.readouterr()
    again = [CONFIG, "--ranks=2", f"--profile={saved}", f"--output={figures}"]
    assert run_dpp("plan", *again, "--set", "balance.speeds=[0.5, 0.5]") == 0
    slow = json.loads(figures.read_text())["predictions"]
    assert "relative to the measured one" in capsys.readouterr().out
    for kind, one in alike.items():
        assert slow[kind]["step_seconds"] == pytest.approx(2 * one["step_seconds"])
        assert slow[kind]["boundaries"] == one["boundaries"]
    assert run_dpp("plan", *again, "--set", "balance.speeds=[1, 0.01]") == 0
    uneven = json.loads(figures.read_text())["predictions"]["decoupled"]["boundaries"]
    assert uneven == [0, 4, 5]
    assert run_dpp("plan", *again, "--set", "balance.memory=1KiB") == 0
    told = capsys.readouterr().out
    assert "decoupled: not predicted: no cut into 2 stages fits the devices' memory" in told
    assert "1f1b: not predicted: 1f1b needs" in told


def test_a_strategy_that_cannot_run_does_not_stop_the_others(tmp_path, capsys):
    assert run_dpp("plan", CONFIG, "--ranks=4", "--micro-batches=2", "--strategies=decoupled,1f1b,zbv,gpipe") == 0
    told = capsys.readouterr().out
    assert "1f1b: not predicted: 1f1b takes at least as many micro-batches as ranks" in told
    assert "zbv: not predicted: `stages` is 8 but the network has only 5 layers" in told
    assert "\ngpipe " in told


def test_stages_without_critics_are_not_predicted(capsys):
    rule = ["--set", "critic_target.kind=delayed"]
    assert run_dpp("plan", CONFIG, "--ranks=2", "--strategies=decoupled,gpipe", *rule) == 0
    told = capsys.readouterr().out
    assert "decoupled: not predicted: `critic_target` delayed is not planned" in told
    assert "\ngpipe " in told


def test_scaling_curves_are_a_table_and_a_picture(tmp_path, capsys):
    picture = tmp_path / "curves.png"
    small = ["--layers=8", "--width=64", "--vocabulary=100", "--sequence=32", "--micro-batches=64"]
    assert run_dpp("plan", "--devices=4,16", "--link=25GB/s", "--latency=5us", *small, f"--picture={picture}") == 0
    told = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "strong scaling: 64 micro-batches" in told
    assert "backprop on 4 devices: backprop runs on one device" in told


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ([], "options-contradict", "either a configuration and --ranks, or --devices"),
        (
            [CONFIG, "--ranks=2", "--devices=8"],
            "options-contradict",
            "either a configuration and --ranks, or --devices",
        ),
        ([CONFIG, "--ranks=0"], "option-out-of-range", "--ranks 0"),
        ([CONFIG, "--ranks=2", "--layers=3"], "option-without-effect", "--layers"),
        ([CONFIG, "--ranks=2", "--micro-batches=0"], "option-out-of-range", "--micro-batches 0"),
        ([CONFIG, "--ranks=2", "--strategies=2f2b"], "unknown-strategy", "'2f2b'"),
        ([CONFIG, "--ranks=2", "--profile=nowhere.json"], "profile-unreadable", "nowhere.json"),
        ([CONFIG, "--ranks=2", f"--profile={CONFIG}"], "profile-unreadable", CONFIG),
        ([CONFIG, "--ranks=2", "--profile=x", "--measure"], "options-contradict", "leave out --measure"),
        ([CONFIG, "--ranks=2", "--save-profile=no/where.json"], "no-such-folder", "there is no folder no"),
        ([CONFIG, "--ranks=2", "--output=no/where.json"], "no-such-folder", "there is no folder no"),
        ([CONFIG, "--ranks=2", "--link=fast"], "option-unreadable", "'fast'"),
        ([CONFIG, "--ranks=2", "--strategies=1f1b", "--picture=cut.png"], "options-contradict", "--strategies"),
        ([CONFIG, "--ranks=2", "--set", "balance.speeds=[1, 1, 1]"], "not-one-for-each-rank", "[1.0, 1.0, 1.0]"),
        (["--devices=8,x"], "option-unreadable", "'8,x'"),
        (["--devices=8", "--ranks=2"], "option-without-effect", "--ranks"),
        (["--devices=8", "--layers=0"], "option-out-of-range", "--layers 0"),
        (["--devices=8", "--flops=much"], "option-unreadable", "'much'"),
        (["--devices=8", "--strategies=backprop"], "nothing-to-predict", "[8]"),
    ],
)
def test_bad_input(arguments, code, part):
    with refused(code, UsageError, part):
        run_dpp("plan", *arguments)
