"""The front end: exit codes, faults in one line in the words of a settings file, and no torch before it is needed."""

import subprocess
import sys

import pytest

from decoupled_pp.commands import train
from decoupled_pp.commands.main import SUBCOMMANDS, build_parser, main
from decoupled_pp.core.errors import Fault, LinkError, PeerError, TrainingError, UsageError
from decoupled_pp.training.watch import Terminated


def ended_by(error, monkeypatch, capsys):
    """Exit code and standard error of a command that raises."""

    def run_command(chosen):
        raise error

    monkeypatch.setattr(train, "run_command", run_command)
    with pytest.raises(SystemExit) as ended:
        main(["train", "run.yaml"])
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UsageError("a: wrong", code="unusable-value"), 2, "dpp: a: wrong\n"),
        (TrainingError("two\nlines", code="unusable-value"), 1, "dpp: two lines\n"),
        (LinkError("broken", code="peer-gone"), 1, "dpp: broken\n"),
        (Terminated("rank 0 got SIGTERM", code="terminated"), 143, "dpp: rank 0 got SIGTERM\n"),
        (KeyboardInterrupt("saved"), 130, "dpp: interrupted; saved\n"),
        (PeerError(Fault("a: wrong; mend it", 1, usage=True, code="unusable-value")), 2, ""),
        (
            PeerError(Fault("no packet; retry", 1, usage=False, code="wait-too-long")),
            1,
            "dpp: rank 0: ended because of rank 1: no packet\n",
        ),
    ],
)
def test_exit_codes(error, code, text, monkeypatch, capsys):
    assert ended_by(error, monkeypatch, capsys) == (code, text)


def test_settings_have_their_keys_of_the_settings_file(monkeypatch, capsys):
    error = TrainingError("the loss is nan; set `training.clip_norm`", code="loss-not-finite")
    error.speak({"training.clip_norm": "clip_norm"})  # as a trainer does for a script
    assert ended_by(error, monkeypatch, capsys) == (1, "dpp: the loss is nan; set `training.clip_norm`\n")


def test_an_error_of_the_users_code_keeps_its_traceback(monkeypatch, capsys):
    def run_command(chosen):
        error = ZeroDivisionError("division by zero")
        error.add_note("stage 1, packet 3")
        raise error

    monkeypatch.setattr(train, "run_command", run_command)
    with pytest.raises(ZeroDivisionError):
        main(["train", "run.yaml"])
    told = "dpp: stage 1, packet 3: ZeroDivisionError: division by zero; its traceback follows\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("words", [[], ["fly"], ["train"], ["train", "run.yaml", "--fast"], ["bench", "nothing"]])
def test_bad_command_lines(words):
    """The texts are argparse's, which differ between versions of Python."""
    with pytest.raises(UsageError) as caught:
        build_parser(words).parse_args(words)
    assert caught.value.code == "bad-command-line"
    assert str(caught.value).endswith(" --help")


@pytest.mark.parametrize("words", [[], ["train"], ["evaluate"], ["export"], ["plan"], ["bench"], ["bench", "schedule"]])
def test_help_imports_no_torch(words):
    script = f"""
import sys
from decoupled_pp.commands.main import main
try:
    main([*{words}, "--help"])
except SystemExit:
    assert "torch" not in sys.modules, "imported"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if not words:
        assert all(row.help.split(",")[0] in done.stdout for row in SUBCOMMANDS)
