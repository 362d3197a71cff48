"""Refuses ranks that a strategy cannot use; imports no torch, so that the front end says so at once."""

from __future__ import annotations

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.topology import Topology
from decoupled_pp.settings.run import Settings

ONE_PROCESS = ("decoupled", "backprop")
"""Strategies that one process can build."""


def check_ranks(settings: Settings, ranks: int) -> Topology | None:
    """Return which rank holds which stage; None for a baseline, whose ranks are its own affair.

    Raises:
        UsageError: The ranks are not what the strategy needs.
    """
    kind = settings.strategy
    stages = settings.stages
    if kind == "decoupled":
        return Topology(stages, ranks)
    refuse_ranks(kind, ranks)
    if kind != "backprop" and (ranks != stages or ranks == 1):
        raise UsageError(
            f"`strategy` {kind} needs one rank per stage, at least 2: give --ranks {max(stages, 2)}",
            code="ranks-do-not-fit-strategy",
            key="strategy",
        )
    return None


def refuse_ranks(kind: str, ranks: int) -> None:
    """Raise UsageError if a baseline cannot have so many ranks."""
    if kind == "backprop" and ranks > 1:
        raise UsageError(
            f"`strategy` backprop is the whole network in one process, not {ranks}: start one rank, or set `strategy` "
            "to data_parallel",
            code="ranks-do-not-fit-strategy",
            key="strategy",
        )
    if kind == "deepspeed" and ranks < 2:
        raise UsageError(
            f"`strategy` deepspeed is a pipeline over at least 2 ranks, not {ranks}: start more, or set `strategy` to "
            "backprop",
            code="ranks-do-not-fit-strategy",
            key="strategy",
        )
