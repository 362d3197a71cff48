"""Faults of a run in one process: losses, checkpoints, Ctrl-C, SIGTERM, and the commands that read run folders."""

import errno
import io
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.checkpoint.api import CheckpointException

import decoupled_pp
import launched
from decoupled_pp.core.errors import UsageError
from decoupled_pp.run import folder as run_folder
from decoupled_pp.run.in_progress import RunLock
from decoupled_pp.run.log import RunLog
from decoupled_pp.training import prepare
from kit import check_said


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launched.write_settings()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        launched.write_settings()
        assert launched.dpp("train", "run.yaml") == 0
        return launched.FOLDER.absolute()


@pytest.fixture
def run(finished):
    """A finished run, to be damaged."""
    shutil.copytree(finished, launched.FOLDER)
    return launched.FOLDER


def _line(capsys, *words):
    errors = capsys.readouterr().err
    assert errors.startswith("dpp: ") and errors.count("\n") == 1, errors
    assert all(word in errors for word in words), errors


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("stage, behind", [(0, 1), (1, 4)])
def test_a_loss_that_is_not_finite(stage, behind, value, capsys):
    launched.write_settings(cut=[3, 4], model=launched.factory("not_finite", at=5, value=value, behind=behind))
    assert launched.dpp("train", "run.yaml") == 1
    said = capsys.readouterr().err
    check_said(said, "loss-not-finite", f"stage {stage}: the loss is nan at packet 5", "checkpoint at step 4 is kept")
    assert launched.checkpoint_steps() == [2, 4]
    assert launched.dpp("evaluate", launched.FOLDER) == 0
    assert launched.metrics()


@pytest.mark.parametrize("stage, behind", [(0, 2), (1, 5)])
def test_weights_that_are_not_finite_are_not_saved(stage, behind, capsys):
    """The last loss is finite, the step after it is not: no later loss tells."""
    launched.write_settings(cut=[3, 4], model=launched.factory("infinite_gradient", at=5, behind=behind))
    assert launched.dpp("train", "run.yaml") == 1
    _line(
        capsys,
        f"stage {stage}: model.",
        "not finite after packet 5",
        "at step 4 is kept; go on with: dpp train run.yaml --resume",
    )
    assert launched.checkpoint_steps() == [2, 4] and not list(launched.FOLDER.glob("checkpoints/*.incomplete"))


def test_no_checkpoint_is_promised_where_there_is_none(capsys):
    launched.write_settings(model=launched.factory("not_finite", at=1, value="nan"))
    assert launched.dpp("train", "run.yaml") == 1
    _line(capsys, "the loss is nan at packet 1", "no checkpoint was saved")


@pytest.mark.parametrize("arguments", [[], ["--resume"]])
def test_ctrl_c_during_start_up_says_what_there_is(arguments, run, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    if not arguments:
        shutil.rmtree(run)
    monkeypatch.setattr("decoupled_pp.training.job.run_rank", interrupted)
    assert launched.dpp("train", "run.yaml", *arguments) == 130
    kept = "the checkpoint at step 6 is kept; go on with: dpp train run.yaml --resume"
    _line(capsys, f"interrupted; {kept if arguments else 'no checkpoint was saved'}\n")
    assert run.exists() == bool(arguments)


def test_under_torchrun_the_way_to_go_on_is_the_users_own_command(run, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("decoupled_pp.training.job.run_rank", interrupted)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert launched.dpp("train", "run.yaml", "--overwrite") == 130
    _line(capsys, "is kept; go on with: the same command with --resume in place of --overwrite")


def test_an_error_in_a_layer_is_a_traceback(capsys):
    launched.write_settings(model=launched.factory("raises", at=5))
    with pytest.raises(ZeroDivisionError):
        launched.dpp("train", "run.yaml")
    _line(capsys, "dpp: stage 1, TRAIN packet 5: ZeroDivisionError: ", "its traceback follows")
    assert launched.checkpoint_steps() == [2, 4]


def test_a_run_opens_its_data_once_and_counts_its_processes(monkeypatch):
    """A second look might find other files: those of the run itself, for one."""
    opened, open_data = [], prepare.open_data
    monkeypatch.setattr(prepare, "open_data", lambda *given: opened.append(given) or open_data(*given))
    assert launched.dpp("train", "run.yaml") == 0
    assert len(opened) == 1
    assert json.loads((launched.FOLDER / "summary.json").read_text())["ranks"] == 1


def test_the_version(capsys):
    assert launched.dpp("--version") == 0
    assert capsys.readouterr().out == f"dpp {decoupled_pp.__version__}\n"


@pytest.mark.parametrize("stage, behind", [(0, 1), (1, 4)])
def test_ctrl_c_saves_and_resume_gives_the_same_weights(stage, behind, capsys):
    model = launched.factory("dies_once", at=3, number=int(signal.SIGINT), behind=behind)
    launched.write_settings(cut=[3, 4], model=model)
    assert launched.dpp("train", "run.yaml", "--set=training.steps=7") == 130
    _line(capsys, "interrupted at step 4; saved", "dpp train run.yaml --set training.steps=7 --resume")
    assert launched.checkpoint_steps() == [2, 4]
    assert launched.dpp("train", "run.yaml", "--set=training.steps=7", "--resume") == 0
    assert launched.dpp("train", "run.yaml", "--set=training.steps=7", "--set=name=whole") == 0
    resumed, whole = launched.weights(), launched.weights(Path("runs/whole"))
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("cut", [[1, 3], [3, 1]])
def test_a_measured_cut_is_kept_by_resume(cut):
    """A new measurement may give another cut, and at least one of these two is another."""
    assert launched.dpp("train", "run.yaml", f"--set=cut={cut}", "--set=training.steps=2") == 0
    assert launched.dpp("train", "run.yaml", "--set=cut=time", "--resume") == 0
    record = json.loads((launched.FOLDER / "checkpoints/step-00000006/stage-0.json").read_text())
    assert record["boundaries"] == [0, cut[0], 4]


def test_an_exit_of_user_code_is_no_end_of_the_run(capsys):
    launched.write_settings(model=launched.factory("exits", at=5))
    assert launched.dpp("train", "run.yaml") == 1
    said = capsys.readouterr().err
    check_said(said, "user-code-exited", "stage 1, TRAIN packet 5", "sys.exit(0)", "the checkpoint at step 4 is kept")


def _no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "place", ["decoupled_pp.run.checkpoints.parts.write_atomically", "torch.distributed.checkpoint.save"]
)
def test_a_full_disk_is_named_and_the_run_goes_on_from_before(place, capsys, monkeypatch):
    """The library wraps what the disk raises into an error that is no Exception."""
    assert launched.dpp("train", "run.yaml", "--set=training.steps=4") == 0
    capsys.readouterr()

    def full(*_, **__):
        try:
            _no_space()
        except OSError as error:
            raise CheckpointException("write", {0: (error, None)}) from error

    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        assert launched.dpp("train", "run.yaml", "--resume") == 1
    said = capsys.readouterr().err
    check_said(said, "checkpoint-not-written", "step-00000006: No space left", "the checkpoint at step 4 is kept")
    assert launched.checkpoint_steps() == [2, 4] and not list(launched.FOLDER.glob("checkpoints/*.incomplete"))
    assert launched.dpp("train", "run.yaml", "--resume") == 0


@pytest.mark.parametrize("place", ["write_trace", "plot_losses", "write_atomically"])
def test_results_that_a_full_disk_refused_are_written_by_resume(place, finished, capsys, monkeypatch):
    full = _no_space
    if place == "write_atomically":
        write = run_folder.write_atomically

        def full(path, text):
            return _no_space() if path.name == "summary.json" else write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(f"decoupled_pp.run.folder.{place}", full)
        assert launched.dpp("train", "run.yaml") == 1
    said = capsys.readouterr().err
    check_said(said, "results-not-written", "No space left", "the checkpoint at step 6 is kept", "--resume")
    assert launched.dpp("train", "run.yaml", "--resume") == 0
    assert (launched.FOLDER / "summary.json").is_file()
    for name in ("model.safetensors", "data.json"):
        assert (launched.FOLDER / name).read_bytes() == (finished / name).read_bytes()


def test_a_log_that_a_full_disk_refuses_ends_the_run_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr("decoupled_pp.run.log._line", _no_space)
    assert launched.dpp("train", "run.yaml") == 1
    check_said(capsys.readouterr().err, "run-log-not-written", "No space left")


def test_a_run_folder_that_is_removed_ends_the_run_which_can_be_resumed(capsys, monkeypatch):
    write = RunLog.write

    def write_and_remove(log, records):
        write(log, records)
        monkeypatch.setattr(RunLog, "write", write)
        shutil.rmtree(launched.FOLDER)

    monkeypatch.setattr(RunLog, "write", write_and_remove)
    launched.write_settings(training={"steps": 100_000}, checkpoint={"every": 100_000})
    assert launched.dpp("train", "run.yaml") == 1
    check_said(capsys.readouterr().err, "run-log-gone", "metrics.jsonl", "--resume")
    (saved,) = launched.checkpoint_steps()
    short = [f"--set=training.steps={saved + 2}", "--set=checkpoint.every=null"]
    assert launched.dpp("train", "run.yaml", "--resume", *short) == 0
    assert launched.dpp("evaluate", launched.FOLDER) == 0


def test_sigterm_ends_the_run_and_keeps_the_last_checkpoint(capsys):
    launched.write_settings(model=launched.factory("dies_once", at=5, number=int(signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    assert launched.dpp("train", "run.yaml") == 143
    _line(capsys, "rank 0 got SIGTERM", "the checkpoint at step 4 is kept", "--resume")
    assert launched.checkpoint_steps() == [2, 4] and launched.metrics()
    assert signal.getsignal(signal.SIGTERM) is before


# ---------------------------------------------------------------------------------------------------- checkpoints


def _newest(folder):
    return folder / "checkpoints/step-00000006"


def _flip_a_byte(folder):
    (file,) = (_newest(folder) / "stage-1").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _cut_short(folder):
    (file,) = (_newest(folder) / "stage-1").glob("*.safetensors")
    os.truncate(file, 100)


def _break_the_record(folder):
    os.truncate(_newest(folder) / "stage-1.json", 20)


def _lose_a_stage(folder):
    shutil.rmtree(_newest(folder) / "stage-1")


def _lose_a_record(folder):
    (_newest(folder) / "stage-1.json").unlink()


def _change_the_format(folder):
    record = json.loads((_newest(folder) / "stage-0.json").read_text())
    (_newest(folder) / "stage-0.json").write_text(json.dumps({**record, "format": 99}))


DAMAGE = [_flip_a_byte, _cut_short, _break_the_record, _lose_a_stage, _lose_a_record]


def _mix_two_steps(folder):
    """Stage 1 as it was two steps before, its record too: every file is whole."""
    before = folder / "checkpoints/step-00000004"
    shutil.rmtree(_newest(folder) / "stage-1")
    shutil.copytree(before / "stage-1", _newest(folder) / "stage-1")
    shutil.copy(before / "stage-1.json", _newest(folder))


def _rename_one_before(folder):
    shutil.rmtree(_newest(folder))
    (folder / "checkpoints/step-00000004").rename(_newest(folder))


@pytest.mark.parametrize("damage", [*DAMAGE, _change_the_format, _mix_two_steps])
def test_a_damaged_checkpoint_is_refused_by_every_reader(damage, run, capsys):
    damage(run)
    before = launched.fingerprint(Path())
    capsys.readouterr()
    for command in (["evaluate", run], ["export", run, "-o", "weights"]):
        assert launched.dpp(*command) == 2
        said = capsys.readouterr().err
        if damage is _change_the_format:
            check_said(said, "checkpoint-of-another-format", "step-00000006", "format 99")
        else:
            check_said(said, "checkpoint-corrupt", "step-00000006", "to go on from step-00000004")
        assert launched.fingerprint(Path()) == before


def test_a_checkpoint_of_another_format_is_not_resumed(run, capsys):
    _change_the_format(run)
    before = launched.fingerprint(Path())
    assert launched.dpp("train", "run.yaml", "--resume") == 2
    check_said(capsys.readouterr().err, "checkpoint-of-another-format", "step-00000006", "format 99")
    assert launched.fingerprint(Path()) == before


@pytest.mark.parametrize("damage", [*DAMAGE, _mix_two_steps])
def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_says_so(damage, run, finished, capsys):
    damage(run)
    capsys.readouterr()
    assert launched.dpp("train", "run.yaml", "--resume") == 0
    said = capsys.readouterr()
    assert "step-00000006 is corrupt" in said.out + said.err and "kept as step-00000006.damaged" in said.out + said.err
    assert "goes on from the checkpoint at step 4" in said.out + said.err
    assert launched.checkpoint_steps() == [2, 4, 6] and (run / "checkpoints/step-00000006.damaged").is_dir()
    resumed, whole = launched.weights(), launched.weights(finished)
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_checkpoint_under_the_name_of_another_step_is_none(run, capsys):
    _rename_one_before(run)
    assert launched.dpp("train", "run.yaml", "--resume") == 0
    assert "its parts were saved at step 4" in "".join(capsys.readouterr())
    assert launched.checkpoint_steps() == [2, 4, 6]


@pytest.mark.parametrize("copy", ["step-00000002.keep", "step-00000006.bak", "step-best", "keep"])
def test_copies_of_checkpoints_are_neither_deleted_nor_counted(copy, run, capsys):
    shutil.copytree(_newest(run), run / "checkpoints" / copy)
    before = launched.fingerprint(run / "checkpoints" / copy)
    settings = ("--set=training.steps=10", "--set=checkpoint.keep=1")
    assert launched.dpp("train", "run.yaml", "--resume", *settings) == 0
    assert launched.checkpoint_steps() == [10]
    assert launched.dpp("train", "run.yaml", "--overwrite") == 0
    assert launched.fingerprint(run / "checkpoints" / copy) == before


def test_the_only_checkpoint_has_no_one_before(run, capsys):
    for step in (2, 4):
        shutil.rmtree(run / f"checkpoints/step-{step:08d}")
    _flip_a_byte(run)
    capsys.readouterr()
    assert launched.dpp("train", "run.yaml", "--resume") == 2
    check_said(capsys.readouterr().err, "checkpoint-corrupt", "step-00000006", "start anew (--overwrite)")


def test_the_remedy_for_a_damaged_checkpoint_works(run, capsys):
    shutil.rmtree(_newest(run))
    assert launched.dpp("train", "run.yaml", "--resume") == 0
    assert launched.checkpoint_steps() == [2, 4, 6]


def test_a_checkpoint_of_another_plan_is_refused(run, capsys):
    (run / "checkpoints/step-00000008.incomplete").mkdir()
    before = launched.fingerprint(Path())
    capsys.readouterr()
    for change in ("--set=model.width=8", "--set=model.depth=5", "--set=model.depth=2", "--set=model.depth=1"):
        assert launched.dpp("train", "run.yaml", "--resume", "--set=training.steps=8", change) == 2
        check_said(capsys.readouterr().err, "checkpoint-of-another-network", "step-00000006")
        assert launched.fingerprint(Path()) == before
        assert (run / "checkpoints/step-00000008.incomplete").exists()


def test_a_damaged_log_is_refused(run, capsys):
    (run / "metrics.jsonl").write_text("nothing\n" + (run / "metrics.jsonl").read_text())
    capsys.readouterr()
    assert launched.dpp("train", "run.yaml", "--resume", "--set=training.steps=8") == 2
    _line(capsys, "metrics.jsonl line 1", "no record")


def test_overwrite_clears_what_runs_have_written_and_nothing_else(run):
    (run / "notes.txt").write_text("mine")
    (run / "tensorboard").mkdir(exist_ok=True)
    (run / "tensorboard/events.out.tfevents.1").write_text("old")
    (run / "checkpoints/thoughts").write_text("mine as well")
    (run / "checkpoints/step-00000009.incomplete").mkdir()
    assert launched.dpp("train", "run.yaml", "--overwrite", "--set=training.steps=2") == 0
    assert launched.checkpoint_steps() == [2]
    assert (run / "notes.txt").read_text() == "mine" and (run / "checkpoints/thoughts").exists()
    assert not (run / "tensorboard").exists() and not list(run.glob("checkpoints/*.incomplete"))


@pytest.mark.parametrize("config", ["theme: dark\n", "", "[1, 2]", "name: x\nstages: 2\n", "\0", "a: [" * 9])
@pytest.mark.parametrize("way", ["--overwrite", "--resume"])
def test_a_folder_with_a_config_of_something_else_is_no_run(config, way, capsys):
    launched.FOLDER.mkdir(parents=True)
    (launched.FOLDER / "config.yaml").write_text(config)
    (launched.FOLDER / "one.tex").write_text("years of work")
    before = launched.fingerprint(Path())
    assert launched.dpp("train", "run.yaml", way) == 2
    check_said(capsys.readouterr().err, "not-an-output-folder", "holds no config.yaml of a run folder")
    assert launched.fingerprint(Path()) == before


def test_overwrite_leaves_a_run_alone_when_another_key_is_bad(run, capsys):
    before = launched.fingerprint(run)
    assert launched.dpp("train", "run.yaml", "--overwrite", "--set=optimizer.arguments={momentun: 1}") == 2
    assert launched.fingerprint(run) == before


# ------------------------------------------------------------------------------------------ commands on run folders


@pytest.mark.parametrize("command", [["evaluate"], ["export", "-o", "weights"]])
def test_what_is_no_run_folder_is_refused(command, capsys):
    for folder in ("nowhere", "."):
        assert launched.dpp(command[0], folder, *command[1:]) == 2
        _line(capsys, folder, "not a run folder", "config.yaml")
    assert not Path("weights").exists()


@pytest.mark.parametrize("command", [["evaluate"], ["export", "-o", "weights"]])
def test_a_run_without_a_checkpoint_is_refused(command, run, capsys):
    shutil.rmtree(run / "checkpoints")
    (run / "model.safetensors").unlink()
    capsys.readouterr()
    assert launched.dpp(command[0], run, *command[1:]) == 2
    _line(capsys, str(run), "no checkpoint yet")
    assert not Path("weights").exists()


@pytest.mark.parametrize(
    ("output", "code"),
    [
        ("/dev/null/weights", "folder-not-writable"),
        ("run.yaml/weights", "folder-not-writable"),
        ("run.yaml/weights.safetensors", "file-not-writable"),
        ("runs", "not-an-output-folder"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(output, code, run, capsys):
    before = launched.fingerprint(Path())
    capsys.readouterr()
    assert launched.dpp("export", run, "-o", output) == 2
    check_said(capsys.readouterr().err, code, output)
    assert launched.fingerprint(Path()) == before


def _judged(capsys):
    """Rows of the printed table of exits, and the notes beside it."""
    printed = capsys.readouterr()
    return [line for line in printed.out.splitlines() if "critic" in line or "head" in line], launched.said(printed.err)


@pytest.mark.parametrize("change", [("--set=cut=[1, 3]",), ("--set=stages=3",), ("--set=critic.kind=mlp_sr",)])
def test_a_run_that_went_on_otherwise_is_evaluated_as_it_is(change, run, capsys):
    """The settings and exits are those of the last checkpoint, not of the beginning; no critic is a fresh one."""
    assert launched.dpp("train", "run.yaml", "--resume", "--set=training.steps=8", *change) == 0
    capsys.readouterr()
    assert launched.dpp("evaluate", run) == 0
    rows, notes = _judged(capsys)
    exits = json.loads((run / "summary.json").read_text())["exits"]
    assert len(rows) == len(exits) and notes == []
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["training"]["steps"], settings["stages"], len(settings["cut"])) == (8, len(exits), len(exits))


def test_evaluate_uses_the_cut_of_the_checkpoint(run, capsys):
    """A run that was killed before its first checkpoint under another cut."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"stages": 3, "cut": [1, 1, 2]}))
    capsys.readouterr()
    assert launched.dpp("evaluate", run) == 0
    rows, notes = _judged(capsys)
    assert len(rows) == 2 and notes == []


def test_evaluate_says_which_critics_are_not_of_the_run(run, capsys):
    capsys.readouterr()
    assert launched.dpp("evaluate", run, "--set=critic.kind=mlp_sr") == 0
    _, notes = _judged(capsys)
    assert len(notes) == 1 and "no critic" in notes[0] and "anew" in notes[0]


def test_good_folders_are_evaluated_and_exported(run, capsys):
    assert launched.dpp("evaluate", run) == 0
    assert launched.dpp("export", run, "-o", "exported/weights.safetensors") == 0
    assert Path("exported/weights.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_export_needs_no_data(tmp_path):
    Path("text.txt").write_text("some words to be learnt\n" * 40)
    data = {"kind": "text", "files": ["*.txt"], "context": 8, "batch_size": 2}
    launched.write_settings(data=data, model={"kind": "gpt", "width": 8, "depth": 2, "heads": 2})
    assert launched.dpp("train", "run.yaml") == 0
    Path("text.txt").unlink()
    assert launched.dpp("export", launched.FOLDER, "-o", "weights.safetensors") == 0
    assert Path("weights.safetensors").read_bytes() == (launched.FOLDER / "model.safetensors").read_bytes()


def test_a_run_folder_that_does_not_say_what_its_data_are_like_is_refused(run, capsys):
    (run / "data.json").write_text("{}")
    capsys.readouterr()
    assert launched.dpp("export", run, "-o", "weights") == 2
    check_said(capsys.readouterr().err, "data-info-damaged", "data.json", "'form'")


def test_a_finished_run_is_not_resumed(run, capsys):
    before = launched.fingerprint(Path())
    capsys.readouterr()
    assert launched.dpp("train", "run.yaml", "--resume") == 2
    check_said(capsys.readouterr().err, "nothing-left-to-train", "is at step 6 of 6", "`training.steps`")
    assert launched.fingerprint(Path()) == before


def test_a_terminal_that_lacks_a_letter_is_shown_its_number(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    assert launched.dpp("train", "run.yaml", "--set=runs=\u00fc") == 0
    out.flush()
    assert b"\\xfc/run/model.safetensors" in out.buffer.getvalue()


def test_a_checkpoint_that_another_run_has_just_deleted_is_not_called_damaged(run, capsys, monkeypatch):
    """Of two that are resumed at once, the later one may still be reading when the other one saves."""
    with RunLock(run) as lock:

        def newest_whole(folder):
            assert lock.take()
            raise UsageError("checkpoint step-00000002 is corrupt; start anew", code="checkpoint-corrupt")

        monkeypatch.setattr("decoupled_pp.training.job.newest_whole", newest_whole)
        assert launched.dpp("train", "run.yaml", "--resume", "--set=training.steps=9") == 2
    assert "a run is in progress in runs/run" in capsys.readouterr().err
