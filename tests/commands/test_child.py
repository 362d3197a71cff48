"""The reason of a failed child process, from its log."""

import pytest

from decoupled_pp.commands.child import failure_in


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("step 1\ndpp: stage 0: the loss is nan\ndpp: no checkpoint was saved\n", "stage 0: the loss is nan"),
        ("Traceback\nValueError: x\n", "ValueError: x"),
        ("", "no output"),
    ],
)
def test_the_reason_is_the_fault_not_how_to_go_on(log, reason, tmp_path):
    file = tmp_path / "log"
    file.write_text(log)
    assert failure_in(file, 1) == f"{reason} (exit code 1, {file})"
