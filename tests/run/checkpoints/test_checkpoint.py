"""Checkpoints: nothing is pickled, damage is refused in one line, a killed save leaves the last good one."""

import json
import os
import pickle
import pickletools
import shutil
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import TrainingError, UsageError
from decoupled_pp.run.checkpoints import parts as checkpoint
from decoupled_pp.run.checkpoints.opened import latest_checkpoint, open_checkpoint
from decoupled_pp.run.checkpoints.parts import Keep, list_checkpoints, remove_incomplete, save_stage
from decoupled_pp.run.checkpoints.resume import load_model
from decoupled_pp.run.checkpoints.weights import export_safetensors
from kit import ignore, refused

SAMPLE = torch.zeros(4, 3)


def network():
    torch.manual_seed(1)
    layers = [nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)]
    return nn.Sequential(*layers)


def batches():
    return [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(3)]


def trainer(folder=None, **options):
    plan = partition(network(), 2, [2, 1], SAMPLE)
    return Trainer(plan, device="cpu", observer=ignore, checkpoints=folder, **options)


@pytest.fixture
def folder(tmp_path):
    """Of a run with checkpoints after steps 2 and 4."""
    trainer(tmp_path).fit(batches(), 4, save_every=2)
    return tmp_path


def test_what_is_saved(folder):
    newest = latest_checkpoint(folder)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000002", "step-00000004"]
    assert (newest.step, newest.packet, newest.samples, newest.boundaries) == (4, 4, 16, (0, 2, 3))
    assert {"model.0.weight", "model.1.running_mean", "critic.after_1.linear.weight", "rng.stage0"} <= set(
        newest.places
    )
    assert {"optimizer.model.0.weight.exp_avg", "optimizer.critic.after_1.linear.bias.step"} <= set(newest.places)


def test_no_file_is_a_pickle(folder):
    files = [path for path in folder.rglob("step-*/**/*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert not [path for path in files if _is_pickle(path.read_bytes())]
    assert _is_pickle(pickle.dumps({"a": 1}))


def test_loading_unpickles_nothing(folder, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("something is unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    report = trainer().fit(batches(), 6, resume=latest_checkpoint(folder))
    load_model(latest_checkpoint(folder), network())
    assert report.steps == 6


def test_the_whole_model_loads_by_its_own_names(folder):
    trained, fresh = trainer(), network()
    trained.evaluate(batches(), resume=latest_checkpoint(folder))
    load_model(latest_checkpoint(folder), fresh)
    for name, tensor in trained.export().state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name])


def test_all_of_a_checkpoint_is_on_the_disk_before_it_is_committed(tmp_path, monkeypatch):
    """Else a loss of power could leave a committed checkpoint with files that are empty or missing."""
    synced, committed, sync, rename = set(), [], os.fsync, Path.rename

    def record(handle):
        synced.add(Path(f"/proc/self/fd/{handle}").resolve())
        sync(handle)

    def commit(partial, final):
        files = [partial, *partial.rglob("*")]
        committed.append(set(files) - synced)
        rename(partial, final)
        synced.clear()

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "rename", commit)
    trainer(tmp_path).fit(batches(), 2)
    assert committed == [set()]
    assert tmp_path in synced


def test_keep(tmp_path):
    trainer(tmp_path, keep_checkpoints=2).fit(batches(), 5, save_every=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_truncated_file_is_refused_in_one_line(folder, stage, suffix):
    path = _file(folder, stage, suffix)
    path.write_bytes(path.read_bytes()[:-7])
    _refused(folder)


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_flipped_bit_is_refused_in_one_line(folder, place):
    path = _file(folder, 1, ".safetensors")
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)
    _refused(folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_missing_file_is_refused_in_one_line(folder, suffix):
    _file(folder, 1, suffix).unlink()
    _refused(folder)


def test_a_strange_file_in_a_part_is_named(folder):
    """Torch's reader would open it for its name, and fail for whatever is in it."""
    newest = list_checkpoints(folder)[-1]
    (newest / "stage-0" / "zz.safetensors").write_bytes(b"rubbish")
    with refused("checkpoint-with-strange-file", UsageError, "stage-0/zz.safetensors", "take that file away"):
        open_checkpoint(newest)
    (newest / "stage-0" / "zz.safetensors").unlink()
    assert open_checkpoint(newest).path == newest


def test_another_format_is_refused(folder):
    record = folder / "step-00000004" / "stage-0.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"format": 99}))
    with refused("checkpoint-of-another-format", UsageError, "format 99"):
        latest_checkpoint(folder)


def test_the_one_before_a_damaged_one_still_loads(folder):
    shutil.rmtree(folder / "step-00000004")
    assert latest_checkpoint(folder).step == 2


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("owner, moment", [(dcp, "save"), (zlib, "crc32"), (checkpoint, "write_atomically")])
def test_a_save_killed_half_way_leaves_the_last_good_one(folder, monkeypatch, stage, owner, moment):
    class Killed(BaseException):
        pass

    def die(*arguments, **options):
        raise Killed

    resumed = trainer()
    resumed.fit(batches(), 5, resume=latest_checkpoint(folder))
    for one in resumed.stages[:stage]:
        assert not save_stage(folder, one, resumed.plan, 5, keep=Keep(2))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, moment, die)
        save_stage(folder, resumed.stages[stage], resumed.plan, 5, keep=Keep(2))

    assert latest_checkpoint(folder).step == 4
    remove_incomplete(folder)
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000002", "step-00000004"]


def test_a_save_may_follow_a_killed_one(folder, monkeypatch):
    resumed = trainer()
    resumed.fit(batches(), 5, resume=latest_checkpoint(folder))
    (folder / "step-00000005.incomplete" / "stage-0").mkdir(parents=True)
    (folder / "step-00000005.incomplete" / "stage-0" / "rest.safetensors").write_bytes(b"half")
    complete = [save_stage(folder, stage, resumed.plan, 5, keep=Keep(2)) for stage in resumed.stages]
    assert complete == [False, True]
    assert latest_checkpoint(folder).step == 5


def test_the_end_of_a_run_commits_what_no_stage_saw_complete(tmp_path, monkeypatch):
    """On a shared file system each stage may have looked too early."""

    def save_unseen(folder, stage, plan, packet, keep):
        if save_stage(folder, stage, plan, packet, keep=keep):
            (folder / "step-00000002").rename(folder / "step-00000002.incomplete")
        return False

    monkeypatch.setattr("decoupled_pp.run.checkpoints.folder.save_stage", save_unseen)
    trainer(tmp_path).fit(batches(), 2)
    assert latest_checkpoint(tmp_path).step == 2


def test_a_run_whose_last_checkpoint_never_gets_complete_fails(tmp_path, monkeypatch):
    def save_stage_0(folder, stage, plan, packet, keep):
        return stage.index == 0 and save_stage(folder, stage, plan, packet, keep=keep)

    monkeypatch.setattr("decoupled_pp.run.checkpoints.folder.save_stage", save_stage_0)
    with refused("checkpoint-incomplete", TrainingError, "the parts of stages 1"):
        trainer(tmp_path, timeout_seconds=0.5).fit(batches(), 2)


def test_a_checkpoint_of_another_network_is_refused(folder):
    wider = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    other = Trainer(partition(wider, 2, [2, 1], SAMPLE), device="cpu", observer=ignore)
    with refused("checkpoint-of-another-network", UsageError, "model.0.weight is (5, 3) there and (6, 3) here"):
        other.fit(batches(), 5, resume=latest_checkpoint(folder))


def test_a_checkpoint_of_a_larger_network_is_refused(folder):
    """All that the smaller one needs is there."""
    smaller = nn.Sequential(*list(network())[:2])
    with refused("checkpoint-of-another-network", UsageError, "it has model.2.bias, which this network has not"):
        load_model(latest_checkpoint(folder), smaller)
    other = Trainer(partition(smaller, 2, [1, 1], SAMPLE), device="cpu", observer=ignore)
    with refused("checkpoint-of-another-network", UsageError, "it has model.2.bias"):
        other.fit(batches(), 5, resume=latest_checkpoint(folder))


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None


def test_an_export_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with refused("file-not-writable", UsageError, "model.safetensors"):
        export_safetensors(network(), tmp_path / "file" / "model.safetensors")


def _file(folder, stage, suffix):
    newest = folder / "step-00000004"
    return (
        newest / f"stage-{stage}.json" if suffix == ".json" else next((newest / f"stage-{stage}").glob("*.safetensors"))
    )


def _refused(folder):
    path = folder / "step-00000004"
    with refused("checkpoint-corrupt", UsageError, f"checkpoint {path} is corrupt", "to go on from step-00000002"):
        open_checkpoint(path)


def _is_pickle(content):
    try:
        return list(pickletools.genops(content)) != []
    except ValueError:
        return False


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_an_exported_file_has_the_permissions_of_any_other(umask, tmp_path):
    before = os.umask(umask)
    try:
        export_safetensors(network(), tmp_path / "model.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
