"""Chooses how many CPU threads torch's operators take in this process, and says why."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from decoupled_pp.core import environment

_LOOK_SECONDS = 0.25
"""Time over which idle cores are counted: Linux counts in ticks of 10 ms."""

own_process = threading.Event()
"""Set by the front end of `dpp` in a process of its own. A script's torch has the threads that the script told it."""


@dataclass(frozen=True)
class Threads:
    """A number of threads, and where it comes from in words."""

    count: int
    reason: str


def choose_threads(setting: int | None, processes: int, kept: int | None = None) -> Threads:
    """Return the threads of one of several processes that share this machine.

    Args:
        setting: The user's `threads`; None: what the environment or a script says, else the cores that are free.
        processes: Processes that share the free cores.
        kept: The number that a resumed run had: other numbers would round sums differently. Taken if nothing else is
            said, and if the machine has as many cores.
    """
    if setting is not None:
        return Threads(setting, "`threads`")
    if not own_process.is_set() and "torch" in sys.modules:
        return Threads(sys.modules["torch"].get_num_threads(), "as torch was told")
    told = environment.told_threads()
    if told is not None:
        return Threads(told[1], told[0])
    usable = cores()
    if kept is not None and kept <= usable:
        return Threads(kept, "as in the checkpoint")
    free = _free_cores(usable)
    shared = f", {processes} processes share them" if processes > 1 else ""
    return Threads(
        max(1, free // processes), f"{free} of {usable} cores are free{shared}; `threads` sets another number"
    )


def cores() -> int:
    """Return the number of CPU cores that this process may use: by affinity, and by the quota of its control group."""
    return max(1, min([len(cpus()), *map(round, _quotas())]))


def cpus() -> set[int]:
    """Return the numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux: containers and `taskset` leave a process fewer than there are
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _free_cores(usable: int) -> int:
    """Return how many of the usable cores nobody works on at this moment (all, where that is not to be seen)."""
    # The load average would count what ended a minute ago, such as the run before this one.
    before = _idle_ticks()
    time.sleep(_LOOK_SECONDS)
    after = _idle_ticks()
    if not before:
        return usable
    idle = sum((after[cpu][0] - before[cpu][0]) / max(1, after[cpu][1] - before[cpu][1]) for cpu in before)
    return min(usable, round(idle))


def _idle_ticks() -> dict[int, tuple[int, int]]:
    """Return the idle ticks and all ticks so far of every core that this process may use."""
    ticks = {}
    mine = cpus()
    for line in _lines("/proc/stat"):
        name, *counts = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in mine:
            user, nice, system, idle, waiting, *others = map(int, counts[:8])  # counts after these are in `user`, too
            ticks[int(name[3:])] = (idle + waiting, user + nice + system + idle + waiting + sum(others))
    return ticks


def _quotas() -> Iterator[float]:
    """Yield the cores that the control groups of this process (a container, a job of a cluster) allow by quota."""
    for line in _lines("/proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        for folder in (PurePosixPath(group), *PurePosixPath(group).parents):  # the groups above bound it as well
            place = str(folder).strip("/")
            if controllers == "":
                counts = " ".join(_lines(f"/sys/fs/cgroup/{place}/cpu.max")).split()
            elif "cpu" in controllers.split(","):
                files = (f"/sys/fs/cgroup/cpu/{place}/cpu.cfs_{name}_us" for name in ("quota", "period"))
                counts = [line for file in files for line in _lines(file)]
            else:
                break
            if len(counts) == 2 and counts[0].isdigit():  # else "max", or -1: no bound
                yield int(counts[0]) / int(counts[1])


def _lines(file: str) -> list[str]:
    """Return the lines of a file of the system; none where it is missing, as on other systems than Linux."""
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
