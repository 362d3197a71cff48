"""What `dpp train` says between Enter and the first figures, and the threads that it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
name: run
device: cpu
model: {kind: mlp, width: 16, depth: 3}
data: {kind: factory, factory: kit:points, batch_size: 16}
training: {steps: 6}
validation: {batches: 1}
logging: {every: 4, tensorboard: false}
"""
ALONE = [
    "opening the data (factory)",
    "building the network (mlp)",
    "cutting its 4 layers into 2 stages by measured time",
    "building the stages and their critics",
    "training: the first figures come after 4 packets",
]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


def train(folder, *words, launcher=(), **variables):
    """Run `dpp train` in processes of its own; its lines on standard output."""
    (folder / "run.yaml").write_text(RUN)
    searched = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", *launcher, "decoupled_pp", "train", "run.yaml", *words]
    known = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    known |= {"PYTHONPATH": searched, **variables}
    done = subprocess.run(command, cwd=folder, env=known, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def threads_of(folder):
    """The threads that each stage of the newest checkpoint was trained with."""
    newest = max(folder.glob("runs/run/checkpoints/step-*"))
    return [json.loads(record.read_text())["threads"] for record in sorted(newest.glob("stage-*.json"))]


@pytest.mark.slow
def test_every_phase_is_said_and_the_users_threads_are_taken(tmp_path):
    lines = train(tmp_path, OMP_NUM_THREADS="3")
    assert lines[:2] == ["loading PyTorch", "CPU threads: 3 (OMP_NUM_THREADS)"]
    assert lines[2:7] == ALONE
    assert threads_of(tmp_path) == [3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TORCHRUN])
def test_ranks_say_every_phase_once(launcher, tmp_path):
    lines = train(tmp_path, *([] if launcher else ["--ranks", "2"]), launcher=launcher)
    if not launcher:
        assert lines.pop(0) == "starting 2 ranks"
    assert lines[:2] == ["loading PyTorch", "joining 2 ranks"]
    assert lines[2].startswith("CPU threads per rank: ") and "cores are free, 2 processes share them" in lines[2]
    assert lines[3:8] == ALONE
    assert len(set(threads_of(tmp_path))) == 1
    assert all(lines.count(line) == 1 for line in lines[:8])


@pytest.mark.slow
def test_a_resumed_run_takes_the_threads_that_it_had(tmp_path):
    train(tmp_path, "--set=training.steps=3", OMP_NUM_THREADS="1")
    assert "CPU threads: 1 (as in the checkpoint)" in train(tmp_path, "--resume")
    assert threads_of(tmp_path) == [1, 1]
