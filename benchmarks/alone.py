"""Measures the parts of a pipelined baseline: passes, messages, and the schedule on one rank alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import _backward, schedules

from decoupled_pp.core.packets import Loss, Payload
from decoupled_pp.core.plans import Plan
from decoupled_pp.training.baselines.deepspeed_pipeline import DeepSpeedPipeline
from decoupled_pp.training.baselines.strategy import Part, Strategy, Training
from decoupled_pp.training.baselines.torch_pipeline import TorchPipeline


@dataclass(frozen=True)
class MessageSeconds:
    """The cost of a message."""

    latency: float | None  # seconds until it has arrived, both sides ready; None on a rank that timed no trip
    host: float  # seconds of a rank's own time at one end: to post it, and to find that it is done


def message_seconds(
    tensor: Tensor, *, rank: int, ranks: int, compute: Callable[[], object], repeats: int
) -> MessageSeconds:
    """Exchange a tensor with each neighbour over the default process group; return the medians of this rank.

    All ranks call this at the same time. `compute` runs before and after every exchange, as a pipeline computes between
    messages: a loop of messages alone would find its caches warm.

        first  computes, sends |---- latency ---->| second wakes, sends |---- latency ---->| first wakes
                          host                      host
    """
    hosts: list[float] = []
    trips: list[float] = []
    checks: list[float] = []
    back = torch.empty_like(tensor)
    for parity in (0, 1):
        first = rank % 2 == parity
        peer = rank + 1 if first else rank - 1
        for _ in range(repeats if 0 <= peer < ranks else 0):
            received = _post(dist.irecv, back, peer) if not first else []
            if first:
                compute()
            _wait(received)
            start = time.perf_counter()
            sent = _post(dist.isend, tensor, peer)
            hosts.append(time.perf_counter() - start)
            if first:
                _wait(_post(dist.irecv, back, peer))
                trips.append(time.perf_counter() - start)
            compute()
            start = time.perf_counter()
            _wait(sent)  # long done
            checks.append(time.perf_counter() - start)
    # Medians, because the first exchange with a neighbour waits for it to come from its other one.
    host = median(hosts)
    latency = None
    if trips:  # the last rank of an even number only answers
        latency = max(0.0, median(trips) / 2 - host)
    return MessageSeconds(latency, host + median(checks))


def _post(operation: Any, tensor: Tensor, peer: int) -> list[Any]:
    # torch's schedules call this private function; another way to send would have another cost.
    return list(schedules._batch_p2p([dist.P2POp(operation, tensor, peer)]))


def _wait(works: list[Any]) -> None:
    schedules._wait_batch_p2p(works)


def pass_seconds(
    parts: Mapping[int, Part], inputs: Tensor, target: Payload, loss: Loss, *, stages: int, split: bool, repeats: int
) -> dict[int, tuple[float, float, float]]:
    """Return the mean seconds of forward, input's gradient and weights' gradient of each part, without links.

    Unless `split`, the whole backward pass counts as the input's. The first stage, whose input takes no gradient, is
    never split (torch 2.13, `backward_one_chunk`). The passes are those that torch's schedules call.
    """
    seconds = {}
    for stage, part in parts.items():
        judge = loss if stage == stages - 1 else None
        runs = [_passes(part, inputs, target, judge, first=stage == 0, split=split) for _ in range(repeats + 1)]
        forward, to_input, weights = (sum(column) / repeats for column in zip(*runs[1:], strict=True))
        seconds[stage] = (forward, to_input, weights)
        part.zero_grad(set_to_none=True)
    return seconds


@contextmanager
def pipeline_of_one(
    kind: str, plan: Plan, training: Training, device: torch.device, *, rank: int
) -> Iterator[Strategy]:
    """Build a pipeline of this rank alone, whatever other ranks do meanwhile; all ranks must do so at the same time.

    With torch's schedules this rank has all stages of `plan`, with DeepSpeed's engine its own one.
    """
    if kind == "deepspeed":
        yield DeepSpeedPipeline.alone(plan, training, device)
        return
    group = dist.new_group([rank], use_local_synchronization=True)
    try:
        yield TorchPipeline(kind, plan, training, device, rank=0, ranks=1, group=group)
    finally:
        dist.destroy_process_group(group)


def _passes(
    part: Part, inputs: Tensor, target: Payload, loss: Loss | None, *, first: bool, split: bool
) -> tuple[float, float, float]:
    """Return the seconds of one forward pass, its input's gradient and its weights' gradient."""
    given = inputs.detach().clone().requires_grad_(not first)
    times = [time.perf_counter()]
    output = part(given)
    assert isinstance(output, Tensor), "emulated stages return one tensor"
    result = loss(output, target) if loss is not None else output
    times.append(time.perf_counter())
    gradients = None if loss is not None else [torch.ones_like(output)]
    if split and not first:
        _, groups = _backward.stage_backward_input([result], gradients, [given], part.parameters())
        times.append(time.perf_counter())
        _backward.stage_backward_weight(part.parameters(), groups)
    else:
        torch.autograd.backward([result], gradients)
        times.append(time.perf_counter())
    times.append(time.perf_counter())
    forward, to_input, weights = (b - a for a, b in pairwise(times))
    return forward, to_input, weights
