"""Small runs for the fault tests: their settings, in this process or as commands, and what a run folder holds."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from safetensors.torch import load_file

import ranks
from kit import dpp, dpp_in_rank  # noqa: F401 - tests of faults call them `runs.dpp`, `runs.dpp_in_rank`

SETTINGS = {
    "name": "run",
    "stages": 2,
    "cut": "parameters",
    "threads": 1,
    "device": "cpu",
    "model": {"kind": "mlp", "width": 16, "depth": 3},
    "data": {"kind": "factory", "factory": "faulty:points", "batch_size": 16},
    "training": {"steps": 6},
    "validation": {"batches": 1},
    "checkpoint": {"every": 2, "keep": 100},
    "logging": {"every": 2, "tensorboard": False},
}
FOLDER = Path("runs/run")


def write_settings(**sections):
    """Write `run.yaml` into the working directory; give sections to replace."""
    Path("run.yaml").write_text(yaml.safe_dump({**SETTINGS, **sections}))


def factory(name, **arguments):
    """A section that names a function of `faulty.py`."""
    return {"kind": "factory", "factory": f"faulty:{name}", "arguments": arguments}


def override(section, value):
    """A command-line override."""
    return f"--set={section}={json.dumps(value)}"


def train_in_ranks(folder, *arguments, size):
    """Train `run.yaml` on ranks that may fail: their results, and our own lines of each one's output."""
    command = (str(folder), "train", "run.yaml", *arguments)
    results = ranks.launch(dpp_in_rank, *command, size=size, folder=folder / "logs", may_fail=True)
    return results, ["\n".join(said(result.output)) for result in results]


def fingerprint(folder):
    """Every file of a folder and a hash of its content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def checkpoint_steps(folder=FOLDER):
    """The steps of the committed checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-????????"))


def metrics(folder=FOLDER):
    """The records; fails if a line is no JSON."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder=FOLDER):
    """The exported weights."""
    return load_file(folder / "model.safetensors")


def said(text):
    """Our own lines of a command's standard error."""
    return [line for line in text.splitlines() if line.startswith("dpp: ")]


class Command:
    """A command in a process of its own, in a session of its own, with all that it starts."""

    def __init__(self, *command):
        self._mark = f"faults-{os.getpid()}-{time.monotonic_ns()}"
        here = Path(__file__).parent
        searched = os.pathsep.join([str(here), str(here / "faults"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": searched, "OMP_NUM_THREADS": "1", "DPP_TEST": self._mark}
        self._process = subprocess.Popen(
            [sys.executable, "-m", *(str(word) for word in command)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait(self, seconds=300):
        """Wait for the end: exit code and standard error. Fails if a process is left behind."""
        try:
            _, errors = self._process.communicate(timeout=seconds)
            assert not self._alive(), f"left behind: {self._alive()}\n{errors}"
        finally:
            self.kill()
        return self._process.returncode, errors

    def signal(self, number):
        """Send a signal to the command itself, as a terminal or a batch system would."""
        self._process.send_signal(number)

    def signal_rank(self, rank, number):
        """Send a signal to one of its ranks."""
        (pid,) = [pid for pid, environment in self._alive().items() if environment.get("RANK") == str(rank)]
        os.kill(pid, number)

    def until(self, ready, seconds=300):
        """Wait until `ready()`."""
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise AssertionError(f"it did not come so far: {self.kill()}")
            time.sleep(0.02)

    def kill(self):
        """End all that is left: what the command printed, and its standard error."""
        for pid in self._alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return self._process.communicate()

    def processes(self):
        """The ids of all that is running."""
        return list(self._alive())

    def _alive(self):
        return {pid: found for pid, found in _environments() if found.get("DPP_TEST") == self._mark}


def _environments():
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                yield int(entry.name), dict(pair.split("=", 1) for pair in pairs if "=" in pair)
