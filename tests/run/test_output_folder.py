"""Folders of results are never lost: they are refused, or cleared only if they were made by the same command."""

import os

import pytest

from decoupled_pp.core.errors import UsageError
from decoupled_pp.run.output_folder import OutputFolder, mapping_in
from kit import refused


@pytest.fixture
def output(tmp_path):
    return OutputFolder(
        path=tmp_path / "runs" / "mine",
        noun="run folder",
        marker="config.yaml",
        is_one=lambda folder: mapping_in(folder / "config.yaml", ["stages"]),
        written=lambda folder: [folder / "config.yaml", folder / "old", folder / "never"],
        if_it_exists="--resume goes on, --overwrite starts anew",
        elsewhere="change `runs`",
        key="runs",
    )


def fill(output, *names):
    output.path.mkdir(parents=True)
    for name in names:
        (output.path / name).write_text("stages: 2" if name == "config.yaml" else name)


@pytest.mark.parametrize("files", [(), ("config.yaml", "old"), ("config.yaml", "thesis.tex")])
def test_cleared_or_kept(output, files):
    fill(output, *files)
    output.check(resume=bool(files), overwrite=False)
    output.make(empty=False)
    assert {path.name for path in output.path.iterdir()} == set(files)
    output.check(resume=False, overwrite=True)
    output.make(empty=True)
    assert {path.name for path in output.path.iterdir()} == {*files} & {"thesis.tex"}


@pytest.mark.parametrize(
    ("files", "resume", "overwrite", "code"),
    [
        (("config.yaml",), False, False, "output-exists"),
        (("thesis.tex",), False, True, "not-an-output-folder"),
        (("thesis.tex",), True, False, "not-an-output-folder"),
        ((), True, True, "resume-and-overwrite"),
    ],
)
def test_refused(output, files, resume, overwrite, code):
    fill(output, *files)
    with refused(code):
        output.check(resume=resume, overwrite=overwrite)
    assert {path.name for path in output.path.iterdir()} == set(files)


def test_what_cannot_be_written_names_the_setting(output, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with refused("output-not-writable", UsageError, "not a directory") as caught:
        output.check(resume=False, overwrite=False)
    assert caught.value.key == "runs"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(output, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with refused("output-not-writable", UsageError, "no permission"):
            output.check(resume=False, overwrite=False)
    finally:
        tmp_path.chmod(0o700)
