"""A rank that dies, is told to end, or fails: every rank ends, says why, and the last good checkpoint is kept."""

import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest

import launched
import ranks
from decoupled_pp.run import folder as run_folder
from decoupled_pp.run.in_progress import LOCK_FILE
from kit import check_said


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _train(tmp_path, model, size=3, **sections):
    """A run of `size` ranks, saving after every second packet, stopped by the fault that the model holds."""
    launched.write_settings(stages=size, cut=[2, *[1] * (size - 2), 7 - size], model=model, **sections)
    return launched.train_in_ranks(tmp_path, size=size)


def _check_kept(packet):
    """Committed checkpoints up to the packet of the fault, all of them good, and readable metrics."""
    steps = launched.checkpoint_steps()
    assert steps and all(step <= packet for step in steps)
    launched.metrics()
    assert launched.dpp("evaluate", launched.FOLDER) == 0  # opens and verifies the newest


_END_TO_END = {"global_correction": {"every": 1, "steps": 9}}
"""From its second step on, a stage waits for the gradient of what it has sent."""


@pytest.mark.parametrize("stage, behind, sections", [(0, 1, {}), (1, 2, {}), (2, 3, {}), (2, 3, _END_TO_END)])
def test_a_killed_rank_is_named_by_all_others(stage, behind, sections, tmp_path):
    model = launched.factory("dies_once", at=5, number=int(signal.SIGKILL), behind=behind)
    results, said = _train(tmp_path, model, **sections)
    assert results[stage].exitcode == -signal.SIGKILL
    for rank in {0, 1, 2} - {stage}:
        assert results[rank].value == 1, results[rank]
        assert f"stage {stage} (rank {stage})" in said[rank], said
        assert said[rank].count("\n") == 0 and "Traceback" not in results[rank].output
    _check_kept(5)


@pytest.mark.parametrize("stage, behind", [(0, 1), (2, 3)])
def test_a_rank_that_is_told_to_end_says_so_and_ends_all(stage, behind, tmp_path):
    model = launched.factory("dies_once", at=5, number=int(signal.SIGTERM), behind=behind)
    results, said = _train(tmp_path, model)
    assert [result.value for result in results] == [143, 143, 143]
    assert all(f"rank {stage} got SIGTERM" in line and "\n" not in line for line in said), said
    _check_kept(5)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_ends_all(value, tmp_path):
    results, said = _train(tmp_path, launched.factory("not_finite", at=5, value=value, behind=2))
    assert [result.value for result in results] == [1, 1, 1]
    assert any("stage 1: the loss is nan at packet 5" in line for line in said), said
    assert all("at packet 5" in line for line in said), said
    assert sum("lower `optimizer.lr`" in line for line in said) == 1, said  # the remedy is said once
    assert "ended because of rank 1: stage 1" in said[0] and "ended because of rank 1: stage 1" in said[2], said
    _check_kept(4)


def test_an_error_in_a_layer_is_a_traceback_there_and_a_line_elsewhere(tmp_path):
    results, said = _train(tmp_path, launched.factory("raises", at=5, behind=2))
    assert "Traceback" in results[1].output and "ZeroDivisionError" in results[1].output
    for rank in (0, 2):
        assert results[rank].value == 1 and "rank 1: ZeroDivisionError" in said[rank], said
        assert "Traceback" not in results[rank].output
    assert said[1].startswith("dpp: stage 1, TRAIN packet 5: ZeroDivisionError")
    _check_kept(5)


@pytest.mark.parametrize("stage, behind", [(0, 1), (2, 3)])
def test_a_full_disk_is_named_by_all_ranks(stage, behind, tmp_path):
    results, said = _train(tmp_path, launched.factory("fills_the_disk", at=5, behind=behind))
    cause = f"cannot write the checkpoint {launched.FOLDER}/checkpoints/step-00000006: File too large"
    # The one whose files may not grow cannot write down for this test how it has ended.
    assert all(result.value == 1 for rank, result in enumerate(results) if rank != stage), results
    assert all(cause in line and "\n" not in line for line in said), said
    assert said[stage].startswith(f"dpp: rank {stage}: {cause}; free or mend the disk")
    assert not any("Traceback" in result.output for rank, result in enumerate(results) if rank != stage)
    assert launched.checkpoint_steps()[-1] <= 5
    assert launched.dpp("evaluate", launched.FOLDER) == 0


def test_an_exit_of_user_code_is_told_as_what_it_is(tmp_path):
    results, said = _train(tmp_path, launched.factory("exits", at=5, behind=2))
    assert [result.value for result in results] == [1, 1, 1], results
    assert all("stage 1, TRAIN packet 5: the code of a layer" in line and "sys.exit(0)" in line for line in said), said
    _check_kept(5)


def test_an_error_that_cannot_be_printed_still_names_itself(tmp_path):
    results, said = _train(tmp_path, launched.factory("unprintable", at=5, behind=2))
    assert "Traceback" in results[1].output and "Unprintable" in results[1].output
    for rank in (0, 2):
        assert (
            results[rank].value == 1 and "rank 1: Unprintable: (its text cannot be shown: AttributeError" in said[rank]
        )
    assert said[1].startswith("dpp: stage 1, TRAIN packet 5: Unprintable: ")
    _check_kept(5)


def _in_a_folder_of_its_own(folder, *arguments):
    """As on a machine that shares no file system with the others."""
    home = Path(folder, os.environ["RANK"])
    home.mkdir(exist_ok=True)
    os.chdir(home)
    shutil.copy(Path(folder, "run.yaml"), home)
    return launched.dpp(*arguments)


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_run_folder_that_is_not_shared_is_refused_before_anything_is_changed(options, tmp_path):
    launched.write_settings(links={"timeout_seconds": 3.0}, stages=2)
    before = _finished_run_of_rank_0(tmp_path) if options else {}
    results = ranks.launch(
        _in_a_folder_of_its_own, str(tmp_path), "train", "run.yaml", *options, size=2, folder=tmp_path / "logs"
    )
    assert ranks.values(results) == [2, 2], results
    said = [line for result in results for line in launched.said(result.output)]
    assert len(said) == 1, said
    check_said(f"{said[0]}\n", "checkpoint-folder-not-shared", "rank 1 ")
    assert _content(tmp_path / "0" / launched.FOLDER) == before
    # Nor does what is left keep the folder from being used.
    run_folder.check(tmp_path / "0" / launched.FOLDER, resume=False, overwrite=bool(options))


def _finished_run_of_rank_0(folder):
    """The content of a run folder that rank 0 alone has."""
    (folder / "0").mkdir()
    with contextlib.chdir(folder / "0"):
        shutil.copy(folder / "run.yaml", ".")
        assert launched.dpp("train", "run.yaml") == 0
        return _content(Path(launched.FOLDER))


def _content(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
