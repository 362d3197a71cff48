"""Law 9: a link of capacity c never holds more than c packets; a slow consumer slows the producer; a dead peer raises
on every rank, with the cause named, and no rank hangs.
"""

import os
import signal
import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from cases import CASES

from decoupled_pp.core.channels import LinkTerms
from decoupled_pp.core.errors import LinkError
from decoupled_pp.core.packets import Packet, PacketKind
from decoupled_pp.core.topology import Topology
from decoupled_pp.links import InProcessLink, join_world
from decoupled_pp.pipeline.stage import Stage
from ranks import PATIENCE, launch

CPU = torch.device("cpu")
PACKETS = 7
LAST_PACKET = 6
"""By credits alone every link is connected then: with a capacity of 4, rank 1 has taken two packets and sent one on."""


# ------------------------------------------------------------------------------------------------ capacity, and order


@pytest.mark.parametrize("capacity", [1, 3])
def test_order_of_events_in_one_process(capacity, tmp_path):
    log = tmp_path / "log"
    link = InProcessLink(0, LinkTerms(capacity, PATIENCE), CPU)
    producer = threading.Thread(target=_produce, args=(link, log))
    producer.start()
    _consume(link, log, capacity)
    producer.join()
    assert log.read_text().split() == _expected_order(capacity)


@pytest.mark.parametrize("capacity", [1, 3])
def test_order_of_events_between_ranks(capacity, tmp_path):
    launch(_produce_and_consume, capacity, tmp_path / "log", size=2, folder=tmp_path)
    assert (tmp_path / "log").read_text().split() == _expected_order(capacity)


def test_capacity_is_a_bound_in_one_process():
    link = InProcessLink(0, LinkTerms(3, 0.05), CPU)
    assert _send_until_refused(link) == 3
    link.receive()
    link.receive()
    assert _send_until_refused(link) == 2


def test_capacity_is_a_bound_between_ranks(tmp_path):
    """The receiver takes two packets and no more: five can be sent over a link of three."""
    sender, _ = launch(_fill, tmp_path / "full", size=2, folder=tmp_path)
    assert sender.value == 3 + 2


def _expected_order(capacity):
    """Fill the link; from then on every packet taken makes room for one."""
    order = [f"sent-{number}" for number in range(capacity)]
    for number in range(PACKETS):
        order.append(f"take-{number}")
        if number + capacity < PACKETS:
            order.append(f"sent-{number + capacity}")
    return order


def _packet(number, kind=PacketKind.TRAIN):
    return Packet(kind, number, torch.ones(2), torch.ones(1)) if kind is PacketKind.TRAIN else Packet(kind, number)


def _produce(outlet, log):
    """Send as fast as the link lets; note every packet that it took."""
    for number in range(PACKETS):
        outlet.send(_packet(number, PacketKind.END if number == PACKETS - 1 else PacketKind.TRAIN))
        _note(log, f"sent-{number}")


def _consume(inlet, log, capacity):
    """Take a packet only once the producer has filled the link; note it before."""
    for number in range(PACKETS):
        _await(log, f"sent-{min(number + capacity, PACKETS) - 1}")
        _note(log, f"take-{number}")
        assert inlet.receive().number == number


def _produce_and_consume(capacity, log):
    inlet, outlet = _connect(capacity, PATIENCE)
    if outlet is not None:
        _produce(outlet, log)
        outlet.close()
    else:
        _consume(inlet, log, capacity)
        inlet.close()


def _fill(full):
    inlet, outlet = _connect(3, 2)
    if outlet is not None:
        sent = _send_until_refused(outlet)
        full.touch()
        outlet.close()
        return sent
    inlet.receive()
    inlet.receive()
    while not full.exists():
        time.sleep(0.01)
    inlet.close()
    return None


def _send_until_refused(outlet):
    sent = 0
    with pytest.raises(LinkError, match=r"room to send packet .* to stage 1") as caught:
        while True:
            outlet.send(_packet(sent))
            sent += 1
    assert caught.value.code == "wait-too-long"
    return sent


def _connect(capacity, seconds):
    world = join_world(PATIENCE)
    return world.connect(world.channel(), Topology(2, 2), CPU, "one plan", LinkTerms(capacity, seconds))


def _note(log: Path, event):
    with log.open("a") as file:
        file.write(event + "\n")


def _await(log: Path, event):
    deadline = time.monotonic() + PATIENCE
    while not (log.exists() and event in log.read_text().split()):
        assert time.monotonic() < deadline, f"never saw {event}"
        time.sleep(0.002)


# -------------------------------------------------------------------------------------------------------- dead peers


def kill(stage, packet):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(stage, packet):
    os._exit(3)


def hang(stage, packet):
    threading.Event().wait()


def fail(stage, packet):
    raise ValueError("no luck")


@pytest.mark.parametrize(("size", "victim"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
@pytest.mark.parametrize("death", [kill, leave])
def test_a_dead_rank_is_named_on_every_other(death, size, victim, tmp_path):
    """The bound is an hour; every rank ends at once all the same."""
    results = _launch_with(death, victim, 3600, size=size, folder=tmp_path)
    _all_survivors_blame(victim, results)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_dead_rank_is_named_while_gradients_come_back(victim, tmp_path):
    """Threads wait for ever for what comes back late; they must keep no rank from ending."""
    results = _launch_with(kill, victim, 3600, size=3, folder=tmp_path, target="delayed")
    _all_survivors_blame(victim, results)


def test_a_dead_rank_that_hosted_the_store(tmp_path):
    """Then nobody can tell rank 2 more than that its own neighbour went away."""
    first, second, third = _launch_with(kill, 0, 3600, size=3, folder=tmp_path, store="rank 0")
    assert first.exitcode == -signal.SIGKILL
    assert second.error.startswith("LinkError: stage 0 (rank 0) is gone")
    assert third.error.startswith("LinkError: stage 1 (rank 1) is gone")


def test_a_hanging_rank_is_named_once_the_bound_is_over(tmp_path):
    first, _, third = _launch_with(hang, 1, 4, size=3, folder=tmp_path, expendable=(1,))
    for survivor in (first, third):
        assert survivor.error.startswith(("LinkError", "PeerError"))
        assert "stage 1 (rank 1)" in survivor.error
        assert "the bound of 4 s is over" in survivor.error


def test_an_error_in_a_stage_ends_every_rank_with_its_cause(tmp_path):
    first, second, third = _launch_with(fail, 1, 3600, size=3, folder=tmp_path)
    assert second.error == "ValueError: no luck"
    for other in (first, third):
        assert other.error == "PeerError: rank 1: ValueError: no luck"


def _all_survivors_blame(victim, results):
    survivors = [result for rank, result in enumerate(results) if rank != victim]
    assert results[victim].exitcode in (-signal.SIGKILL, 3)
    for survivor in survivors:
        assert survivor.error is not None
        assert survivor.error.startswith(("LinkError", "PeerError"))
        assert f"stage {victim} (rank {victim}) is gone" in survivor.error


def _launch_with(end, victim, bound, target="label", **options):
    return launch(_train_until, end, victim, bound, target, may_fail=True, **options)


def _train_until(end, victim, bound, target):
    """Train; at packet `LAST_PACKET` rank `victim` meets its `end`."""
    train = Stage.train

    def stepped(stage, packet, *arguments):
        if stage.index == victim and packet.number == LAST_PACKET:
            end(stage, packet)
        return train(stage, packet, *arguments)

    options = {"timeout_seconds": bound, "critic_target": target}
    trainer = CASES["mlp"].trainer(int(os.environ["WORLD_SIZE"]), **options)
    with patch.object(Stage, "train", stepped):
        trainer.fit(CASES["mlp"].batches(12), 500)
