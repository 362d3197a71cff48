"""The one place that knows CPU from CUDA: device choice, streams, fences between streams, clocks, RNG state."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from decoupled_pp.core.errors import UsageError, shown
from decoupled_pp.core.module_state import KeptState

Mark: TypeAlias = "float | torch.cuda.Event"
"""A point in the device's work: seconds of the host's clock on the CPU, an event on CUDA."""


def choose_device(setting: str, local_rank: int, local_ranks: int) -> torch.device:
    """Return the device of one rank: its own GPU, or the CPU; "auto" takes GPUs if every local rank can have one."""
    if setting not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"`device`: {shown(setting)} is not known; use 'auto', 'cpu' or 'cuda' (one GPU per rank, in their order)",
            code="not-one-of-the-choices",
            key="device",
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "cuda" and gpus < local_ranks:
        raise UsageError(
            f"`device`: cuda needs one GPU per rank, {local_ranks} here, found {gpus}; use cpu or auto",
            code="too-few-gpus",
            key="device",
        )
    if setting == "cpu" or gpus < local_ranks:
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: by tensors on a GPU (torch's allocator), else by the whole process (RSS)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def host_memory() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Fence:
    """A point in the device's work that other streams, or a host thread, can wait for. Free on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps, and spins on no core
            self._event.record(torch.cuda.current_stream(device))

    def wait(self, *tensors: Tensor) -> None:
        """Make the current stream, which will use `tensors` of another one, wait for the point; the host does not."""
        if self._event is not None:
            self._event.wait(torch.cuda.current_stream(self._device))
            for tensor in tensors:  # or the allocator might reuse their memory before this stream has read them
                tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def synchronize(self) -> None:
        """Make the calling host thread wait for the point (in a training loop only for one some packets ago)."""
        if self._event is not None:
            self._event.synchronize()


def own_stream(device: torch.device) -> Any:
    """Return a context in which work goes to a new stream of `device`, which becomes current (nothing on the CPU)."""
    if device.type == "cuda":
        # Otherwise every exit would switch back to device 0, and so each rank of a machine would open a CUDA context
        # there, at some 500 MB.
        torch.cuda.set_device(device)
        return torch.cuda.stream(torch.cuda.Stream(device))
    return nullcontext()


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`; the host does not wait for the copy."""
    # A copy from ordinary memory, `non_blocking` or not, may wait until the stream has come to it. One from page-locked
    # memory does not.
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Clock:
    """Times a stage's work: host time on the CPU, device time by events on CUDA (the host never waits in `mark`)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._origin: torch.cuda.Event | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._origin = torch.cuda.Event(enable_timing=True)
            self._origin.record(torch.cuda.current_stream(device))
            self._anchor = time.time()
        else:
            self._anchor = time.time() - time.perf_counter()

    def mark(self) -> Mark:
        """Return the present point of the current stream's work."""
        if self._origin is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, marks: Sequence[Mark]) -> list[float]:
        """Return the Unix times of marks, in seconds. On CUDA this waits for the last: use it for flushes only."""
        if self._origin is None:
            return [self._anchor + mark for mark in marks if isinstance(mark, float)]
        events = [mark for mark in marks if not isinstance(mark, float)]
        if not events:
            return []
        events[-1].synchronize()
        times = [self._anchor + self._since_origin(event) for event in events]
        # CUDA measures from event to event in single-precision milliseconds, whose steps are 0.25 ms after an hour and
        # 4 ms after ten. So the last mark becomes the origin of the next call, whose first mark it may be again.
        self._origin = events[-1]
        self._anchor = times[-1]
        return times

    def _since_origin(self, event: torch.cuda.Event) -> float:
        assert self._origin is not None
        return 0.0 if event is self._origin else self._origin.elapsed_time(event) / 1000


class RandomStream:
    """A random stream of its own: inside `with stream:` the default generators draw from it, and only there."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generators = [torch.default_generator]  # a module on a GPU may draw from either
        if device.type == "cuda":
            torch.cuda.init()
            self._generators.append(torch.cuda.default_generators[device.index or 0])
        self._own = [torch.Generator(g.device).manual_seed(seed).get_state() for g in self._generators]
        self._outside: list[Tensor] = []

    def __enter__(self) -> None:
        self._outside = self._swap(self._own)

    def __exit__(self, *_: object) -> None:
        self._own = self._swap(self._outside)

    def here(self) -> Tensor:
        """Return the present position, inside `with stream:`, as `state` does outside of it."""
        return torch.cat([generator.get_state() for generator in self._generators])

    @contextmanager
    def replayed(self, position: Tensor) -> Iterator[None]:
        """Draw the numbers from `position` on once more, inside `with stream:`, and then go on from the present one."""
        present = self._swap(self._parts(position))
        try:
            yield
        finally:
            self._swap(present)

    @property
    def state(self) -> Tensor:
        """The position of the stream, as one uint8 tensor on the CPU."""
        return torch.cat(self._own)

    @state.setter
    def state(self, state: Tensor) -> None:
        self._own = self._parts(state)

    def _parts(self, state: Tensor) -> list[Tensor]:
        return list(state.split([own.numel() for own in self._own]))

    def _swap(self, states: list[Tensor]) -> list[Tensor]:
        before = [generator.get_state() for generator in self._generators]
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)
        return before


def random_position(device: torch.device) -> Callable[[], None]:
    """Return a function that puts the default generators of the CPU and of `device` back to where they are now."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]

    def put_back() -> None:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

    return put_back


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Run with the default generators (the CPU's, and all GPUs' once `device` or another is in use) seeded."""
    if device is not None and device.type == "cuda":
        torch.cuda.init()
    # torch.manual_seed would seed all GPUs, unforked ones too, and those of a CUDA that is only started later.
    gpus: list[int] = []
    if torch.cuda.is_initialized():
        gpus = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=gpus, device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield


def on_meta(module: nn.Module) -> bool:
    """Returns whether a parameter or buffer of the module is on the meta device, where tensors have a shape only."""
    return any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers()))


@contextmanager
def kept_modes(module: nn.Module) -> Iterator[None]:
    """Restore the train/eval flag of every submodule at the end: `train()` would give all of them one flag."""
    flags = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, flag in flags:
            part.training = flag


@contextmanager
def kept_gradients(module: nn.Module) -> Iterator[None]:
    """Restore the gradients of all parameters at the end: a layer may call `backward` inside its own forward."""
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None  # else the layer would add to them in place
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def untouched(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore train/eval flags, gradients, carried state (`KeptState`) and the random generators at the end."""
    kept = KeptState(module)
    with kept_modes(module), kept_gradients(module), torch.random.fork_rng(devices=cuda_devices(device)):
        try:
            yield
        finally:
            kept.restore()


def cuda_devices(device: torch.device) -> list[int]:
    """Return the CUDA device index as `torch.random.fork_rng` wants it; none for other devices."""
    if device.type != "cuda":
        return []
    return [device.index if device.index is not None else torch.cuda.current_device()]
