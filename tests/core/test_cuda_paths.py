"""CUDA-only code of device.py and the links, on a pretended CUDA: order of waits, lifetime of tensors, exact time."""

import itertools
import struct
import time

import pytest
import torch

from decoupled_pp.core import device as device_module
from decoupled_pp.core.channels import LinkTerms
from decoupled_pp.core.device import Clock
from decoupled_pp.core.errors import LinkError
from decoupled_pp.core.packets import Packet, PacketKind
from decoupled_pp.links import InProcessLink, ReceivingEnd, SendingEnd, header, in_process, receiving_end, sending_end
from decoupled_pp.links.wire import Wire
from kit import refused
from ranks import PATIENCE

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


class PretendedEvent:
    """An event whose device time the test sets; like CUDA it tells differences in single-precision milliseconds."""

    now = 0.0

    def __init__(self, **options):
        self.seconds = None

    def record(self, stream):
        self.seconds = PretendedEvent.now

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return struct.unpack("f", struct.pack("f", (other.seconds - self.seconds) * 1000))[0]


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(device_module.torch.cuda, "Event", PretendedEvent)
    monkeypatch.setattr(device_module.torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(device_module.torch.cuda, "current_stream", lambda device: None)
    PretendedEvent.now = 0.0
    return Clock(CUDA)


def test_a_cuda_clock_stays_exact_for_days(clock):
    """50 hours of flushes: phases of 1 ms to 2 us, and the whole to 1 ms. From one origin they would be 16 ms off."""
    mark, start = clock.mark(), clock.seconds([clock.mark()])[0]
    for _ in range(9000):
        marks = [mark]
        for _ in range(3):
            PretendedEvent.now += 0.001
            marks.append(clock.mark())
        PretendedEvent.now += 19.997
        mark = clock.mark()
        times = clock.seconds([*marks, mark])
    lasted = [b - a for a, b in itertools.pairwise(times[:4])]
    assert lasted == pytest.approx([0.001] * 3, abs=2e-6)
    assert times[-1] - start == pytest.approx(9000 * 20, abs=1e-3)


def test_a_cuda_clock_goes_on_where_it_ended(clock):
    first = [clock.mark()]
    PretendedEvent.now = 12345.678
    first.append(clock.mark())
    times = clock.seconds(first)
    assert clock.seconds([first[-1]]) == times[-1:]
    assert clock.seconds([]) == []


class Log(list):
    """A list of what happened, in order."""

    def fence(self):
        log, count = self, [0]

        class PretendedFence:
            def __init__(self, device):
                self.number = count[0]
                count[0] += 1

            def wait(self, *tensors):
                log.append(("stream waits", self.number))

            def synchronize(self):
                log.append(("host waits", self.number))

        return PretendedFence


def marker(kind, number):
    return Packet(kind, number, torch.ones(2)) if kind is PacketKind.TRAIN else Packet(kind, number)


def test_the_host_runs_no_further_ahead_than_the_link_holds(monkeypatch):
    """Fences: 0, 2, 4, .. of packets sent, 1, 3, 5, .. of packets taken."""
    log = Log()
    monkeypatch.setattr(in_process, "Fence", log.fence())
    link = InProcessLink(0, LinkTerms(2, 1), CPU)
    for number in range(5):
        link.send(marker(PacketKind.TRAIN, number))
        link.receive()
    assert [number for what, number in log if what == "host waits"] == [1, 3, 5]  # before packets 2, 3 and 4


class Transport:
    """A lane and a sender and receiver of messages: what is sent goes into the log; waits or fails as a peer would."""

    payload_bytes = control_bytes = bytes_sent = 0
    size = header.HEADER_BYTES

    def __init__(self, log, name, *, fails=False):
        self.log, self.name, self.fails = log, name, fails

    def send(self, tensor, **_):
        if self.fails:
            raise RuntimeError("Connection closed by peer")
        self.log.append((self.name, "send"))

    def receive(self):
        return torch.zeros(8, dtype=torch.uint8)  # goodbye: the thread that listens ends

    def break_off(self):
        self.log.append((self.name, "broken off"))


def end_between_gpus(log, monkeypatch, **message):
    """Build a sending end whose tensors travel over a lane of their own, as between GPUs."""
    monkeypatch.setattr(sending_end, "Fence", log.fence())
    faults = []
    out, into, payload = Transport(log, "header", **message), Transport(log, "credit"), Transport(log, "payload")
    names = {"here": "stage 0", "there": "stage 1", "failed": faults.append}
    wire = Wire(sender=0, out=out, into=into, payload=payload, device=CPU, **names)
    return SendingEnd(wire, LinkTerms(8, 1)), faults


def test_a_packet_is_announced_once_it_is_computed_and_kept_until_it_is_sent(monkeypatch):
    """Fences by number: each packet's `computed` when it is handed over, its `sent` when the sender has sent it."""
    log = Log()
    end, faults = end_between_gpus(log, monkeypatch)
    end.send(marker(PacketKind.TRAIN, 0))
    end.send(marker(PacketKind.END, 1))
    end.close()
    assert faults == []
    waited = [number for what, number in log if what == "host waits"]
    assert len(waited) == 4  # two computed, two sent: none is let go while the device may still read it
    assert log[0][0] == "host waits"
    assert log[1:3] == [("header", "send"), ("payload", "send")]
    assert [what for what, _ in log[-2:]] == ["host waits", "host waits"]


def test_a_broken_link_frees_the_device(monkeypatch):
    log = Log()
    end, faults = end_between_gpus(log, monkeypatch, fails=True)
    end.send(marker(PacketKind.TRAIN, 0))
    deadline = time.monotonic() + PATIENCE
    while not (faults and ("payload", "broken off") in log) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ("payload", "broken off") in log
    assert [error.code for error in faults] == ["peer-gone"]
    with refused("peer-gone", LinkError, "stage 1 is gone", "seen by stage 0"):
        end.send(marker(PacketKind.TRAIN, 1))
    end.close()


class Arrivals(Transport):
    """Delivers the headers of some packets, and takes the receives that are posted."""

    def __init__(self, log, packets):
        super().__init__(log, "arrival")
        self.messages = [header.announce(header.parcel(packet), header.HEADER_BYTES) for packet in packets]

    def post(self):
        pass

    def receive(self):
        return self.messages.pop(0)


class Tensors(Transport):
    def receive(self, tensor):
        tensor.fill_(1)


def test_a_credit_goes_back_once_the_device_has_come_to_its_packet_and_the_goodbye_is_last(monkeypatch):
    log, faults = Log(), []
    monkeypatch.setattr(receiving_end, "Fence", log.fence())
    packets = [marker(PacketKind.TRAIN, 0), marker(PacketKind.TRAIN, 1), marker(PacketKind.END, 2)]
    out = Transport(log, "credit")
    out.size = 8
    names = {"here": "stage 1", "there": "stage 0", "failed": faults.append}
    wire = Wire(sender=0, out=out, into=Arrivals(log, packets), payload=Tensors(log, "payload"), device=CPU, **names)
    end = ReceivingEnd(wire, LinkTerms(8, PATIENCE))
    assert [end.receive().number for _ in packets] == [0, 1, 2]
    end.close()
    assert faults == []
    sent = [what for what, _ in log if what in {"host waits", "credit"}]
    assert sent == ["host waits", "credit"] * 3 + ["credit"]  # a credit for each packet, and a goodbye
