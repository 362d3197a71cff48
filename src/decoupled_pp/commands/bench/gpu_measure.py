"""What `dpp bench gpu` measures on one device: a stage's step, a large matmul, two stages on streams of their own."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from decoupled_pp.pipeline.optim import build_optimizers, build_schedules
from decoupled_pp.pipeline.runtime import Worker, run
from decoupled_pp.pipeline.stage import Stage
from decoupled_pp.settings.critics import HeadCritic
from decoupled_pp.settings.run import OptimizerSettings, ScheduleSettings, StageSettings
from decoupled_pp.training.build import assemble_stage
from decoupled_pp.training.join import Session, join_in_process
from decoupled_pp.training.recipe import Recipe

ADAMW = OptimizerSettings(kind="AdamW", lr=1e-4, arguments={"fused": True})
MOMENTUM = OptimizerSettings(kind="SGD", lr=1e-2, arguments={"momentum": 0.9})
_CAPACITY, _TIMEOUT, _SEED, _DISTINCT_PACKETS = 4, 60.0, 0, 4
_MATMULS = 10


@dataclass(frozen=True)
class Shape:
    """Sizes of the benchmarked stage: GPT blocks in the middle of a model, judged by a `head` critic."""

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


def model_flops(shape: Shape) -> dict[str, int]:
    """Floating-point operations of one training step, by formula: matrix products only, a multiply-add is two.

    A weight costs 6 per token: 2 in forward, 4 in backward (gradients of input and weight; a middle stage needs the
    first block's input gradient too, for the norm before it). A block has 12 D^2 weights in matrices, the critic D V.
    Attention's scores and their product with the values cost 4 T D per token and block in forward, and twice that in
    backward: 12 T D, the whole T x T square (PaLM, Chowdhery et al. 2022, appendix B; what FlopCounterMode counts as
    well), though a causal kernel skips nearly half. Norms, GELU, the loss, the optimizer and recomputation count 0.

    Returns:
        `trunk` (matrices of the blocks), `attention`, `critic`.
    """
    return {
        "trunk": 6 * 12 * shape.width**2 * shape.blocks * shape.tokens,
        "attention": 12 * shape.sequence * shape.width * shape.blocks * shape.tokens,
        "critic": 6 * shape.width * shape.vocabulary * shape.tokens,
    }


def make_stage(
    shape: Shape,
    device: torch.device,
    optimizer: OptimizerSettings = ADAMW,
    *,
    index: int = 1,
    last: bool = False,
    schedule: ScheduleSettings | None = None,
    compiled: bool = False,
    clip_norm: float | None = None,
) -> Stage:
    """A bf16 stage of GPT blocks with a critic, or (`last`) the network's own head; `index` seeds the weights."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with seeded(_SEED + index):
        for number in range(shape.blocks):
            layers[f"block{number}"] = Block(shape.width, shape.heads, 0.0, 2 * shape.blocks)
        critic = None if last else _critic(shape, index)
        if last:
            layers["head"] = Head(shape.width, shape.vocabulary)
    trunk = nn.Sequential(layers).to(device).train()
    critic = critic.to(device).train() if critic is not None else None
    optimizers = build_optimizers(optimizer, trunk, critic, owns_head=last)
    training = StageSettings(precision="bf16", compile=compiled, clip_norm=clip_norm)
    builder = build_critic(HeadCritic())
    recipe = Recipe(cross_entropy, builder, optimizer, training=training)
    body = Body(index, trunk, critic, cross_entropy, device=device, seed=_SEED, training=training)
    stage = assemble_stage(index, index + 1 if last else index + 2, body, optimizers, recipe)
    stage.update.schedules = build_schedules(schedule or ScheduleSettings(), optimizers, 1000)
    return stage


def _critic(shape: Shape, index: int) -> nn.Module:
    hidden, output = torch.zeros(1, 1, shape.width), torch.zeros(1, 1, shape.vocabulary)
    return build_critic(HeadCritic())(CriticContext(index, index + 2, shape.blocks, hidden, output, ()))


def make_packets(shape: Shape, device: torch.device, count: int) -> list[Packet]:
    """Training packets as a stage before would send them (fp32 hidden states); a few distinct ones, over and over."""
    with seeded(_SEED):
        made = [
            (
                torch.randn(shape.batch, shape.sequence, shape.width).to(device),
                torch.randint(shape.vocabulary, (shape.batch, shape.sequence)).to(device),
            )
            for _ in range(min(count, _DISTINCT_PACKETS))
        ]
    return [Packet(PacketKind.TRAIN, n, *made[n % len(made)]) for n in range(count)]


# ------------------------------------------------------------------------------------------------- one stage, a matmul


def measure_stage(
    shape: Shape, device: torch.device, *, compiled: bool, steps: int, warm_up: int, repeats: int
) -> dict[str, Any]:
    """Steps of one stage fed directly, its output dropped: seconds per phase by the device's clock, and memory.

    Returns:
        `phase_seconds` (per step, one dictionary per repeat), `peak_memory_bytes` (None on the CPU),
        `saved_activation_bytes_peak`.
    """
    stage = make_stage(shape, device, compiled=compiled)
    packets = make_packets(shape, device, max(steps, warm_up))
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
    """Seconds of every phase over all packets; as in training, the device is waited for at the end only."""
    meter = StageMeter(stage.index, Clock(device), _ignore, every=len(packets) + 1, trace=range(0))
    ends = Ends(Given(packets), Nowhere())
    for packet in packets:
        meter.begin(packet.number)
        done = stage.train(packet, ends, meter.lap)
        meter.trained(packet.number, done.loss if done is not None else None, packet.samples)
    meter.flush(stage, 0)
    return dict(meter.totals)


def stage_figures(measured: dict[str, Any], shape: Shape, matmul_rate: float) -> dict[str, list[float]]:
    """What the times mean, one value per repeat.

    Args:
        measured: From `measure_stage`.
        shape: Of the stage.
        matmul_rate: FLOP/s of the large matmul of the same run.
    """
    flops = model_flops(shape)
    whole = sum(flops.values())
    steps = [sum(phases.values()) for phases in measured["phase_seconds"]]
    computing = [sum(phases[phase] for phase in BUSY) for phases in measured["phase_seconds"]]
    critic = [phases["critic"] for phases in measured["phase_seconds"]]
    return {
        "step_ms": [seconds * 1000 for seconds in steps],
        "tokens_per_second": [shape.tokens / seconds for seconds in steps],
        "model_flops_per_second": [whole / seconds for seconds in steps],
        "fraction_of_matmul": [whole / seconds / matmul_rate for seconds in steps],
        "critic_time_share": [own / seconds for own, seconds in zip(critic, computing, strict=True)],
        "optimizer_time_share": [
            phases["step"] / seconds for phases, seconds in zip(measured["phase_seconds"], computing, strict=True)
        ],
        "critic_flops_share": [flops["critic"] / whole],
    }


def matmul_rates(size: int, device: torch.device, repeats: int) -> list[float]:
    """FLOP/s of a square bf16 matrix product, one value per repeat of several products."""
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


# --------------------------------------------------------------------------------------------------------- two stages


class Given(Inlet):
    """The inlet of a first stage: these packets, then END."""

    def __init__(self, packets: Sequence[Packet]) -> None:
        """Take the packets."""
        self._packets = iter([*packets, Packet(PacketKind.END, len(packets))])

    def receive(self) -> Packet:
        """The next one."""
        return next(self._packets)


def two_stages(shape: Shape, device: torch.device, optimizer: OptimizerSettings, **options: Any) -> list[Stage]:
    """A pipeline of two stages of `shape.blocks` blocks each; the second has the network's head."""
    return [make_stage(shape, device, optimizer, index=k, last=k == 1, **options) for k in range(2)]


def join(stages: Sequence[Stage], packets: Sequence[Packet]) -> list[Worker]:
    """The stages joined by in-process links, each on a stream of its own; no flush before END."""
    terms = LinkTerms(_CAPACITY, _TIMEOUT)
    session = Session(Given(packets), _save_nothing, _ignore, len(packets) + 1, range(0), terms)
    return join_in_process(session, stages)


def run_joined(stages: Sequence[Stage], packets: Sequence[Packet]) -> None:
    """Train on the packets through the pipeline's own runtime, to the END."""
    workers = join(stages, packets)
    try:
        run(workers)
    finally:
        for worker in workers:
            worker.close()


def run_plainly(stages: Sequence[Stage], packets: Sequence[Packet]) -> None:
    """The same training in plain PyTorch: one stage after the other, on the current stream."""
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


def measure_two_stages(shape: Shape, device: torch.device, *, steps: int, warm_up: int, repeats: int) -> dict[str, Any]:
    """Packets per second of both ways to train two stages on one device, by the host's clock."""
    packets = make_packets(shape, device, max(steps, warm_up))
    rates: dict[str, list[float]] = {}
    for name, train in (("plain", run_plainly), ("joined", run_joined)):
        stages = two_stages(shape, device, ADAMW)
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


def compare_two_stages(shape: Shape, device: torch.device, *, steps: int) -> dict[str, Any]:
    """How far the weights after `steps` packets through the pipeline are from those of plain PyTorch.

    SGD with momentum: Adam turns a gradient that is nothing but rounding (a key bias has none at all) into a full step,
    so that it would tell the order of some atomic additions, not an error.

    Returns:
        `bit_equal`, and `relative_difference`: the norm of the difference over that of what training changed.
    """
    packets = make_packets(shape, device, steps)
    initial = _weights(two_stages(shape, device, MOMENTUM))
    trained = []
    for train in (run_plainly, run_joined):
        stages = two_stages(shape, device, MOMENTUM)
        train(stages, packets)
        trained.append(_weights(stages))
        del stages
    plain, joined = trained
    changed = _norm(a - b for a, b in zip(plain, initial, strict=True))
    apart = _norm(a - b for a, b in zip(joined, plain, strict=True))
    return {
        "bit_equal": all(torch.equal(a, b) for a, b in zip(joined, plain, strict=True)),
        "relative_difference": apart / changed,
    }


def _weights(stages: Sequence[Stage]) -> list[Tensor]:
    return [p.detach().to("cpu", copy=True) for s in stages for p in s.named_parameters("critic").values()]


def _norm(tensors: Iterator[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


# --------------------------------------------------------------------------------------------------- synchronisations


def steps_without_waiting(shape: Shape, device: torch.device, *, steps: int, warm_up: int) -> str | None:
    """Train two joined stages (clipping and a schedule included) while PyTorch refuses to wait for the device.

    Returns:
        What waited, as PyTorch tells it, or None. On the CPU nothing can.
    """
    schedule = ScheduleSettings(kind="cosine", warmup=2)
    stages = two_stages(shape, device, ADAMW, clip_norm=1.0, schedule=schedule)
    workers = join(stages, make_packets(shape, device, warm_up + steps))
    try:
        _advance(workers, warm_up)
        for worker in workers:
            worker.meter.flush(worker.stage, 0)
        with waiting_forbidden(device):
            _advance(workers, steps)
        _advance(workers, 1)  # END, which flushes
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return str(error).splitlines()[0]
    finally:
        for worker in workers:
            worker.close()
    return None


def _advance(workers: Sequence[Worker], packets: int) -> None:
    for _ in range(packets):
        for worker in workers:
            with worker.stream:
                worker.advance()


@contextmanager
def waiting_forbidden(device: torch.device) -> Iterator[None]:
    """PyTorch's own synchronising calls (`.item()`, copies to the host, ...) raise in here; the CPU has none."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def release(device: torch.device) -> None:
    """Let go of what the last measurement held: it must not count in the next one's peak."""
    torch.compiler.reset()
    gc.collect()  # schedules and optimizers hold each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _save_nothing(stage: Stage, packet: int) -> None:
    pass


def _ignore(record: Record) -> None:
    pass
