"""Whether a run is in progress: by a lock of the kernel here, by a heartbeat elsewhere; nothing stale ever blocks."""

import json
import multiprocessing
import os
import signal
import socket
import time

import pytest
import torch

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import UsageError
from decoupled_pp.run import folder as run_folder
from decoupled_pp.run import in_progress
from decoupled_pp.run.in_progress import JOB_FILE, LOCK_FILE, RunLock, running
from kit import check_text, ignore, tanh_network, vector_batches

_processes = multiprocessing.get_context("forkserver")


def _run(folder, ready, share):
    """A rank of a run that goes on until it is killed."""
    lock = RunLock(folder)
    assert share or lock.take()
    if share:
        lock.share()
    ready.set()
    time.sleep(600)


@pytest.fixture
def start(tmp_path):
    """Start a process that holds the lock of the folder; each is killed at the end."""
    started = []

    def begin(share=False):
        ready = _processes.Event()
        process = _processes.Process(target=_run, args=(tmp_path, ready, share))
        process.start()
        started.append(process)
        assert ready.wait(120)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()


def test_a_run_in_progress_is_neither_cleared_nor_joined(start, tmp_path):
    (tmp_path / JOB_FILE).write_text("a job")
    process = start()
    for resume in (True, False):
        with pytest.raises(UsageError) as caught:
            run_folder.check(tmp_path, resume=resume, overwrite=not resume)
        assert caught.value.code == "run-in-progress"
        owner = f"process {process.pid} on {socket.gethostname()}"
        assert owner in str(caught.value)
        check_text("run-in-progress", str(caught.value).replace(owner, "OWNER"))
    with RunLock(tmp_path) as other:
        assert not other.take()
    assert running(tmp_path) is not None


def _trainer(folder, observer=ignore):
    plan = partition(tanh_network(2, 4, 3), 2, "uniform", torch.zeros(4, 4))
    return Trainer(plan, device="cpu", critic="head", checkpoints=folder, observer=observer)


def test_the_checkpoints_of_a_script_are_left_alone_while_it_trains(start, tmp_path):
    batches = vector_batches(3, 4, 4, 3)
    _trainer(tmp_path).fit(batches, 2)
    (tmp_path / "step-00000009.incomplete").mkdir()
    process = start()
    before = sorted(tmp_path.iterdir())
    for resume in (True, False):
        with pytest.raises(UsageError) as caught:
            _trainer(tmp_path).fit(batches, 4, resume=resume)
        assert caught.value.code == "run-in-progress"
        text = str(caught.value).replace(f"process {process.pid} on {socket.gethostname()}", "OWNER")
        assert str(tmp_path) in text
        check_text("run-in-progress", text)
    assert sorted(tmp_path.iterdir()) == before
    process.kill()
    process.join()
    assert _trainer(tmp_path).fit(batches, 4, resume=True).steps == 4


def test_a_script_has_its_checkpoints_for_as_long_as_it_trains(tmp_path):
    """Every fit locks anew, and in between, another trainer of the same script may have the folder."""
    seen = []

    def batches():
        for batch in vector_batches(6, 4, 4, 3):
            seen.append(running(tmp_path))
            yield batch

    trainer = _trainer(tmp_path)
    for _ in range(2):
        trainer.fit(batches(), 2)
        assert running(tmp_path) is None
    assert len(seen) >= 4 and all(owner is not None for owner in seen)


def test_a_run_folder_and_a_script_in_its_checkpoints_know_of_each_other(start, tmp_path):
    (tmp_path / JOB_FILE).write_text("a job")
    start()
    with pytest.raises(UsageError) as caught:
        _trainer(tmp_path / run_folder.CHECKPOINTS).fit(vector_batches(3, 4, 4, 3), 2)
    assert caught.value.code == "run-in-progress"


def test_a_script_in_its_checkpoints_keeps_a_run_folder_from_being_cleared(tmp_path):
    (tmp_path / JOB_FILE).write_text("a job")
    (tmp_path / run_folder.CHECKPOINTS).mkdir()
    with RunLock(tmp_path / run_folder.CHECKPOINTS) as lock:
        assert lock.take()
        with pytest.raises(UsageError) as caught:
            run_folder.check(tmp_path, resume=False, overwrite=True)
        assert caught.value.code == "run-in-progress"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_run_blocks_nobody_for_a_moment(start, number, tmp_path):
    process = start()
    os.kill(process.pid, number)
    process.join()
    begun = time.monotonic()
    assert running(tmp_path) is None
    assert time.monotonic() - begun < in_progress._WATCH_SECONDS / 2
    with RunLock(tmp_path) as lock:
        assert lock.take()


def test_a_run_is_in_progress_while_any_of_its_ranks_is(start, tmp_path):
    first, second = start(), start(share=True)
    first.kill()
    first.join()
    assert running(tmp_path) is not None
    second.kill()
    second.join()
    assert running(tmp_path) is None


def test_a_run_that_has_ended_leaves_no_owner(tmp_path):
    with RunLock(tmp_path) as lock:
        assert lock.take() and running(tmp_path) is not None
    assert (tmp_path / LOCK_FILE).read_bytes() == b""
    assert running(tmp_path) is None


def _elsewhere(folder, **owner):
    (folder / LOCK_FILE).write_text(json.dumps({"host": "other", "process": 7, "machine": None} | owner))


def test_a_run_of_another_machine_is_known_by_its_heartbeat(tmp_path, monkeypatch):
    """As on a file system where each machine has locks of its own."""
    monkeypatch.setattr(in_progress, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(in_progress, "_WATCH_SECONDS", 0.5)
    _elsewhere(tmp_path)
    begun = time.monotonic()
    assert running(tmp_path) is None  # it died a moment ago: watched, in vain
    assert time.monotonic() - begun >= 0.5
    lock = RunLock(tmp_path)
    lock.share()
    monkeypatch.setattr(in_progress, "_try_lock", lambda *_, **__: True)
    assert running(tmp_path) == "process 7 on other"
    lock.release(is_over=False)
    assert running(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0" * 9, '"words"'])
def test_a_lock_that_cannot_be_read_blocks_nobody(content, tmp_path, monkeypatch):
    monkeypatch.setattr(in_progress, "_WATCH_SECONDS", 0.1)
    (tmp_path / LOCK_FILE).write_text(content)
    assert running(tmp_path) is None


def test_an_old_heartbeat_is_not_watched(tmp_path):
    _elsewhere(tmp_path)
    os.utime(tmp_path / LOCK_FILE, (1, 1))
    begun = time.monotonic()
    assert running(tmp_path) is None
    assert time.monotonic() - begun < 1.0


def test_a_folder_without_a_lock_is_free(tmp_path):
    assert running(tmp_path) is None
    assert running(tmp_path / "nowhere") is None
    lock = RunLock(tmp_path / "nowhere")
    lock.share()  # a rank that does not see the folder
    lock.release(is_over=True)
