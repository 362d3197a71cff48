"""The README's script runs as it stands, in one process and under torchrun, with the same result."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script() -> str:
    """Returns the README's one block of Python."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return code


def run(command: list[str], folder: Path) -> list[str]:
    """The lines of the example's own output (the live view's lines start otherwise)."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return re.findall(r"\[[\d., ]+\] \d+ bytes backward", done.stdout)


def test_the_script_is_an_example() -> None:
    example = (ROOT / "examples" / "digits.py").read_text(encoding="utf-8")
    assert example.partition('"""\n\n')[2] == script()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the example as `script.py`."""
    made = tmp_path_factory.mktemp("readme")
    (made / "script.py").write_text("import torch\ntorch.set_num_threads(1)\n" + script())
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> str:
    """The line that one process prints."""
    [line] = run([sys.executable, "script.py"], folder)
    return line


def test_the_example_runs_and_learns(alone: str) -> None:
    assert alone.endswith("] 0 bytes backward")
    assert min(float(score) for score in re.findall(r"0\.\d+|1\.0", alone)) > 0.85


@pytest.mark.slow
def test_under_torchrun_every_rank_says_the_same(alone: str, folder: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    assert run(torchrun, folder) == [alone, alone]
