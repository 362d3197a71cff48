"""`dpp bench gpu`: GPU tests, the speed of one stage against a large matmul, two stages on one GPU, no hidden waits."""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from decoupled_pp.commands.bench.gpu_measure import (
    Shape,
    compare_two_stages,
    matmul_rates,
    measure_stage,
    measure_two_stages,
    model_flops,
    release,
    stage_figures,
    steps_without_waiting,
)
from decoupled_pp.core.errors import UsageError

TOLERANCE = 1e-2
"""Largest difference between two stages through the pipeline and in plain PyTorch, relative to what training changed.

Expected is 0. On CUDA, attention's backward adds with atomics in varying order, in bf16: about 2^-8 of a gradient.
"""

_NO_GPU = (
    "dpp bench gpu: no CUDA device here, nothing measured; run it (or `make gpu-check`) on a machine with a GPU, "
    "or try its code with: dpp bench gpu --device cpu --width 64 --blocks 1 --heads 2 --sequence 32 --batch 2 "
    "--vocabulary 97 --matmul 128\n"
)
_SIZES = {
    "width": (2048, "width of the residual stream"),
    "blocks": (4, "transformer blocks of a stage"),
    "heads": (16, "attention heads"),
    "sequence": (1024, "tokens of a sample"),
    "batch": (8, "samples of a packet"),
    "vocabulary": (50257, "size of the vocabulary (of the critic)"),
    "matmul": (8192, "side of the square bf16 matmul to compare with"),
    "steps": (20, "timed steps per repeat"),
    "warm-up": (5, "steps before them"),
    "repeats": (5, "repeats; medians are reported"),
}

Results = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to try the code")
    for name, (default, text) in _SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--skip-tests", action="store_true", help="do not run tests/gpu first")
    parser.add_argument("--output", help="results folder (docs/results/gpu_<device>)")
    parser.set_defaults(run=run_command)


def run_command(chosen: argparse.Namespace) -> int:
    """Measure everything and write the results folder; 1 if a test or a check failed."""
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.stdout.write(_NO_GPU)
        return 0
    shape = _checked_shape(chosen)
    device = torch.device("cuda", 0) if chosen.device == "cuda" else torch.device("cpu")
    results: Results = {"command": _command(chosen), "environment": environment_of(device), "shape": asdict(shape)}
    folder = Path(chosen.output or f"docs/results/gpu_{slug(results['environment']['device'])}")
    try:
        for name, part in _parts(chosen, shape, device).items():
            sys.stdout.write(f"{name} ...\n")
            sys.stdout.flush()
            results[name] = part(results)
            release(device)
            write_results(folder, results)  # what is measured stays, whatever comes next
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"bench gpu: this device has too little memory ({str(error).splitlines()[0]}); take a smaller --batch, "
            "--blocks or --vocabulary"
        ) from error
    sys.stdout.write(table(results) + f"\nwritten to {folder}\n")
    return 0 if all(passed for _, passed, _ in checks(results)) else 1


def _checked_shape(chosen: argparse.Namespace) -> Shape:
    low = [name for name in _SIZES if getattr(chosen, name.replace("-", "_")) < 1]
    if low or chosen.width % chosen.heads:
        raise UsageError("bench gpu: every size must be at least 1, and --width a multiple of --heads")
    return Shape(chosen.width, chosen.blocks, chosen.heads, chosen.sequence, chosen.batch, chosen.vocabulary)


def _parts(
    chosen: argparse.Namespace, shape: Shape, device: torch.device
) -> dict[str, Callable[[Results], dict[str, Any]]]:
    """What is measured, in order; each may look at the results before it."""
    amount = {"steps": chosen.steps, "warm_up": chosen.warm_up, "repeats": chosen.repeats}

    def matmul(_: Results) -> dict[str, Any]:
        return {"size": chosen.matmul, "flops_per_second": matmul_rates(chosen.matmul, device, chosen.repeats)}

    def stage(results: Results, compiled: bool) -> dict[str, Any]:
        try:
            measured = measure_stage(shape, device, compiled=compiled, **amount)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler that does not work here must not cost the other figures
            if not compiled:
                raise
            return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        rate = statistics.median(results["matmul"]["flops_per_second"])
        return {**measured, "figures": stage_figures(measured, shape, rate)}

    def two(_: Results) -> dict[str, Any]:
        return {
            **measure_two_stages(shape, device, **amount),
            "against_plain_pytorch": compare_two_stages(shape, device, steps=chosen.warm_up),
        }

    def waits(_: Results) -> dict[str, Any]:
        return {"found": steps_without_waiting(shape, device, steps=chosen.steps, warm_up=chosen.warm_up)}

    parts: dict[str, Callable[[Results], dict[str, Any]]] = {"matmul": matmul}
    if not chosen.skip_tests:
        parts = {"tests": lambda _: run_tests(tests_folder()), **parts}
    parts["eager"] = lambda results: stage(results, False)
    if not chosen.no_compile:
        parts["compiled"] = lambda results: stage(results, True)
    return {**parts, "two_stages": two, "waits": waits}


# ----------------------------------------------------------------------------------------------- tests and environment


def tests_folder() -> Path | None:
    """The GPU tests of the source tree this package runs from, if it does."""
    folder = Path(__file__).parents[4] / "tests" / "gpu"
    return folder if folder.is_dir() else None


def run_tests(folder: Path | None) -> dict[str, Any]:
    """Run pytest on a folder; its exit code (0: passed or skipped) and the last lines of what it said."""
    if folder is None:
        return {"exit_code": None, "output": ["no tests/gpu beside this package"]}
    command = [sys.executable, "-m", "pytest", str(folder), "-rs", "-p", "no:cacheprovider"]
    ended = subprocess.run(command, cwd=folder.parent.parent, capture_output=True, text=True, check=False)
    return {"exit_code": ended.returncode, "output": (ended.stdout + ended.stderr).strip().splitlines()[-40:]}


def environment_of(device: torch.device) -> dict[str, Any]:
    """Versions and device, for whoever compares figures."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if device.type == "cpu":
        return {**found, "device": f"cpu {platform.machine()}", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        **found,
        "driver": _driver(),
        "cudnn": torch.backends.cudnn.version(),
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
    }


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return told[0] if told else None


def slug(name: str) -> str:
    """A device's name as part of a folder's name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _command(chosen: argparse.Namespace) -> str:
    """The whole command line, defaults spelt out."""
    words = ["dpp", "bench", "gpu", "--device", chosen.device]
    for name in _SIZES:
        words += [f"--{name}", str(getattr(chosen, name.replace("-", "_")))]
    words += [flag for flag, on in (("--no-compile", chosen.no_compile), ("--skip-tests", chosen.skip_tests)) if on]
    return shlex.join(words)


# ------------------------------------------------------------------------------------------------------------ results


def write_results(folder: Path, results: Results) -> None:
    """Write `raw.json` and `README.md`.

    Raises:
        UsageError: The folder cannot be written.
    """
    environment = "\n".join(f"- {key}: {value}" for key, value in results["environment"].items())
    text = (
        f"# One GPU: {results['environment']['device']}\n\n    {results['command']}\n\n{environment}\n\n"
        f"{table(results)}\n{_NOTES}"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "raw.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror or error}; choose another --output") from error


def table(results: Results) -> str:
    """All figures and checks as a Markdown table; what is not measured (yet) is left out."""
    rows = [f"model FLOPs per step: {_flops_text(Shape(**results['shape']))}", ""]
    rows += ["| figure | median | min .. max |", "| --- | ---: | ---: |"]
    if "matmul" in results:
        rates = [rate / 1e12 for rate in results["matmul"]["flops_per_second"]]
        rows.append(_row(f"bf16 matmul of side {results['matmul']['size']}, TFLOP/s", rates))
    for name in ("eager", "compiled"):
        rows += _stage_rows(name, results.get(name))
    if "two_stages" in results:
        rows += [
            _row(f"two stages, {label}, packets/s", results["two_stages"]["packets_per_second"][way])
            for way, label in (("plain", "one after the other"), ("joined", "a stream each, joined by a link"))
        ]
        rows.append(_row("two stages, joined / one after the other", [results["two_stages"]["joined_over_plain"]]))
    rows += ["", "| check | result | detail |", "| --- | --- | --- |"]
    rows += [f"| {name} | {'passed' if passed else 'FAILED'} | {detail} |" for name, passed, detail in checks(results)]
    return "\n".join(rows) + "\n"


def _flops_text(shape: Shape) -> str:
    flops = model_flops(shape)
    whole = sum(flops.values())
    return f"{whole:.4g} (" + ", ".join(f"{part} {count / whole:.1%}" for part, count in flops.items()) + ")"


def _stage_rows(name: str, found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    if "error" in found:
        return [f"| stage, {name} | not measured | {found['error'].replace('|', '/')} |"]
    figures = found["figures"]
    tera = [rate / 1e12 for rate in figures["model_flops_per_second"]]
    rows = [
        _row(f"stage, {name}: step, ms", figures["step_ms"]),
        _row(f"stage, {name}: tokens/s", figures["tokens_per_second"]),
        _row(f"stage, {name}: model TFLOP/s", tera),
        _row(f"stage, {name}: of the matmul's rate", figures["fraction_of_matmul"]),
        _row(f"stage, {name}: critic's share of time", figures["critic_time_share"]),
        _row(f"stage, {name}: optimizer's share of time", figures["optimizer_time_share"]),
        _row(f"stage, {name}: critic's share of FLOPs", figures["critic_flops_share"]),
    ]
    for key, label in (("peak_memory_bytes", "peak memory"), ("saved_activation_bytes_peak", "saved activations")):
        if found[key] is not None:
            rows.append(_row(f"stage, {name}: {label}, GB", [found[key] / 1e9]))
    return rows


def _row(label: str, values: Sequence[float]) -> str:
    spread = f"{min(values):.4g} .. {max(values):.4g}" if len(values) > 1 else ""
    return f"| {label} | {statistics.median(values):.4g} | {spread} |"


def checks(results: Results) -> list[tuple[str, bool, str]]:
    """Name, whether passed, and detail of every check made so far."""
    made: list[tuple[str, bool, str]] = []
    if "tests" in results:
        said = results["tests"]["output"]
        made.append(("tests/gpu", not results["tests"]["exit_code"], said[-1] if said else ""))
    if "error" in results.get("compiled", {}):
        made.append(("torch.compile", False, "see the table above"))
    if "two_stages" in results:
        found = results["two_stages"]["against_plain_pytorch"]
        detail = "bit-equal" if found["bit_equal"] else f"{found['relative_difference']:.2g} of what training changed"
        made.append(("two stages train as plain PyTorch", found["relative_difference"] <= TOLERANCE, detail))
    if "waits" in results:
        made.append(("no wait for the device between flushes", results["waits"]["found"] is None, _wait_text(results)))
    return [(name, passed, detail.replace("|", "/")) for name, passed, detail in made]


def _wait_text(results: Results) -> str:
    if results["environment"]["cuda"] is None or results["environment"]["device"].startswith("cpu"):
        return "nothing to wait for on a CPU"
    return str(results["waits"]["found"] or 'none under torch.cuda.set_sync_debug_mode("error")')


_NOTES = f"""
Model FLOPs count matrix products only (6 per weight and token, attention in full as in PaLM's appendix B), so the
fraction of the matmul's rate is a model FLOP utilisation against this device's real matmul, not its data sheet.
Shares of time are of the four computing phases, by CUDA events. Saved activations include the bf16 copies of weights
that autocast makes and autograd keeps until backward. A GPU that one stage fills leaves two joined stages nothing to
gain on it; the figure shows what streams and link cost. Two stages count as trained alike if the difference of their
weights is at most {TOLERANCE:g} of what training changed. The debug mode sees PyTorch's own synchronising calls; the
link's bounded wait for a packet some places ahead is an event wait, which it does not see.
"""
