"""The header: what a packet is, announced in one message of fixed size."""

import pytest
import torch

from decoupled_pp.core.errors import LinkError, UsageError
from decoupled_pp.core.packets import Packet, PacketKind, as_tuple
from decoupled_pp.links import header
from kit import refused

TENSORS = {
    "float32": torch.randn(2, 3),
    "bfloat16": torch.randn(2, 3, dtype=torch.bfloat16),
    "float16": torch.randn(4).half(),
    "float64": torch.randn(1, 2, 3, 4, dtype=torch.float64),
    "int64": torch.arange(5),
    "uint8": torch.arange(5, dtype=torch.uint8),
    "bool": torch.tensor([[True], [False]]),
    "complex64": torch.randn(3, dtype=torch.complex64),
    "complex128": torch.randn(3, dtype=torch.complex128),
    "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
    "uint32": torch.tensor([1, 2**32 - 1], dtype=torch.uint32),
    "uint64": torch.tensor([1, 2**63], dtype=torch.uint64),
    "0-dim": torch.tensor(2.5),
    "empty": torch.empty(0, 7),
}


def announced(packet):
    """What the receiving end makes of the header."""
    start, forms, specs = header.decode(header.announce(header.parcel(packet)))
    tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in specs]
    return header.assemble(start, forms, tensors)


def form(payload):
    specs = [(tensor.shape, tensor.dtype) for tensor in as_tuple(payload)]
    return (type(payload) is tuple, specs)


@pytest.mark.parametrize("payload", TENSORS.values(), ids=TENSORS)
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: (t,), lambda t: (t, torch.ones(2))])
def test_shape_dtype_and_form_survive(payload, wrap):
    packet = Packet(PacketKind.TRAIN, 12, wrap(payload), payload, wrap(payload), weight=0.1)
    arrived = announced(packet)
    assert (arrived.kind, arrived.number, arrived.weight) == (PacketKind.TRAIN, 12, 0.1)
    assert form(arrived.payload) == form(packet.payload)
    assert form(arrived.target) == form(packet.target)
    assert form(arrived.rider) == form(packet.rider)


@pytest.mark.parametrize("kind", [PacketKind.EVALUATION_END, PacketKind.SAVE, PacketKind.END])
def test_markers_carry_no_tensors(kind):
    arrived = announced(Packet(kind, 2**40))
    assert arrived == Packet(kind, 2**40)


def test_every_header_has_one_size():
    small, large = Packet(PacketKind.END, 0), Packet(PacketKind.TRAIN, 1, tuple(TENSORS.values()), torch.ones(1))
    shapes = {header.announce(header.parcel(packet)).shape for packet in (small, large)}
    assert shapes == {(header.HEADER_BYTES,)}


def test_too_many_tensors_are_refused():
    many = tuple(torch.ones(1, 1, 1, 1) for _ in range(21))
    with refused("too-many-tensors-to-travel", UsageError, "packet 5 holds 22 tensors"):
        header.parcel(Packet(PacketKind.TRAIN, 5, many, torch.ones(1)))


def test_a_dtype_that_cannot_travel_is_refused():
    with refused("dtype-cannot-travel", UsageError, "packet 0", "torch.float8_e4m3fnuz"):
        header.parcel(Packet(PacketKind.TRAIN, 0, torch.empty(1, dtype=torch.float8_e4m3fnuz)))


def test_what_is_no_header_is_refused():
    with refused("message-is-no-packet", LinkError, "first word 0x7"):
        header.decode(torch.full((header.HEADER_BYTES,), 7))


@pytest.mark.parametrize("padding", [0, 1000])
def test_a_message_carries_the_tensors(padding):
    sent = Packet(PacketKind.TRAIN, 1, tuple(TENSORS.values()), torch.arange(3))
    parcel = header.parcel(sent)
    assert parcel.payload_bytes == sum(t.numel() * t.element_size() for t in parcel.tensors)
    size = parcel.message_bytes + padding
    message = header.pack(parcel, size)
    assert message.shape == (size,)
    assert header.new_size(message) is None
    got = header.unpack(message)
    assert (got.kind, got.number) == (sent.kind, sent.number)
    for ours, theirs in zip((*got.payload, got.target), (*sent.payload, sent.target), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_tensors_of_a_message_may_be_changed_in_place_apart():
    """Views of one buffer would share a version counter: changing one would spoil what autograd saved of the other."""
    sent = Packet(PacketKind.TRAIN, 0, (torch.ones(2), torch.ones(2)))
    parcel = header.parcel(sent)
    first, second = header.unpack(header.pack(parcel, parcel.message_bytes)).payload
    weight = torch.ones(2, requires_grad=True)
    product = (weight * first).sum()
    second.add_(1)
    product.backward()
    assert torch.equal(first, torch.ones(2))


def test_a_message_of_a_new_size():
    message = header.encode_resize(2048, 4096)
    assert message.shape == (2048,)
    assert header.new_size(message) == 4096
