"""The map between ranks and stages: each way is the inverse of the other, links join neighbours in order."""

import pytest

from decoupled_pp.core.topology import Place, Topology
from kit import refused

SHAPES = [(1, 1), (4, 1), (2, 2), (5, 5)]
"""Stages and ranks."""


@pytest.mark.parametrize(("stages", "ranks"), SHAPES)
def test_a_rank_holds_the_places_that_are_on_it(stages, ranks):
    topology = Topology(stages, ranks)
    for rank in range(ranks):
        for place in topology.places_of(rank):
            assert topology.rank_of(place.stage, place.replica) == rank
    held = [place for rank in range(ranks) for place in topology.places_of(rank)]
    assert [place.stage for place in held] == list(range(stages))  # every stage once, in order


@pytest.mark.parametrize(("stages", "ranks"), SHAPES)
def test_links_join_neighbours_in_the_order_of_the_stages(stages, ranks):
    links = list(Topology(stages, ranks).links())
    assert links == [(Place(stage), Place(stage + 1)) for stage in range(stages - 1)]


def test_packets_of_an_earlier_rank_reach_a_later_one():
    topology = Topology(3, 3)
    assert topology.is_upstream(0, 2)
    assert not topology.is_upstream(2, 0)
    assert not topology.is_upstream(1, 1)


def test_messages_name_stage_and_rank():
    assert Topology(3, 3).name(Place(2)) == "stage 2 (rank 2)"
    assert Topology(3, 1).name(Place(2)) == "stage 2 (rank 0)"


@pytest.mark.parametrize(("stages", "ranks"), [(2, 3), (3, 2), (4, 0)])
def test_other_numbers_of_ranks_are_refused(stages, ranks):
    with refused("ranks-do-not-fit-stages") as caught:
        Topology(stages, ranks)
    assert caught.value.key == "stages"
    assert f"not {ranks}" in str(caught.value)
