"""The folder of a sweep or a comparison: cleared of what the command and its runs have written, and of nothing else."""

import pytest

from decoupled_pp.commands.results_folder import COMPARISON, SWEEP
from decoupled_pp.run.in_progress import JOB_FILE, RunLock
from kit import refused

SETTINGS = "{name: x, stages: 2, model: {}, data: {}, training: {}}"


@pytest.fixture(params=[(SWEEP, "{config: a, variants: {}}"), (COMPARISON, SETTINGS)], ids=["sweep", "comparison"])
def made(request, tmp_path):
    """A folder of one run, with its log and report, and its kind."""
    kind, marker = request.param
    run = tmp_path / "head-0"
    (run / "checkpoints/step-00000001").mkdir(parents=True)
    for name in (JOB_FILE, "config.yaml", "summary.json", ".lock", "also-more.json"):
        (run / name).write_text("a run's")
    for name in ("head-0.log", *kind.reports):
        (tmp_path / name).write_text("ours")
    (tmp_path / kind.marker).write_text(marker)
    return kind, tmp_path


def test_all_that_was_written_is_cleared(made):
    kind, folder = made
    kind.claim(folder, "advice", overwrite=True)
    assert list(folder.iterdir()) == []


def test_what_is_its_users_stays(made):
    kind, folder = made
    (folder / "notes.txt").write_text("mine")
    (folder / "head-0/notes.txt").write_text("mine")
    (folder / "other.log").write_text("mine")
    kind.claim(folder, "advice", overwrite=True)
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    assert left == ["head-0", "head-0/notes.txt", "notes.txt", "other.log"]


def test_a_run_in_progress_is_not_cleared(made):
    kind, folder = made
    with RunLock(folder / "head-0") as lock:
        assert lock.take()
        with pytest.raises(ValueError, match=r"a run is in progress in .*head-0"):
            kind.claim(folder, "advice", overwrite=True)
    assert (folder / "head-0/summary.json").exists()


@pytest.mark.parametrize("content", ["theme: dark", "", "[1]"])
def test_a_folder_with_a_file_of_that_name_is_none_of_ours(content, made):
    kind, folder = made
    (folder / kind.marker).write_text(content)
    with refused("not-an-output-folder"):
        kind.claim(folder, "advice", overwrite=True)
    assert (folder / "head-0/summary.json").exists()


def test_a_run_folder_is_no_comparison(tmp_path):
    (tmp_path / "config.yaml").write_text(SETTINGS)
    (tmp_path / JOB_FILE).write_text("a job")
    with refused("not-an-output-folder"):
        COMPARISON.claim(tmp_path, "advice", overwrite=True)
