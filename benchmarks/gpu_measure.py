"""Measurements of `dpp bench gpu` on one device: a stage's step, a large matmul, two stages on streams of their own."""

from __future__ import annotations

import gc
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.channels import Ends, Inlet, LinkTerms, Nowhere
from decoupled_pp.core.device import Clock, own_stream, seeded
from decoupled_pp.core.objective import CriticContext
from decoupled_pp.core.packets import Packet, PacketKind, as_tuple
from decoupled_pp.core.reports import Record
from decoupled_pp.critics import build_critic
from decoupled_pp.models.gpt import Block, Head
from decoupled_pp.pipeline.body import Body
from decoupled_pp.pipeline.losses import cross_entropy
from decoupled_pp.pipeline.meter import BUSY, StageMeter
from decoupled_pp.pipeline.optim import build_optimizers
from decoupled_pp.pipeline.runtime import Worker, run
from decoupled_pp.pipeline.schedules import build_schedules
from decoupled_pp.pipeline.stage import Stage
from decoupled_pp.settings.critics import HeadCritic
from decoupled_pp.settings.run import OptimizerSettings, ScheduleSettings, StageSettings
from decoupled_pp.training.build import assemble_stage
from decoupled_pp.training.join import Session, join_in_process
from decoupled_pp.training.recipe import Recipe

ADAMW = OptimizerSettings(kind="AdamW", lr=1e-4, arguments={"fused": True})
_CAPACITY = 4
_TIMEOUT = 60.0
_SEED = 0
_DISTINCT_PACKETS = 4
_MATMULS = 10


@dataclass(frozen=True)
class StageSize:
    """Sizes of the benchmarked stage: GPT blocks in the middle of a model, with a `head` critic."""

    width: int
    blocks: int
    heads: int
    sequence: int
    batch: int
    vocabulary: int

    @property
    def tokens(self) -> int:
        """Tokens of a packet."""
        return self.batch * self.sequence


def model_flops(size: StageSize) -> dict[str, int]:
    """Computes the floating-point operations of a training step: matrix products only, a multiply-add counts two.

    A weight costs 6 per token: 2 in forward, 4 in backward (gradients of input and weight; a middle stage needs the
    first block's input gradient too, for the norm before it). A block has 12 D^2 weights in matrices, the critic D V.
    Attention's scores and their product with the values cost 4 T D per token and block in forward, and twice that in
    backward: 12 T D, the whole T x T square (PaLM, Chowdhery et al. 2022, appendix B; what FlopCounterMode counts as
    well), though a causal kernel skips nearly half. Norms, GELU, the loss, the optimizer and recomputation count 0.

    Returns:
        `trunk` (matrices of the blocks), `attention`, `critic`.
    """
    return {
        "trunk": 6 * 12 * size.width**2 * size.blocks * size.tokens,
        "attention": 12 * size.sequence * size.width * size.blocks * size.tokens,
        "critic": 6 * size.width * size.vocabulary * size.tokens,
    }


def make_stage(
    size: StageSize,
    device: torch.device,
    optimizer: OptimizerSettings = ADAMW,
    *,
    index: int = 1,
    last: bool = False,
    schedule: ScheduleSettings | None = None,
    compiled: bool = False,
    clip_norm: float | None = None,
) -> Stage:
    """Builds a bf16 stage of GPT blocks with a critic, or (`last`) the network's head; `index` seeds the weights."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with seeded(_SEED + index):
        for number in range(size.blocks):
            layers[f"block{number}"] = Block(size.width, size.heads, 0.0, 2 * size.blocks)
        critic = None if last else _critic(size, index)
        if last:
            layers["head"] = Head(size.width, size.vocabulary)
    trunk = nn.Sequential(layers).to(device).train()
    critic = critic.to(device).train() if critic is not None else None
    optimizers = build_optimizers(optimizer, trunk, critic, owns_head=last)
    training = StageSettings(precision="bf16", compile=compiled, clip_norm=clip_norm)
    recipe = Recipe(cross_entropy, build_critic(HeadCritic()), optimizer, training=training)
    body = Body(index, trunk, critic, cross_entropy, device=device, seed=_SEED, training=training)
    stage = assemble_stage(index, index + 1 if last else index + 2, body, optimizers, recipe)
    stage.update.schedules = build_schedules(schedule or ScheduleSettings(), optimizers, 1000)
    return stage


def _critic(size: StageSize, index: int) -> nn.Module:
    hidden, output = torch.zeros(1, 1, size.width), torch.zeros(1, 1, size.vocabulary)
    return build_critic(HeadCritic())(CriticContext(index, index + 2, size.blocks, hidden, output, ()))


def make_packets(size: StageSize, device: torch.device, count: int) -> list[Packet]:
    """Makes training packets as a stage before would send them: fp32 hidden states, a few distinct ones in turn."""
    made = []
    with seeded(_SEED):
        for _ in range(min(count, _DISTINCT_PACKETS)):
            hidden = torch.randn(size.batch, size.sequence, size.width)
            target = torch.randint(size.vocabulary, (size.batch, size.sequence))
            made.append((hidden.to(device), target.to(device)))
    return [Packet(PacketKind.TRAIN, number, *made[number % len(made)]) for number in range(count)]


def measure_stage(
    size: StageSize, device: torch.device, *, compiled: bool, steps: int, warm_up: int, repeats: int
) -> dict[str, Any]:
    """Measures steps of one stage that is fed directly, its output dropped.

    Returns:
        `phase_seconds` (per step by the device's clock, one dictionary per repeat), `peak_memory_bytes` (None on the
        CPU), `saved_activation_bytes_peak`.
    """
    stage = make_stage(size, device, compiled=compiled)
    packets = make_packets(size, device, max(steps, warm_up))
    phases = []
    with own_stream(device):
        _timed_steps(stage, packets[:warm_up], device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(repeats):
            totals = _timed_steps(stage, packets[:steps], device)
            phases.append({phase: seconds / steps for phase, seconds in totals.items()})
    return {
        "phase_seconds": phases,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "saved_activation_bytes_peak": stage.saved_activation_bytes_peak,
    }


def _timed_steps(stage: Stage, packets: Sequence[Packet], device: torch.device) -> dict[str, float]:
    """Returns the seconds of every phase over all packets; as in training, only the end waits for the device."""
    meter = StageMeter(stage.index, Clock(device), _ignore, every=len(packets) + 1, trace=range(0))
    ends = Ends(FixedInlet(packets), Nowhere())
    for packet in packets:
        meter.begin(packet.number)
        done = stage.train(packet, ends, meter.lap)
        meter.trained(packet.number, None if done is None else done.loss, packet.samples)
    meter.flush(stage, 0)
    return dict(meter.totals)


def stage_figures(measured: dict[str, Any], size: StageSize, matmul_rate: float) -> dict[str, list[float]]:
    """Derives rates and shares from the times, one value per repeat.

    Args:
        measured: Result of `measure_stage`.
        size: Sizes of the stage.
        matmul_rate: FLOP/s of the large matmul of the same run.
    """
    flops = model_flops(size)
    whole = sum(flops.values())
    phases = measured["phase_seconds"]
    steps = [sum(one.values()) for one in phases]
    computing = [sum(one[phase] for phase in BUSY) for one in phases]
    return {
        "step_ms": [seconds * 1000 for seconds in steps],
        "tokens_per_second": [size.tokens / seconds for seconds in steps],
        "model_flops_per_second": [whole / seconds for seconds in steps],
        "fraction_of_matmul": [whole / seconds / matmul_rate for seconds in steps],
        "critic_time_share": [one["critic"] / seconds for one, seconds in zip(phases, computing, strict=True)],
        "optimizer_time_share": [one["step"] / seconds for one, seconds in zip(phases, computing, strict=True)],
        "critic_flops_share": [flops["critic"] / whole],
    }


def matmul_rates(size: int, device: torch.device, repeats: int) -> list[float]:
    """Returns the FLOP/s of a square bf16 matrix product, one value per repeat of several products."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.mm(left, right)
    rates = []
    for repeat in range(repeats + 1):
        clock = Clock(device)
        start = clock.mark()
        for _ in range(_MATMULS):
            torch.mm(left, right, out=product)
        first, last = clock.seconds([start, clock.mark()])
        if repeat:  # the first warms up
            rates.append(2 * size**3 * _MATMULS / (last - first))
    return rates


class FixedInlet(Inlet):
    """Inlet of a first stage: hands out given packets, then END."""

    def __init__(self, packets: Sequence[Packet]) -> None:
        """Stores the packets."""
        self._packets = iter([*packets, Packet(PacketKind.END, len(packets))])

    def receive(self) -> Packet:
        """Returns the next packet."""
        return next(self._packets)


def two_stages(size: StageSize, device: torch.device, optimizer: OptimizerSettings, **options: Any) -> list[Stage]:
    """Builds two stages of `size.blocks` blocks each; the second has the network's head."""
    return [make_stage(size, device, optimizer, index=index, last=index == 1, **options) for index in range(2)]


def join(stages: Sequence[Stage], packets: Sequence[Packet]) -> list[Worker]:
    """Joins the stages by in-process links, each on a stream of its own; metrics are not flushed before END."""
    terms = LinkTerms(_CAPACITY, _TIMEOUT)
    session = Session(FixedInlet(packets), _save_nothing, _ignore, len(packets) + 1, range(0), terms)
    return join_in_process(session, stages)


def run_joined(stages: Sequence[Stage], packets: Sequence[Packet]) -> None:
    """Trains on the packets through the pipeline's own runtime, to the END."""
    workers = join(stages, packets)
    try:
        run(workers)
    finally:
        for worker in workers:
            worker.close()


def run_plainly(stages: Sequence[Stage], packets: Sequence[Packet]) -> None:
    """Trains on the packets in plain PyTorch: one stage after the other, on the current stream."""
    for packet in packets:
        hidden = as_tuple(packet.payload)[0]
        for stage in stages:
            hidden = _plain_step(stage, hidden, as_tuple(packet.target)[0])


def _plain_step(stage: Stage, hidden: Tensor, target: Tensor) -> Tensor:
    with torch.autocast(stage.body.device.type, dtype=torch.bfloat16):
        output: Tensor = stage.trunk(hidden)
        logits: Tensor = stage.critic(output) if stage.critic is not None else output
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    loss.backward()
    for optimizer in stage.update.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return output.detach()


def measure_two_stages(
    size: StageSize, device: torch.device, *, steps: int, warm_up: int, repeats: int
) -> dict[str, Any]:
    """Measures packets per second of both ways to train two stages on one device, by the host's clock."""
    packets = make_packets(size, device, max(steps, warm_up))
    rates: dict[str, list[float]] = {}
    for name, train in (("plain", run_plainly), ("joined", run_joined)):
        stages = two_stages(size, device, ADAMW)
        train(stages, packets[:warm_up])
        rates[name] = [steps / _wall_seconds(train, stages, packets[:steps], device) for _ in range(repeats)]
        del stages
    gain = statistics.median(rates["joined"]) / statistics.median(rates["plain"])
    return {"packets_per_second": rates, "joined_over_plain": gain}


def _wall_seconds(
    train: Callable[[Sequence[Stage], Sequence[Packet]], None],
    stages: Sequence[Stage],
    packets: Sequence[Packet],
    device: torch.device,
) -> float:
    _wait_for(device)
    start = time.perf_counter()
    train(stages, packets)
    _wait_for(device)
    return time.perf_counter() - start


def release(device: torch.device) -> None:
    """Frees the memory of the last measurement, which must not count in the next one's peak."""
    torch.compiler.reset()
    gc.collect()  # schedules and optimizers refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _save_nothing(stage: Stage, packet: int) -> None:
    pass


def _ignore(record: Record) -> None:
    pass
