"""`dpp bench gpu`: the speed of one stage against a large matmul, and of two stages on one GPU.

Whether they train right, and never wait for the device, is tested in `tests/gpu`.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_measure import (
    StageSize,
    matmul_rates,
    measure_stage,
    measure_two_stages,
    model_flops,
    release,
    stage_figures,
)
from decoupled_pp.commands.arguments import check_at_least, flag
from decoupled_pp.core.errors import UsageError

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
    "warm_up": (5, "steps before them"),
    "repeats": (5, "repeats; medians are reported"),
}

Results = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dpp bench gpu`."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to try the code")
    for name, (default, text) in _SIZES.items():
        parser.add_argument(flag(name), type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", help="results folder (docs/results/gpu_<device>)")
    parser.set_defaults(run=run_command)


def run_command(chosen: argparse.Namespace) -> int:
    """Measures everything and writes the results folder; returns 1 if torch.compile does not work."""
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.stdout.write(_NO_GPU)
        return 0
    size = _checked_size(chosen)
    device = torch.device("cuda", 0) if chosen.device == "cuda" else torch.device("cpu")
    results: Results = {"command": _command(chosen), "environment": environment_of(device), "shape": asdict(size)}
    folder = Path(chosen.output or f"docs/results/gpu_{slug(results['environment']['device'])}")
    try:
        for name, measure in _measurements(chosen, size, device).items():
            sys.stdout.write(f"{name} ...\n")
            sys.stdout.flush()
            results[name] = measure()
            release(device)
            write_results(folder, results)  # after every part, so that a failure leaves what is measured
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"bench gpu: this device has too little memory ({str(error).splitlines()[0]}); take a smaller --batch, "
            "--blocks or --vocabulary",
            code="out-of-device-memory",
        ) from error
    sys.stdout.write(table(results) + f"\nwritten to {folder}\n")
    return 1 if "error" in results.get("compiled", {}) else 0


def _checked_size(chosen: argparse.Namespace) -> StageSize:
    check_at_least(chosen, **dict.fromkeys(_SIZES, 1))
    if chosen.width % chosen.heads:
        raise UsageError(
            f"--width {chosen.width} must be a multiple of --heads {chosen.heads}", code="option-out-of-range"
        )
    return StageSize(**{field.name: getattr(chosen, field.name) for field in fields(StageSize)})


def _measurements(
    chosen: argparse.Namespace, size: StageSize, device: torch.device
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns the measurements in the order in which they are made."""
    amount = {"steps": chosen.steps, "warm_up": chosen.warm_up, "repeats": chosen.repeats}
    rates: list[float] = []

    def matmul() -> dict[str, Any]:
        rates.extend(matmul_rates(chosen.matmul, device, chosen.repeats))
        return {"size": chosen.matmul, "flops_per_second": rates}

    def eager() -> dict[str, Any]:
        measured = measure_stage(size, device, compiled=False, **amount)
        return {**measured, "figures": stage_figures(measured, size, statistics.median(rates))}

    def compiled() -> dict[str, Any]:
        try:
            measured = measure_stage(size, device, compiled=True, **amount)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler that does not work here must not cost the other figures
            return {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
        return {**measured, "figures": stage_figures(measured, size, statistics.median(rates))}

    def two_stages() -> dict[str, Any]:
        return measure_two_stages(size, device, **amount)

    found = {"matmul": matmul, "eager": eager, "compiled": compiled, "two_stages": two_stages}
    if chosen.no_compile:
        del found["compiled"]
    return found


def environment_of(device: torch.device) -> dict[str, Any]:
    """Returns versions and device, which figures depend on."""
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
        "cudnn": torch.backends.cudnn.version(),
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
    }


def slug(name: str) -> str:
    """Returns a device's name as part of a folder's name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _command(chosen: argparse.Namespace) -> str:
    """Returns the whole command line with its defaults."""
    words = ["dpp", "bench", "gpu", "--device", chosen.device]
    for name in _SIZES:
        words += [flag(name), str(getattr(chosen, name))]
    words += ["--no-compile"] if chosen.no_compile else []
    return shlex.join(words)


def write_results(folder: Path, results: Results) -> None:
    """Writes `raw.json` and `README.md`.

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
        raise UsageError(
            f"cannot write {folder}: {error.strerror or error}; choose another --output", code="folder-unwritable"
        ) from error


def table(results: Results) -> str:
    """Returns all figures as a Markdown table; what is not measured yet is left out."""
    rows = [f"model FLOPs per step: {_flops_text(StageSize(**results['shape']))}", ""]
    rows += ["| figure | median | min .. max |", "| --- | ---: | ---: |"]
    if "matmul" in results:
        label = f"bf16 matmul of side {results['matmul']['size']}, TFLOP/s"
        rows.append(_row(label, results["matmul"]["flops_per_second"], 1e12))
    for name in ("eager", "compiled"):
        rows += _stage_rows(f"stage, {name}", results.get(name, {}))
    if "two_stages" in results:
        rates = results["two_stages"]["packets_per_second"]
        rows.append(_row("two stages, one after the other, packets/s", rates["plain"]))
        rows.append(_row("two stages, a stream each, joined by a link, packets/s", rates["joined"]))
        rows.append(_row("two stages, joined / one after the other", [results["two_stages"]["joined_over_plain"]]))
    return "\n".join(rows) + "\n"


def _flops_text(size: StageSize) -> str:
    flops = model_flops(size)
    whole = sum(flops.values())
    return f"{whole:.4g} (" + ", ".join(f"{part} {count / whole:.1%}" for part, count in flops.items()) + ")"


_STAGE_ROWS = (
    ("step_ms", "step, ms", 1.0),
    ("tokens_per_second", "tokens/s", 1.0),
    ("model_flops_per_second", "model TFLOP/s", 1e12),
    ("fraction_of_matmul", "of the matmul's rate", 1.0),
    ("critic_time_share", "critic's share of time", 1.0),
    ("optimizer_time_share", "optimizer's share of time", 1.0),
    ("critic_flops_share", "critic's share of FLOPs", 1.0),
)


def _stage_rows(label: str, found: Mapping[str, Any]) -> list[str]:
    if "error" in found:
        return [f"| {label} | not measured | {found['error'].replace('|', '/')} |"]
    if "figures" not in found:
        return []
    rows = [_row(f"{label}: {text}", found["figures"][key], unit) for key, text, unit in _STAGE_ROWS]
    for key, text in (("peak_memory_bytes", "peak memory"), ("saved_activation_bytes_peak", "saved activations")):
        if found[key] is not None:
            rows.append(_row(f"{label}: {text}, GB", [found[key]], 1e9))
    return rows


def _row(label: str, values: Sequence[float], unit: float = 1.0) -> str:
    scaled = [value / unit for value in values]
    spread = f"{min(scaled):.4g} .. {max(scaled):.4g}" if len(scaled) > 1 else ""
    return f"| {label} | {statistics.median(scaled):.4g} | {spread} |"


_NOTES = """
Model FLOPs count matrix products only (6 per weight and token, attention in full as in PaLM's appendix B), so the
fraction of the matmul's rate is a model FLOP utilisation against this device's real matmul, not its data sheet.
Shares of time are of the four computing phases, by CUDA events. Saved activations include the bf16 copies of weights
that autocast makes and autograd keeps until backward. A GPU that one stage fills leaves two joined stages nothing to
gain on it; the figure shows what streams and link cost.
"""
