"""Joins stages to their links."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from decoupled_pp.core.channels import Ends, Inlet, LinkTerms, Nowhere, Outlet
from decoupled_pp.core.device import Clock
from decoupled_pp.core.reports import Record
from decoupled_pp.links import InProcessLink
from decoupled_pp.pipeline.meter import StageMeter
from decoupled_pp.pipeline.runtime import Worker
from decoupled_pp.pipeline.stage import Stage


@dataclass(frozen=True)
class Session:
    """The things that the workers of one run share."""

    feed: Inlet
    save: Callable[[Stage, int], None]
    post: Callable[[Record], None]
    log_every: int  # packets between two flushes of the metrics
    trace: range
    terms: LinkTerms

    def worker(self, stage: Stage, inlet: Inlet | None, outlet: Outlet | None) -> Worker:
        """Join one stage to its links, with a meter of its own."""
        meter = StageMeter(
            stage.index,
            Clock(stage.body.device),
            self.post,
            every=self.log_every,
            trace=self.trace,
            updates_every=stage.update.accumulate,
            hint=stage.body.loss.hint(),
        )
        return Worker(stage, Ends(inlet or self.feed, outlet or Nowhere()), meter, self.save, self.post)


def join_in_process(session: Session, stages: Sequence[Stage]) -> list[Worker]:
    """Return the workers of a pipeline in one process."""
    links = [InProcessLink(stage.index, session.terms, stage.body.device) for stage in stages[:-1]]
    ends = zip(stages, [None, *links], [*links, None], strict=True)
    return [session.worker(stage, inlet, outlet) for stage, inlet, outlet in ends]
