"""Two stages on one device: how they differ from plain PyTorch, and whether their loop waits for the device."""

import math
from contextlib import contextmanager

import torch

from benchmarks import gpu_measure
from benchmarks.gpu_measure import ADAMW, join, make_packets, run_plainly, two_stages
from decoupled_pp.settings.run import OptimizerSettings, ScheduleSettings

MOMENTUM = OptimizerSettings(kind="SGD", lr=1e-2, arguments={"momentum": 0.9})
"""Not Adam: it turns a gradient that is only rounding (a key bias has none at all) into a full step, so the difference
would show the order of atomic additions, not an error."""


def difference_from_plain_pytorch(size, device, *, steps):
    """Norm of the difference of the weights after training both ways, over that of what training changed."""
    packets = make_packets(size, device, steps)
    initial = _weights(two_stages(size, device, MOMENTUM))
    trained = []
    for train in (run_plainly, gpu_measure.run_joined):
        stages = two_stages(size, device, MOMENTUM)
        train(stages, packets)
        trained.append(_weights(stages))
        del stages
    plain, joined = trained
    return _distance(joined, plain) / _distance(plain, initial)


def _weights(stages):
    return [p.detach().to("cpu", copy=True) for s in stages for p in s.named_parameters("critic").values()]


def _distance(ours, theirs):
    return math.sqrt(sum(float((a - b).double().square().sum()) for a, b in zip(ours, theirs, strict=True)))


def steps_without_waiting(size, device, *, steps, warm_up):
    """Train two joined stages (clipping and a schedule included) while PyTorch refuses to wait for the device.

    Returns PyTorch's words for what waited, or None. On the CPU nothing can wait.
    """
    schedule = ScheduleSettings(kind="cosine", warmup=2)
    stages = two_stages(size, device, ADAMW, clip_norm=1.0, schedule=schedule)
    workers = join(stages, make_packets(size, device, warm_up + steps))
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


def _advance(workers, packets):
    for _ in range(packets):
        for worker in workers:
            with worker.stream:
                worker.advance()


@contextmanager
def waiting_forbidden(device):
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
