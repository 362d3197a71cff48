"""A baseline run meets the same faults: refused in one line, or ended on every rank with the cause named."""

import signal

import pytest

import launched
from kit import check_said


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def settings():
    launched.write_settings(checkpoint={}, training={"steps": 6, "accumulate": 2})


@pytest.mark.parametrize(
    ("strategy", "arguments", "code", "part"),
    [
        ("1f2b", (), "not-one-of-the-choices", "'1f2b'"),
        ("1f1b", (), "ranks-do-not-fit-strategy", "`strategy` 1f1b"),
        ("data_parallel", ("--ranks=3",), "ranks-do-not-fit-strategy", "`strategy` data_parallel"),
        ("backprop", ("--ranks=2",), "ranks-do-not-fit-strategy", "not 2"),
        ("backprop", ("--resume",), "baseline-has-no-checkpoints", "`strategy` backprop"),
        ("backprop", ("--set=checkpoint.every=2",), "only-for-decoupled-stages", "`checkpoint.every` 2"),
        ("backprop", ("--set=optimizer.kind=AdamX",), "unknown-optimizer", "'AdamX'"),
    ],
)
def test_bad_input(strategy, arguments, code, part, settings, capsys):  # noqa: PLR0917 - a row of the table
    assert launched.dpp("train", "run.yaml", f"--strategy={strategy}", *arguments) == 2
    check_said(capsys.readouterr().err, code, part)
    assert not launched.FOLDER.exists()


def _train(tmp_path, strategy, model, **sections):
    launched.write_settings(checkpoint={}, training={"steps": 6, "accumulate": 2}, model=model, **sections)
    return launched.train_in_ranks(tmp_path, f"--strategy={strategy}", size=2)


@pytest.mark.parametrize("strategy", ["1f1b", "data_parallel"])
def test_a_killed_rank_ends_the_other(strategy, tmp_path):
    model = launched.factory("dies_once", at=5, number=int(signal.SIGKILL), behind=1)
    results, said = _train(tmp_path, strategy, model, cut=[3, 4])
    dead = [result.exitcode for result in results].index(-signal.SIGKILL)
    assert results[1 - dead].value == 1
    assert "lost the connection to another rank" in said[1 - dead], said


def test_a_loss_that_is_not_finite_ends_all(tmp_path):
    results, said = _train(tmp_path, "gpipe", launched.factory("not_finite", at=9, value="nan", behind=2), cut=[3, 4])
    assert [result.value for result in results] == [1, 1]
    assert any("the loss is nan at packet" in line for line in said), said
