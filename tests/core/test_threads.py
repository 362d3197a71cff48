"""CPU threads: what the user says is honoured, else the cores that are free are taken."""

import os
import subprocess
import sys

import pytest
import torch

from decoupled_pp.core import environment, threads
from decoupled_pp.core.threads import choose_threads, cores

HALF_BUSY = (["cpu  9 9", "cpu0 10 0 5 100 0 0 0 0 7 7", "cpu1 10 0 5 100 0 0 0 0 0 0", "intr 5"],
             ["cpu  9 9", "cpu0 10 0 5 200 0 0 0 0 9 9", "cpu1 90 0 25 100 0 0 0 0 0 0", "intr 5"])  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHELASTIC_RUN_ID", environment.DEFAULT_THREADS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_LOOK_SECONDS", 0)


@pytest.fixture
def own_process():
    """As if `dpp` ran in a process of its own."""
    threads.own_process.set()
    yield
    threads.own_process.clear()


@pytest.fixture
def machine(own_process, monkeypatch):
    """Two cores, and files of the system that the test fills: name -> lines, or several contents in turn."""
    files = {}
    monkeypatch.setattr(threads, "cpus", lambda: {0, 1})

    def lines(name):
        content = files.get(name, [])
        return content.pop(0) if content and isinstance(content[0], list) else content

    monkeypatch.setattr(threads, "_lines", lines)
    return files


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": "many", "MKL_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "1"}, 1),
    ],
)
def test_what_the_user_has_set_is_honoured(own_process, variables, count, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert choose_threads(None, 2).count == count
    assert choose_threads(7, 2).count == 7  # the settings are nearer to the run than the environment


def test_what_a_script_has_told_torch_is_honoured(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert choose_threads(None, 1).count == torch.get_num_threads()


@pytest.mark.parametrize(("said", "count"), [(None, "None"), ("1", "('OMP_NUM_THREADS', 1)")])
def test_a_launchers_default_is_not_the_users_word(said, count):
    """The environment that torchrun was started with tells who set the variable: it changes its own later."""
    rank = "from decoupled_pp.core.environment import told_threads; print(told_threads())"
    launcher = f"""
import os, subprocess, sys
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(TORCHELASTIC_RUN_ID="none", LOCAL_WORLD_SIZE="2")
subprocess.run([sys.executable, "-c", {rank!r}])
"""
    variables = {**os.environ, **({"OMP_NUM_THREADS": said} if said else {})}
    done = subprocess.run([sys.executable, "-c", launcher], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == count, done.stderr


def test_our_own_launcher_says_what_is_its_default(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    environment.set_default_threads()
    assert os.environ["OMP_NUM_THREADS"] == "1" and environment.told_threads() is None
    os.environ.clear()
    os.environ["OMP_NUM_THREADS"] = "2"
    environment.set_default_threads()
    assert environment.told_threads() == ("OMP_NUM_THREADS", 2)


def test_the_cores_that_are_free_are_shared(machine):
    machine["/proc/stat"] = [*HALF_BUSY]
    taken = choose_threads(None, 1)
    assert (taken.count, taken.reason) == (1, "1 of 2 cores are free; `threads` sets another number")
    machine["/proc/stat"] = [HALF_BUSY[0], HALF_BUSY[0][:2] + HALF_BUSY[1][2:]]
    assert choose_threads(None, 1).count == 1  # none is free
    machine["/proc/stat"] = []
    assert choose_threads(None, 1).count == 2  # not to be seen, as on other systems
    assert choose_threads(None, 2).count == choose_threads(None, 3).count == 1


def test_a_resumed_run_keeps_its_number(machine, monkeypatch):
    assert choose_threads(None, 2, kept=2).count == 2
    assert choose_threads(None, 1, kept=64).count == 2  # another machine
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choose_threads(None, 2, kept=2).count == 1


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"/proc/self/cgroup": ["0::/"], "/sys/fs/cgroup//cpu.max": ["100000 100000"]}, 1),
        ({"/proc/self/cgroup": ["0::/a/b"], "/sys/fs/cgroup/a/cpu.max": ["50000 100000"]}, 1),
        ({"/proc/self/cgroup": ["0::/a/b"], "/sys/fs/cgroup/a/b/cpu.max": ["max 100000"]}, 2),
        ({"/proc/self/cgroup": ["4:memory:/", "3:cpu,cpuacct:/j"], "/sys/fs/cgroup/cpu/j/cpu.cfs_quota_us": ["90000"],
          "/sys/fs/cgroup/cpu/j/cpu.cfs_period_us": ["100000"]}, 1),
        ({"/proc/self/cgroup": ["1:cpu:/"], "/sys/fs/cgroup/cpu//cpu.cfs_quota_us": ["-1"],
          "/sys/fs/cgroup/cpu//cpu.cfs_period_us": ["100000"]}, 2),
    ],
)  # fmt: skip
def test_the_quota_of_a_container_bounds_the_cores(machine, files, count):
    machine |= files
    assert cores() == count


def test_affinity_bounds_the_cores():
    script = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " + (
        "from decoupled_pp.core.threads import cores; print(cores())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
