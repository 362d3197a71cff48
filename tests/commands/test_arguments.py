"""Files that a command is to write are looked at before its work begins."""

import pytest

from decoupled_pp.commands.arguments import output_file
from decoupled_pp.core.errors import UsageError
from kit import refused


def test_a_file_that_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_file("--json", "~/a.json") == tmp_path / "a.json"
    assert output_file("--json", None) is None


@pytest.mark.parametrize(
    ("name", "text"), [("", "is a folder"), ("nowhere/a.json", "there is no folder"), ("a" * 300, "too long")]
)
def test_one_that_cannot_be(name, text, tmp_path):
    with refused("no-such-folder", UsageError, "--json", text):
        output_file("--json", str(tmp_path / name))


@pytest.mark.parametrize(
    "command", [["evaluate", "runs/x", "--json=."], ["plan", "run.yaml", "--ranks=2", "--output=."]]
)
def test_it_is_said_before_anything_else(command, tmp_path, monkeypatch, capsys):
    import kit

    monkeypatch.chdir(tmp_path)
    assert kit.dpp(*command) == 2
    kit.check_said(capsys.readouterr().err, "no-such-folder", "is a folder; name a file in it")
