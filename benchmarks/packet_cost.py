"""Measures what the runtime costs per packet and stage: `python benchmarks/packet_cost.py`, one thread, the CPU.

Four stages of one small linear layer each train in this process, so that nearly all time is the runtime's own. It
prints the microseconds of processor time per packet and stage: the least of five runs, and their median.
"""

import statistics
import time

import torch
from torch import nn

import decoupled_pp as dpp

STAGES = 4
PACKETS = 1000
REPEATS = 5


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs, target = torch.randn(2, 4), torch.randint(4, (2,))
    plan = dpp.partition([nn.Linear(4, 4) for _ in range(STAGES)], STAGES, "uniform", inputs, device="cpu")
    optimizer = {"kind": "SGD", "lr": 0.01}
    trainer = dpp.Trainer(plan, critic="head", optimizer=optimizer, device="cpu", observer=lambda records: None)
    trainer.fit([(inputs, target)], 200)  # warm-up
    found = []
    for _ in range(REPEATS):
        start = time.process_time()
        trainer.fit([(inputs, target)], PACKETS)
        found.append((time.process_time() - start) / (STAGES * PACKETS) * 1e6)
    print(f"{min(found):.1f} (median {statistics.median(found):.1f}) microseconds per packet and stage")


if __name__ == "__main__":
    main()
