"""Maps ranks to stages; no other file knows which rank holds which stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from decoupled_pp.core.errors import UsageError


@dataclass(frozen=True)
class Place:
    """The place of one rank in the pipeline."""

    stage: int
    replica: int = 0  # among the ranks that hold this stage


@dataclass(frozen=True)
class Topology:
    """The map between ranks and stages: stage outermost, so that the replicas of a stage are neighbours.

    Each stage has one replica today; a run with one process holds all stages in it.
    """

    stages: int
    ranks: int  # processes: one for all stages, or one for each

    def __post_init__(self) -> None:
        if self.ranks not in (1, self.stages):
            remedy = f"start {self.stages} ranks"
            if self.ranks > 0:
                remedy += f", or set `stages` to {self.ranks}"
            raise UsageError(
                f"{self.stages} stages need {self.stages} ranks, or one process for all, not {self.ranks}: {remedy}",
                code="ranks-do-not-fit-stages",
                key="stages",
            )

    def rank_of(self, stage: int, replica: int = 0) -> int:
        """Return the rank that holds a replica of a stage."""
        return 0 if self.ranks == 1 else stage + replica

    def places_of(self, rank: int) -> list[Place]:
        """Return the places that one rank holds, in the order of the stages."""
        return [Place(stage) for stage in range(self.stages) if self.rank_of(stage) == rank]

    def links(self) -> Iterator[tuple[Place, Place]]:
        """Yield the two ends of every link, in the order of the stages."""
        yield from pairwise(Place(stage) for stage in range(self.stages))

    def is_upstream(self, rank: int, other: int) -> bool:
        """Return whether all stages of `rank` come before those of `other`, so that its packets reach them."""
        return self.places_of(rank)[-1].stage < self.places_of(other)[0].stage

    def name(self, place: Place) -> str:
        """Return the name of a place in messages: "stage 2 (rank 2)"."""
        return f"stage {place.stage} (rank {self.rank_of(place.stage, place.replica)})"
