"""`dpp plan`: a profile measured once serves again, one strategy does not stop the others, bad input is one line."""

import json

import pytest

from decoupled_pp.commands.plan.profile import read_profile
from decoupled_pp.commands.plan.stages import cut_stages
from kit import dpp

CONFIG = "configs/small/digits.yaml"


def _run(*arguments):
    return dpp("plan", *arguments)


def test_a_network_is_measured_planned_and_planned_again(tmp_path, capsys):
    saved, first, second = (str(tmp_path / name) for name in ("profile.json", "first.json", "second.json"))
    assert _run(CONFIG, "--ranks=2", f"--save-profile={saved}", f"--output={first}") == 0
    told = capsys.readouterr().out
    assert _run(CONFIG, "--ranks=2", f"--profile={saved}", f"--output={second}") == 0
    assert capsys.readouterr().out == told  # the same costs, the same prediction
    figures = json.loads((tmp_path / "second.json").read_text())
    assert figures == json.loads((tmp_path / "first.json").read_text())
    assert set(figures["predictions"]) | set(figures["refused"]) == {
        *(
            "decoupled",
            "gpipe",
            "1f1b",
            "interleaved_1f1b",
            "zero_bubble",
            "zbv",
            "deepspeed",
            "data_parallel",
            "backprop",
        )
    }
    one_way = figures["predictions"]["decoupled"]["traffic"]
    assert all(way["gradients"] == 0 for way in one_way)
    assert "Assumptions" in told and "Memory of every rank" in told


def test_the_cut_is_a_table_and_a_picture(tmp_path, capsys):
    """One row for every stage; the figures of a stage are the sums of its layers and its critic."""
    picture, saved = tmp_path / "cut.png", tmp_path / "profile.json"
    arguments = [CONFIG, "--ranks=2", "--strategies=decoupled", f"--picture={picture}", f"--save-profile={saved}"]
    assert _run(*arguments) == 0
    told = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = told[told.index("The decoupled cut") :].splitlines()[1:4]
    assert [line.split()[0] for line in lines] == ["stage", "0", "1"]
    profile = read_profile(saved.read_text())
    stages = cut_stages(profile, (0, 2, 5))
    assert stages[0].critic == profile.critics[1].seconds and stages[1].critic == 0
    assert sum(one.forward for one in stages) == pytest.approx(sum(layer.forward for layer in profile.layers))
    assert stages[0].states == sum(layer.memory for layer in profile.layers[:2]) + profile.critics[1].memory


def test_uneven_devices_and_their_memory_are_respected(tmp_path, capsys):
    """The layers are the same ones: half the speed takes twice the time, and what does not fit is said."""
    saved, figures = str(tmp_path / "profile.json"), tmp_path / "figures.json"
    assert _run(CONFIG, "--ranks=2", f"--save-profile={saved}", f"--output={figures}") == 0
    alike = json.loads(figures.read_text())["predictions"]
    capsys.readouterr()
    again = [CONFIG, "--ranks=2", f"--profile={saved}", f"--output={figures}"]
    assert _run(*again, "--set", "balance.speeds=[0.5, 0.5]") == 0
    slow = json.loads(figures.read_text())["predictions"]
    assert "relative to the measured one" in capsys.readouterr().out
    for kind, one in alike.items():
        assert slow[kind]["step_seconds"] == pytest.approx(2 * one["step_seconds"])
        assert slow[kind]["boundaries"] == one["boundaries"]
    assert _run(*again, "--set", "balance.speeds=[1, 0.01]") == 0
    uneven = json.loads(figures.read_text())["predictions"]["decoupled"]["boundaries"]
    assert uneven == [0, 4, 5]
    assert _run(*again, "--set", "balance.memory=1KiB") == 0
    told = capsys.readouterr().out
    assert "decoupled: not predicted: no cut into 2 stages fits the devices' memory" in told
    assert "1f1b: not predicted: 1f1b needs" in told
    assert _run(*again, "--set", "balance.speeds=[1, 1, 1]") == 2
    assert "one for each rank" in capsys.readouterr().err


def test_a_picture_needs_the_decoupled_cut(capsys):
    assert _run(CONFIG, "--ranks=2", "--strategies=1f1b", "--picture=cut.png") == 2
    assert "--picture is of the decoupled cut, and --strategies leaves it out" in capsys.readouterr().err


def test_a_strategy_that_cannot_run_does_not_stop_the_others(tmp_path, capsys):
    assert _run(CONFIG, "--ranks=4", "--micro-batches=2", "--strategies=decoupled,1f1b,zbv,gpipe") == 0
    told = capsys.readouterr().out
    assert "1f1b: not predicted: 1f1b takes at least as many micro-batches as ranks" in told
    assert "zbv: not predicted: `stages` is 8 but the network has only 5 layers" in told
    assert "\ngpipe " in told


def test_scaling_curves_are_a_table_and_a_picture(tmp_path, capsys):
    picture = tmp_path / "curves.png"
    small = ["--layers=8", "--width=64", "--vocabulary=100", "--sequence=32", "--micro-batches=64"]
    assert _run("--devices=4,16", "--link=25GB/s", "--latency=5us", *small, f"--picture={picture}") == 0
    told = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "strong scaling: 64 micro-batches" in told
    assert "backprop on 4 devices: backprop runs on one device" in told


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "either a configuration and --ranks, or --devices"),
        ([CONFIG, "--ranks=2", "--devices=8"], "either a configuration and --ranks, or --devices"),
        ([CONFIG, "--ranks=0"], "--ranks 0 must be a whole number of at least 1"),
        ([CONFIG, "--ranks=0"], "--ranks 0 must be"),
        ([CONFIG, "--ranks=2", "--layers=3"], "--layers has no effect with a configuration"),
        ([CONFIG, "--ranks=2", "--micro-batches=0"], "micro_batches is 0; it must be at least 1"),
        ([CONFIG, "--ranks=2", "--strategies=2f2b"], "--strategies: '2f2b' is not known; of decoupled"),
        ([CONFIG, "--ranks=2", "--profile=nowhere.json"], "--profile: cannot read nowhere.json"),
        ([CONFIG, "--ranks=2", f"--profile={CONFIG}"], "is not JSON"),
        ([CONFIG, "--ranks=2", "--profile=x", "--measure"], "leave out --measure"),
        ([CONFIG, "--ranks=2", "--save-profile=no/where.json"], "there is no folder no"),
        ([CONFIG, "--ranks=2", "--link=fast"], "'fast' is no bandwidth; write it like 25GB/s"),
        (["--devices=8,x"], "--devices: '8,x' is no list of whole numbers"),
        (["--devices=8", "--ranks=2"], "--ranks has no effect with --devices"),
        (["--devices=8", "--layers=0"], "layers is 0; it must be at least 1"),
        (["--devices=8", "--flops=much"], "--flops: 'much' is no speed"),
        (["--devices=8", "--strategies=backprop"], "no strategy runs on any of [8] devices"),
    ],
)
def test_bad_input(arguments, line, capsys):
    assert _run(*arguments) == 2
    told = capsys.readouterr().err
    assert line in told
    assert told.count("\n") == 1
