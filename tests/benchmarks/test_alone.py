"""What messages cost, measured apart: waiting for a rank that comes late is no part of it."""

import time

import torch

from benchmarks.alone import message_seconds
from decoupled_pp.links import join_world
from ranks import PATIENCE, launch

LATE = 2.0


def measured():
    world = join_world(PATIENCE)
    if world.rank == 1:
        time.sleep(LATE)
    found = message_seconds(torch.ones(4), rank=world.rank, ranks=world.size, compute=lambda: None, repeats=7)
    return found.latency, found.host


def test_a_late_rank_does_not_count(tmp_path):
    latencies, hosts = zip(*(part.value for part in launch(measured, size=4, folder=tmp_path)), strict=True)
    assert latencies[3] is None  # it only answers
    assert all(latency < LATE / 14 for latency in latencies[:3])  # a mean of seven would be at least that
    assert all(0 < host < LATE / 14 for host in hosts)
