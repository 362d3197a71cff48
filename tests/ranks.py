"""Runs a function on N ranks that talk over gloo, and brings their results home.

    results = launch(function, *arguments, size=3, folder=tmp_path)

A fork server imports torch once; each rank is a process forked from it, so a launch costs a fraction of a second. As
under torchrun, the launching process hosts the store: its port is chosen by the system (no race), and it outlives every
rank. `store="rank 0"` puts the store into rank 0 instead, where it dies with it.
"""

import multiprocessing
import os
import time
import traceback
import warnings
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

from decoupled_pp.links import leave_world

PATIENCE = 300.0
"""Seconds that any wait may take, on a busy machine too: a bound on progress, not on speed."""

warnings_are_errors = False
"""In ranks; `conftest.py` sets it where pytest runs with `-W error`."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["kit", "torch._dynamo", "decoupled_pp.training.job", __name__])


@dataclass(frozen=True)
class RankResult:
    """How one rank ended: what its function returned, or "Type: text" of what it raised; exit code; output."""

    value: Any
    error: str | None
    exitcode: int | None
    output: str


def launch(function, *arguments, size, folder, seconds=PATIENCE, store="launcher", may_fail=False, expendable=()):
    """Call `function(*arguments)` on `size` ranks.

    Args:
        function: A function at the top of a module; returns tensors, numbers, strings, or containers of them.
        arguments: Picklable.
        size: Number of ranks.
        folder: Where results and outputs go.
        seconds: All ranks must have ended by then; the ones that have not are killed, and that is a failure.
        store: Who hosts the store, "launcher" or "rank 0".
        may_fail: Give back failed ranks too, instead of raising their tracebacks.
        expendable: Ranks that are killed once all others have ended.

    Returns:
        One RankResult per rank.
    """
    hub = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if store == "launcher" else None
    port = hub.port if hub is not None else None
    folder.mkdir(parents=True, exist_ok=True)
    call = (function, arguments)
    ranks = [
        _processes.Process(target=_rank_main, args=(call, rank, size, port, folder, warnings_are_errors))
        for rank in range(size)
    ]
    hung = []
    try:
        for process in ranks:
            process.start()
        hung = _wait_for([p for r, p in enumerate(ranks) if r not in expendable], seconds)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
    results = [_result_of(folder, rank, process.exitcode) for rank, process in enumerate(ranks)]
    for process in ranks:
        process.close()
    told = "\n".join(f"--- rank {rank}: {result.error}\n{result.output}" for rank, result in enumerate(results))
    assert not hung, f"{len(hung)} of {size} ranks had not ended after {seconds:g} s\n{told}"
    assert may_fail or all(result.exitcode == 0 and result.error is None for result in results), told
    return results


def values(results):
    """What the ranks returned, in order."""
    return [result.value for result in results]


def _wait_for(processes, seconds):
    deadline = time.monotonic() + seconds
    running = list(processes)
    while running and wait([p.sentinel for p in running], max(0.0, deadline - time.monotonic())):
        running = [p for p in running if p.is_alive()]
    return running


def _result_of(folder, rank, exitcode):
    kept, log = folder / f"rank-{rank}.pt", folder / f"rank-{rank}.log"
    value, error = torch.load(kept, weights_only=True) if kept.exists() else (None, None)
    kept.unlink(missing_ok=True)
    return RankResult(value, error, exitcode, log.read_text() if log.exists() else "")


def _rank_main(call, rank, size, port, folder, strict):  # noqa: PLR0917 - what a rank is given
    function, arguments = call
    log = os.open(folder / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _set_environment(rank, size, port)
    if strict:
        warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    value = error = None
    try:
        if port is None:
            _join_through_rank_0(rank, size, folder)
        value = function(*arguments)
    except Exception as failure:
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}"
    finally:
        leave_world()
        if dist.is_initialized():
            dist.destroy_process_group()
    torch.save((value, error), folder / f"rank-{rank}.tmp")
    (folder / f"rank-{rank}.tmp").replace(folder / f"rank-{rank}.pt")


def _set_environment(rank, size, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")


def _join_through_rank_0(rank, size, folder):
    told = folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (folder / "port.tmp").write_text(str(store.port))
        (folder / "port.tmp").replace(told)
    else:
        while not told.exists():
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(told.read_text()), is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE))
