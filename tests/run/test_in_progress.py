"""Whether a run is in progress: by a lock of the kernel here, by a heartbeat elsewhere; nothing stale ever blocks."""

import json
import multiprocessing
import os
import signal
import socket
import time

import pytest

from decoupled_pp.core.errors import UsageError
from decoupled_pp.run import folder as run_folder
from decoupled_pp.run import in_progress
from decoupled_pp.run.in_progress import LOCK_FILE, RunLock, running
from kit import check_text

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
    (tmp_path / run_folder.JOB_FILE).write_text("a job")
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
