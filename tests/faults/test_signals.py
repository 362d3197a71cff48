"""Signals to real launches, as a terminal, a batch system or the kernel sends them; and restarts by the launcher."""

import signal
import socket
import time
from pathlib import Path

import pytest
import torch

import launched

SLOW = {"stages": 2, "cut": [3, 4], "training": {"steps": 400}}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _launch(*more, behind=2):
    launched.write_settings(**SLOW, model=launched.factory("slow", seconds=0.05, behind=behind))
    command = launched.Command("decoupled_pp", "train", "run.yaml", "--ranks=2", *more)
    command.until(lambda: launched.checkpoint_steps() and (launched.FOLDER / "metrics.jsonl").read_text())
    return command


def _check_kept():
    assert launched.checkpoint_steps() and launched.metrics()
    Path("hurry").touch()
    assert launched.dpp("evaluate", launched.FOLDER) == 0  # opens and verifies the newest


def _got_sigterm(rank):
    return f"dpp: rank {rank} got SIGTERM"


def _go_on():
    step = launched.checkpoint_steps()[-1]
    return f"the checkpoint at step {step} is kept; go on with: dpp train run.yaml --ranks 2 --resume"


def _equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_ctrl_c_saves_on_all_ranks_and_says_how_to_go_on():
    command = _launch("--set=seed=3")
    command.signal(signal.SIGINT)
    code, errors = command.wait()
    assert code == 130
    (line,) = errors.splitlines()
    assert line.startswith("dpp: interrupted at step ")
    assert line.endswith("saved. Go on with: dpp train run.yaml --set seed=3 --ranks 2 --resume")
    step = int(line.split()[4].strip(";"))
    assert launched.checkpoint_steps()[-1] == step < 400
    Path("hurry").touch()
    short = f"--set=training.steps={step + 3}"
    assert launched.dpp("train", "run.yaml", "--set=seed=3", short, "--resume") == 0
    assert launched.dpp("train", "run.yaml", "--set=seed=3", short, "--set=name=whole") == 0
    assert _equal(launched.weights(), launched.weights(Path("runs/whole")))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_to_one_rank_ends_the_run_for_good(rank):
    """A cluster that takes its machine back signals single processes; nobody is to start them again."""
    command = _launch("--max-restarts=5")
    command.signal_rank(rank, signal.SIGINT)
    code, errors = command.wait()
    assert code == 130
    (line,) = launched.said(errors)
    assert line.startswith("dpp: interrupted at step ") and line.endswith("--ranks 2 --resume")
    assert launched.checkpoint_steps()[-1] == int(line.split()[4].strip(";")) < 400


@pytest.mark.parametrize(
    ("number", "code", "text"),
    [(signal.SIGINT, 130, "dpp: interrupted"), (signal.SIGTERM, 143, "dpp: rank 0 got SIGTERM")],
)
def test_signals_are_heard_while_ranks_join(number, code, text, monkeypatch):
    """The other rank never comes; torch waits for it in C++."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched.write_settings(links={"timeout_seconds": 3600.0})
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    command = launched.Command("decoupled_pp", "train", "run.yaml")
    command.until(lambda: _listens(port))
    time.sleep(1.0)
    command.signal(number)
    ended, errors = command.wait(120)
    assert ended == code
    (line,) = launched.said(errors)
    assert line.startswith(text) and line.endswith("no checkpoint was saved")


def _listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_sigterm_to_the_launcher_ends_all():
    command = _launch()
    command.signal(signal.SIGTERM)
    code, errors = command.wait()
    assert code == 143
    *told, last = errors.splitlines()
    assert sorted(told) == sorted(["dpp: got SIGTERM, so all ranks were told to end", *map(_got_sigterm, range(2))])
    assert last == f"dpp: {_go_on()}"
    _check_kept()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_rank_is_the_exit_code_of_the_launch(rank):
    command = _launch()
    command.signal_rank(rank, signal.SIGTERM)
    code, errors = command.wait()
    assert code == 143
    *said, last = errors.splitlines()
    ended = f"dpp: rank {1 - rank}: ended because of rank {rank}: rank {rank} got SIGTERM"
    assert sorted(said) == sorted([_got_sigterm(rank), ended])
    assert last == f"dpp: {_go_on()}"


@pytest.mark.slow
def test_a_killed_rank_is_named_by_the_survivor_and_the_launcher():
    command = _launch()
    command.signal_rank(0, signal.SIGKILL)
    code, errors = command.wait()
    assert code == 128 + signal.SIGKILL
    lines = errors.splitlines()
    assert len(lines) == 3 and all(line.startswith("dpp: ") for line in lines), errors
    assert lines[2] == f"dpp: {_go_on()}"
    assert "rank 1: stage 0 (rank 0) is gone" in lines[0] and "rank 0" in lines[1] and "SIGKILL" in lines[1]
    _check_kept()


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_rank_behind():
    """Its store is gone with it; packets need none, so the ranks save at one step and end."""
    command = _launch()
    before = launched.checkpoint_steps()[-1]
    command.signal(signal.SIGKILL)
    code, errors = command.wait()
    assert code == -signal.SIGKILL
    lines = launched.said(errors)
    assert lines == errors.splitlines()  # and no call stacks of torch's
    assert len(lines) == 2 and all("the launcher is gone: its store does not answer" in line for line in lines), errors
    assert all(line.endswith(_go_on()) for line in lines), errors
    assert before <= launched.checkpoint_steps()[-1] < 400
    _check_kept()


@pytest.mark.slow
def test_a_restarted_launch_goes_on_by_itself():
    launched.write_settings(
        cut=[3, 4],
        model=launched.factory("dies_once", at=5, number=int(signal.SIGKILL), behind=4),
        training={"steps": 8},
    )
    code, errors = launched.Command("decoupled_pp", "train", "run.yaml", "--ranks=2", "--max-restarts=1").wait()
    assert code == 0, errors
    assert Path("died").exists() and "is gone" in errors and "Traceback" not in errors
    assert launched.dpp("train", "run.yaml", "--set=name=undisturbed") == 0
    assert _equal(launched.weights(), launched.weights(Path("runs/undisturbed")))
    assert [r["step"] for r in launched.metrics() if r["kind"] == "train" and r["stage"] == 0] == [2, 4, 6, 8]


@pytest.fixture
def restarted(monkeypatch):
    """This process belongs to a launch whose workers torchrun starts again by itself."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    return lambda: monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


def test_a_restart_after_the_end_leaves_the_results(restarted):
    launched.write_settings()
    assert launched.dpp("train", "run.yaml") == 0
    names = ("summary.json", "trace.json", "metrics.jsonl", "model.safetensors")
    before = {name: (launched.FOLDER / name).read_bytes() for name in names}
    restarted()
    assert launched.dpp("train", "run.yaml") == 0
    assert {name: (launched.FOLDER / name).read_bytes() for name in names} == before


def test_a_restart_after_an_interrupt_does_not_go_on(restarted, capsys):
    model = launched.factory("dies_once", at=3, number=int(signal.SIGINT))
    launched.write_settings(model=model)
    assert launched.dpp("train", "run.yaml") == 130
    before = launched.checkpoint_steps()
    restarted()
    capsys.readouterr()
    assert launched.dpp("train", "run.yaml") == 130
    assert f"the checkpoint at step {before[-1]} is kept" in capsys.readouterr().err
    assert launched.checkpoint_steps() == before
    with pytest.MonkeyPatch.context() as patch:  # a launch of its own, which a user starts
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        assert launched.dpp("train", "run.yaml", "--resume") == 0


def test_a_restart_never_takes_over_the_run_of_another_launch():
    """The first attempt refuses the folder, so the second must as well."""
    launched.write_settings()
    assert launched.dpp("train", "run.yaml") == 0
    before = launched.fingerprint(launched.FOLDER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        patch.setenv("TORCHELASTIC_RUN_ID", "another")
        assert launched.dpp("train", "run.yaml") == 2
        assert launched.fingerprint(launched.FOLDER) == before
