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


@pytest.mark.parametrize(
    "words",
    [[], ["fly"], ["train"], ["train", "run.yaml", "--fast"], ["bench", "nothing"], ["train", "run.yaml", "--set=--"]],
)
def test_bad_command_lines(words):
    """The texts are argparse's, which differ between versions of Python."""
    with pytest.raises(UsageError) as caught:
        build_parser(words).parse(words)
    assert caught.value.code == "bad-command-line"
    assert str(caught.value).endswith(" --help")


def without_torch(*words):
    """Run a command that ends before it needs torch, in a process of its own; its exit code and both outputs."""
    script = f"""
import sys
from decoupled_pp.commands.main import main
try:
    main({list(map(str, words))})
except SystemExit as ended:
    assert "torch" not in sys.modules, "imported"
    raise
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words", [[], *([row.name] for row in SUBCOMMANDS), ["bench", "schedule"]])
def test_help_imports_no_torch(words):
    code, told, error = without_torch(*words, "--help")
    assert code == 0, error
    if not words:
        assert all(row.help.split(",")[0] in told for row in SUBCOMMANDS)


MLP = """
name: run
model: {kind: mlp}
data: {kind: digits}
training: {steps: 3}
"""


@pytest.mark.parametrize(
    ("words", "added", "told"),
    [
        (["train"], "trainning: {steps: 3}", "did you mean 'training'?"),
        (["train", "--set", "model.widht=3"], "", "did you mean 'width'?"),
        (["train", "--ranks", 3], "", "2 stages need 2 ranks"),
        (["train", "--strategy", "1f1b"], "", "give --ranks 2"),
        (["compare"], "seed: -1", "`seed`"),
        (["plan"], "seed: -1", "`seed`"),
    ],
)
def test_a_wrong_setting_is_found_before_torch_is_imported(words, added, told, tmp_path):
    (tmp_path / "run.yaml").write_text(MLP + added)
    code, _, error = without_torch(words[0], tmp_path / "run.yaml", *words[1:])
    assert (code, error.count("\n")) == (2, 1) and told in error


def test_a_sweep_finds_a_wrong_setting_before_torch_is_imported(tmp_path):
    (tmp_path / "run.yaml").write_text(MLP)
    variants = "variants: {good: {seed: 1}, bad: {model.widht: 3}}"
    (tmp_path / "sweep.yaml").write_text(f"config: {tmp_path / 'run.yaml'}\n{variants}\n")
    code, _, error = without_torch("sweep", tmp_path / "sweep.yaml", "--output", tmp_path / "out")
    assert (code, error.count("\n")) == (2, 1) and "did you mean 'width'?" in error
    assert not (tmp_path / "out").exists()
