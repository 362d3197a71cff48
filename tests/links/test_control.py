"""The control plane: the first fault wins, records in order, gathering is bounded."""

import json
import os
import threading
import time

import pytest

from decoupled_pp.core.errors import Fault, LinkError, PeerError, UsageError
from decoupled_pp.core.reports import CheckpointRecord, NoteRecord
from decoupled_pp.links import LocalControl, StoreControl, join_world
from decoupled_pp.training.watch import Terminated
from kit import check_text, refused
from ranks import PATIENCE, launch, values


def test_in_one_process():
    control = LocalControl()
    control.post(NoteRecord(stage=0, text="half way"))
    assert control.collect() == [NoteRecord(stage=0, text="half way")]
    assert control.collect() == []
    first = Fault("first", 0, usage=False, code="peer-gone")
    assert control.report_fault(first)
    assert not control.report_fault(Fault("second", 0, usage=True, code="unusable-value"))
    assert control.fault() == first
    assert control.stop_requested() is None
    control.request_stop("enough")
    control.request_stop("really")
    assert control.stop_requested() == "enough"
    assert control.gather("anything", [1], 1.0) == [[1]]


def test_over_ranks(tmp_path):
    first, second = values(launch(_meet, size=2, folder=tmp_path))
    assert first["gathered"] == second["gathered"] == [[0], [1]]
    assert first["records"] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [first["won"], second["won"]].count(True) == 1
    assert first["fault"] == second["fault"] == ("from rank 0" if first["won"] else "from rank 1")
    assert second["peer error"] == first["fault"]
    check_text("wait-too-long", second["late"], "rank 1 waited 0.1 s for never from rank 0", "the bound of 0.1 s")


def test_what_fails_on_rank_0_fails_everywhere(tmp_path):
    first, second = launch(_share_in_vain, size=2, folder=tmp_path, may_fail=True)
    assert first.error == "UsageError: no such cut"
    assert second.error == "PeerError: no such cut"


def test_rank_0_may_take_its_time(tmp_path):
    """The bound is for how long nothing is heard of it."""
    assert values(launch(_share_slowly, size=2, folder=tmp_path)) == ["cut", "cut"]


def test_nobody_waits_for_a_rank_0_that_is_gone(tmp_path):
    first, second = launch(_share_and_die, size=2, folder=tmp_path, may_fail=True)
    assert first.exitcode == 3
    check_text(
        "wait-too-long",
        second.error.removeprefix("LinkError: "),
        "rank 1 waited",
        "for cut from rank 0",
        "the bound of 1 s",
    )


class SilentStore:
    """As behind a cut cable: no call returns."""

    def __init__(self):
        self.over = threading.Event()

    def check(self, keys):
        self.over.wait()

    def set(self, key, value):
        self.over.wait()


@pytest.fixture
def behind_a_cut_cable(monkeypatch):
    monkeypatch.setattr("decoupled_pp.links.control._LEAST_BOUND_SECONDS", 0.1)
    store = SilentStore()
    yield StoreControl(store, 1, 2, 0.2)
    store.over.set()


def test_a_store_that_never_answers_is_given_up_once(behind_a_cut_cable):
    begun = time.monotonic()
    assert behind_a_cut_cable.fault() is None
    assert "cannot be reached" in behind_a_cut_cable.stop_requested()
    for _ in range(100):  # nothing is waited for any more
        behind_a_cut_cable.post(NoteRecord(stage=0, text="lost"))
    assert time.monotonic() - begun < 60.0
    with refused("launcher-gone", LinkError, "rank 1 cannot get anything from rank 0", "no answer within 0.2 s"):
        behind_a_cut_cable.gather("anything", 1, 3600.0)


class FlowingStore:
    """Its ranks post faster than anybody can take it."""

    def check(self, keys):
        return True

    def get(self, key):
        return json.dumps(dict(NoteRecord(stage=0, text=key)))

    def delete_key(self, key):
        pass


def test_ranks_that_never_pause_are_heard_from_time_to_time(monkeypatch):
    monkeypatch.setattr("decoupled_pp.links.control._COLLECT_SECONDS", 0.2)
    control = StoreControl(FlowingStore(), 0, 3, 60.0)
    records = control.collect() + control.collect()
    for rank in range(3):
        numbers = [int(record.text.split("/")[2]) for record in records if record.text.startswith(f"record/{rank}/")]
        assert numbers == list(range(len(numbers))) and numbers


def test_a_signal_while_the_store_is_asked_is_no_fault_of_the_store(behind_a_cut_cable, monkeypatch):
    terminated = Terminated("rank 1 got SIGTERM", code="terminated")

    def interrupted(*_):
        raise terminated

    with monkeypatch.context() as patch, pytest.raises(Terminated):
        patch.setattr("decoupled_pp.links.control.wait_for", interrupted)
        behind_a_cut_cable.fault()
    assert behind_a_cut_cable._lost is None


def _meet():
    world = join_world(PATIENCE)
    control, apart = world.channel(), world.channel()  # a fault of one is none of the other
    for number in range(2):
        control.post(CheckpointRecord(stage=world.rank, step=number))
    found = {"gathered": control.gather("ranks", [world.rank], PATIENCE)}
    if world.rank == 0:
        found["records"] = [(record.stage, record.step) for record in control.collect()]
    else:
        with pytest.raises(LinkError) as late:
            control.gather("never", 1, 0.1)
        assert late.value.code == "wait-too-long"
        found["late"] = str(late.value)
    apart.gather("no fault so far", True, PATIENCE)
    found["won"] = control.report_fault(Fault(f"from rank {world.rank}", world.rank, usage=False, code="peer-gone"))
    found["fault"] = control.fault().text
    apart.gather("both reported", True, PATIENCE)
    if world.rank == 1:
        with pytest.raises(PeerError) as caught:
            control.gather("nobody comes", 1, PATIENCE)
        found["peer error"] = caught.value.fault.text
    return found


def _share_in_vain():
    def make():
        raise UsageError("no such cut", code="no-such-cut")

    join_world(PATIENCE).channel().from_rank_0("cut", make, PATIENCE)


def _share_slowly():
    def make():
        time.sleep(3.0)
        return "cut"

    return join_world(PATIENCE).channel().from_rank_0("cut", make, 1.0)


def _share_and_die():
    def make():
        time.sleep(1.5)
        os._exit(3)

    join_world(PATIENCE).channel().from_rank_0("cut", make, 1.0)
