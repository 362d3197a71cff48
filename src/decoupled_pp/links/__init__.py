"""The wire: one-way links between stages, and the host-side control plane of a run."""

from decoupled_pp.links.control import LocalControl, StoreControl
from decoupled_pp.links.in_process import InProcessLink
from decoupled_pp.links.receiving_end import ReceivingEnd
from decoupled_pp.links.sending_end import SendingEnd
from decoupled_pp.links.waiting import end_at_once, told_to_end
from decoupled_pp.links.world import World, first_to_report, join_world, leave_world

__all__ = [
    "InProcessLink",
    "LocalControl",
    "ReceivingEnd",
    "SendingEnd",
    "StoreControl",
    "World",
    "end_at_once",
    "first_to_report",
    "join_world",
    "leave_world",
    "told_to_end",
]
