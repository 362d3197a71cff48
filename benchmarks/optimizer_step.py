"""Measures what the fused form of an optimizer saves: `python benchmarks/optimizer_step.py`, one thread, the CPU.

Two stages of a small GPT train in this process with the fused form and with torch's plain one in turn, so that whatever
else the machine does falls on both. It prints the least and the greatest of the paired ratios, and their median.
"""

import statistics
import time

import torch

import decoupled_pp as dpp
from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.models import build_model
from decoupled_pp.settings.sections import GptModel

STEPS = 60
PAIRS = 9
SIZES = {"width 32": 32, "width 128": 128}


def trainer(kind: str, width: int, fused: bool | None) -> dpp.Trainer:
    """Return a trainer, its stages built and warm."""
    torch.manual_seed(0)
    network = build_model(GptModel(kind="gpt", width=width, depth=4, heads=4), DataInfo("tokens", (32,), 256))
    plan = dpp.partition(network, 2, "uniform", torch.zeros(2, 32, dtype=torch.int64), device="cpu")
    optimizer = {"kind": kind, "lr": 1e-3, "arguments": {} if fused is None else {"fused": fused}}
    made = dpp.Trainer(plan, critic="head", optimizer=optimizer, device="cpu", observer=lambda records: None)
    run(made, 10)
    return made


def run(made: dpp.Trainer, steps: int = STEPS) -> tuple[float, float]:
    """Return the processor's seconds per step: of all, and of the optimizers alone."""
    tokens = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(1))
    begun = time.process_time()
    made.fit([(tokens[:, :-1], tokens[:, 1:])], steps)
    whole = time.process_time() - begun
    alone = 0.0
    for _ in range(steps):
        for stage in made.stages:
            for parameter in (p for module in stage.body.modules for p in module.parameters()):
                parameter.grad = torch.full_like(parameter, 1e-9)
            begun = time.process_time()
            stage.update.step()
            alone += time.process_time() - begun
    return whole / steps, alone / steps


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    print("| network | optimizer | ms per step, plain | fused | plain / fused, median (least .. greatest) |")
    print("| --- | --- | --- | --- | --- |")
    for name, width in SIZES.items():
        for kind in ("AdamW", "SGD", "Adagrad"):
            plain, fused = trainer(kind, width, False), trainer(kind, width, None)
            pairs = [(run(plain), run(fused)) for _ in range(PAIRS)]
            for place, part in enumerate(("whole step", "optimizer")):
                times = [(one[place] * 1e3, other[place] * 1e3) for one, other in pairs]
                ratios = [one / other for one, other in times]
                middle = [statistics.median(column) for column in zip(*times, strict=True)]
                spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
                print(f"| {name} | {kind}, {part} | {middle[0]:.2f} | {middle[1]:.2f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
