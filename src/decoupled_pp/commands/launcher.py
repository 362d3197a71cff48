"""`dpp train --ranks N`: starts N ranks of this machine through torchrun's own launcher, in this process."""

from __future__ import annotations

import logging
import signal
import sys
import uuid

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from decoupled_pp.core import environment

USAGE_EXIT, SIGNAL_EXIT = 2, 128


def launch(arguments: list[str], ranks: int, *, max_restarts: int, grace_seconds: float) -> int:
    """Run `python -m decoupled_pp ARGUMENTS` on `ranks` ranks, as `torchrun --standalone` does.

    Args:
        arguments: Command line of every rank.
        ranks: Number of ranks.
        max_restarts: How often a failed run is started again; one that ends for bad input would only repeat it.
        grace_seconds: How long ranks may take to end after a signal (Ctrl-C: to save).

    Returns:
        The exit code: 0, or that of the rank that failed first, or 128 + the signal.
    """
    logging.disable(logging.ERROR)  # torch's own reports: the ranks say themselves what is wrong
    # The threads as by torchrun (ranks set theirs by the settings); warnings of torch's C++ come with its call stack.
    environment.set_defaults({"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"})
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=environment.DPP_RUN + uuid.uuid4().hex,  # by which a restart knows the run folder of its own job
        max_restarts=0,  # restarts are counted here: torchrun's own would also repeat what cannot succeed
        monitor_interval=0.1,
        shutdown_timeout=max(1, int(grace_seconds)),
        local_addr="localhost",
    )
    try:
        for attempt in range(max_restarts + 1):
            environment.begin_attempt(attempt)
            code = _attempt(config, arguments)
            if code in (0, USAGE_EXIT):
                break
        return code
    except SignalException as error:
        if error.sigval is signal.SIGTERM:
            sys.stderr.write("dpp: got SIGTERM, so all ranks were told to end\n")
        return SIGNAL_EXIT + int(error.sigval)
    finally:
        logging.disable(logging.NOTSET)


def _attempt(config: LaunchConfig, arguments: list[str]) -> int:
    """Start the ranks once and wait for them; the exit code as of `launch`."""
    try:
        elastic_launch(config, sys.executable)("-m", "decoupled_pp", *arguments)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode > 0:
            return first.exitcode
        name = signal.Signals(-first.exitcode).name  # a killed rank cannot say so itself
        sys.stderr.write(f"dpp: rank {rank} (process {first.pid}) was killed by {name}\n")
        return SIGNAL_EXIT - first.exitcode
    return 0
