"""The launch scripts parse, refuse what is missing in one line, and train across two network namespaces."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").iterdir())
COMPLETE = {"NNODES": "2", "NODE_RANK": "0", "NPROC_PER_NODE": "1", "MASTER_ADDR": "localhost"}


def run(script, *arguments, seconds=300.0, **variables):
    """Run a script with these environment variables and the search path, and no others."""
    environment = {"PATH": os.environ["PATH"], **variables}
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_parses_and_stops_at_the_first_error(script):
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert "\nset -euo pipefail\n" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "text"),
    [
        ("one_node.sh", [], {"NPROC_PER_NODE": "2"}, "no configuration given"),
        ("one_node.sh", ["run.yaml"], {}, "NPROC_PER_NODE is not set"),
        ("one_node.sh", ["run.yaml"], {"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE is 'two'"),
        ("multi_node.sh", [], COMPLETE, "no configuration given"),
        *[
            ("multi_node.sh", ["run.yaml"], {k: v for k, v in COMPLETE.items() if k != name}, f"{name} is not set")
            for name in COMPLETE
        ],
        ("multi_node.sh", ["run.yaml"], COMPLETE | {"NODE_RANK": "x"}, "NODE_RANK is 'x'"),
        ("multi_node.sh", ["run.yaml"], COMPLETE | {"NODE_RANK": "2"}, "it must be 0 .. 1"),
        ("multi_node.sh", ["run.yaml"], COMPLETE | {"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE is 0"),
        ("multi_node.sh", ["run.yaml"], COMPLETE | {"MAX_RESTARTS": "1"}, "RUN_ID is not set"),
        ("slurm.sbatch", ["run.yaml"], {}, "not inside a Slurm job"),
        ("slurm.sbatch", [], {"SLURM_JOB_ID": "1"}, "no configuration given"),
        ("slurm.sbatch", ["run.yaml"], {"SLURM_JOB_ID": "1"}, "NPROC_PER_NODE is not set"),
    ],
)
def test_refuses_in_one_line(script, arguments, variables, text):
    result = run(script, *arguments, **variables)
    assert result.returncode == 2
    assert text in result.stderr
    assert result.stderr.startswith(f"{script}: ") and result.stderr.count("\n") == 1


def test_one_node_hands_over_to_torchrun(tmp_path):
    result = run("one_node.sh", "run.yaml", "--overwrite", NPROC_PER_NODE="3", PYTHON=_fake_python(tmp_path))
    assert result.stdout.strip() == (
        "-m torch.distributed.run --standalone --nproc-per-node 3 --max-restarts 0 "
        "-m decoupled_pp train run.yaml --overwrite"
    )


def test_slurm_gives_every_node_its_place(tmp_path):
    """With stand-ins for srun and scontrol: what each of two nodes would run."""
    python = _fake_python(tmp_path)
    _executable(tmp_path / "scontrol", "printf 'first\\nsecond\\n'")
    _executable(tmp_path / "srun", 'shift; for k in 0 1; do SLURM_NODEID=$k "$@"; done')
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": python,
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "[first,second]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_RESTART_COUNT": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    result = run("slurm.sbatch", "run.yaml", **variables)
    assert result.returncode == 0, result.stderr
    for k, line in enumerate(result.stdout.splitlines()):
        assert f"--nnodes 2 --node-rank {k} --nproc-per-node 4 --master-addr first" in line
        assert "--rdzv-id slurm-7-1 --max-restarts 3" in line
        assert line.endswith("train run.yaml --resume")


@pytest.mark.slow
def test_two_hosts_train_and_clean_up(tmp_path):
    before = _namespaces()
    options = [
        "--set",
        "stages=2",
        "--set",
        "training.steps=50",
        "--set",
        "validation.every=25",
        "--set",
        "logging.tensorboard=false",
    ]
    variables = {"RUNS": str(tmp_path), "PYTHON": sys.executable, "NPROC_PER_NODE": "1"}
    result = run("two_hosts_demo.sh", *options, **variables)
    if result.stdout.startswith("skipped: "):
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "two-hosts" / "model.safetensors").is_file()
    first, second = (int(sent) for sent in re.findall(r"sent (\d+) bytes over the cable", result.stdout))
    assert first > 50 * 32 * 256 * 4  # the activations of 50 packets, at least
    assert second < first / 4
    assert _namespaces() <= before


def test_two_hosts_says_why_it_does_not_run(tmp_path):
    """As another user than root, whom a stand-in for `id` makes up."""
    _executable(tmp_path / "id", "echo 1000")
    result = run("two_hosts_demo.sh", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode == 0
    assert result.stdout == "skipped: making network namespaces needs root; run it with sudo\n"


def _namespaces():
    folder = Path("/run/netns")
    return {path.name for path in folder.glob("dpp-*")} if folder.is_dir() else set()


def _started(tmp_path, **changes):
    """What srun would be started with in a Slurm job of one node."""
    _executable(tmp_path / "scontrol", "echo first")
    _executable(tmp_path / "srun", 'echo "cpus=${SRUN_CPUS_PER_TASK:-none} port=$MASTER_PORT"')
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "first", "SLURM_JOB_NUM_NODES": "1"}
    variables |= {"SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return run("slurm.sbatch", "run.yaml", **variables | changes).stdout.strip()


def test_srun_is_told_the_cores_of_a_task_and_two_jobs_have_two_ports(tmp_path):
    assert _started(tmp_path) == "cpus=none port=10007"
    assert _started(tmp_path, SLURM_JOB_ID="20008", SLURM_CPUS_PER_TASK="16") == "cpus=16 port=10008"
    assert _started(tmp_path, MASTER_PORT="1234") == "cpus=none port=1234"


def test_the_port_of_several_machines_follows_from_the_name_of_the_launch(tmp_path):
    def port(**changes):
        said = run("multi_node.sh", "run.yaml", PYTHON=_fake_python(tmp_path), **COMPLETE | changes).stdout
        return int(re.search(r"--master-port (\d+)", said)[1])

    assert port() == 29400
    assert port(RUN_ID="a") == port(RUN_ID="a", NODE_RANK="1") != port(RUN_ID="b")
    assert 10000 <= port(RUN_ID="a") < 30000 and port(RUN_ID="a", MASTER_PORT="1234") == 1234


def _fake_python(folder):
    return _executable(folder / "python", 'echo "$@"')


def _executable(path, body):
    path.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)
