"""What the ranks of a launch do together outside of training."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from decoupled_pp import Trainer, UsageError, partition
from decoupled_pp.core import environment
from decoupled_pp.links import join_world
from decoupled_pp.links.launch_store import listening_store
from kit import ignore, tanh_network, vector_batches, weights
from ranks import PATIENCE, launch

TENSORS = (
    torch.arange(6.0).reshape(2, 3),
    torch.tensor(7),
    torch.tensor([True, False]),
    torch.ones(4, dtype=torch.bfloat16),
    torch.arange(6).reshape(2, 3).t(),
    torch.empty(0),
)


@pytest.mark.parametrize("source", [0, 1, 2])
def test_a_broadcast_reaches_every_rank(source, tmp_path):
    for result in launch(_broadcast, source, size=3, folder=tmp_path):
        for got, expected in zip(result.value, TENSORS, strict=True):
            assert torch.equal(got, expected) and got.dtype == expected.dtype


def _broadcast(source):
    world = join_world(PATIENCE)
    held = [tensor.clone() if world.rank == source else torch.zeros_like(tensor) for tensor in TENSORS]
    for tensor in held:
        world.broadcast(tensor, source)
    return held


def test_ranks_that_meet_in_a_process_group_of_their_own_are_one_run(tmp_path):
    """No variable says it: rank, size and store are those of the group that the script has made."""
    alone = _trained()
    for rank, result in enumerate(launch(_trained_in_own_group, str(tmp_path), size=2, folder=tmp_path)):
        assert result.value and all(torch.equal(alone[name], tensor) for name, tensor in result.value.items())
        assert {name.split(".")[0] for name in result.value} == {str(rank)}


def _trained():
    batches = vector_batches(3, 4, 6, 3)
    plan = partition(tanh_network(3, 6, 3), 2, "uniform", batches[0][0], device="cpu")
    trainer = Trainer(plan, critic="head", device="cpu", observer=ignore)
    trainer.fit(batches, steps=3)
    trainer.export()
    return weights(trainer)


def _trained_in_own_group(folder):
    rank = int(os.environ["RANK"])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    for meeting in ("first", "second"):  # who leaves a group and makes another begins anew
        dist.init_process_group("gloo", init_method=f"file://{folder}/{meeting}", rank=rank, world_size=2)
        found = _trained()
        assert (environment.local_rank(), environment.local_world_size()) == (rank, 2)
        dist.destroy_process_group()
    return found


def _listening():
    """Local addresses of this process's listening sockets, in hexadecimal, with ports."""
    tables = [Path(f"/proc/self/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    return [row.split()[1] for table in tables for row in table if row.split()[3] == "0A"]


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_a_store_listens_where_the_ranks_are_told_and_nowhere_else(address):
    store = listening_store(address, 0)
    places = [place for place in _listening() if int(place.split(":")[1], 16) == store.port]
    assert places and all(place.startswith(("0100007F:", "00000000000000000000000001000000:")) for place in places)


def test_a_port_that_another_run_has_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"MASTER_PORT {port}: something listens there already") as caught:
            listening_store("127.0.0.1", port)
    assert caught.value.code == "port-in-use"
