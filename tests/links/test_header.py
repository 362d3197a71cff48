"""The header: what a packet is, announced in one message of fixed size."""

import math
import re
from contextlib import contextmanager, suppress

import pytest
import torch

from decoupled_pp.core.errors import LinkError, UsageError
from decoupled_pp.core.packets import Packet, PacketKind, as_tuple
from decoupled_pp.links import header, returns
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


def hostile(*words, size=4096):
    """A message of these words, as a peer might send it."""
    message = torch.zeros(size, dtype=torch.uint8)
    message[: 8 * len(words)].view(torch.int64).copy_(torch.tensor(words))
    return message


@contextmanager
def no_packet(part):
    """The block refuses a message. Their texts are as many as the words: one alone is in the golden file."""
    with pytest.raises(LinkError, match=re.escape(part)) as caught:
        yield
    assert caught.value.code == "message-is-no-packet"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((77, 0, 0, -1, 0, 0, 0, 1, 5), "kind 77"),
        ((-1, 0, 0, -1, 0, 0, 0, 1, 5), "kind -1"),
        ((0, -3, 0, -1, 0, 0, 0, 1, 5), "number -3"),
        ((0, 0, 0, -7, 0, 0), "(-7, 0, 0) tensors"),
        ((0, 0, 0, 1 << 60, 0, 0, 0, -2), "tensors"),
        ((0, 0, 0, -1, 0, 0, 0, -2), "-2 dimensions"),
        ((0, 0, 0, -1, 0, 0, 0, 1 << 40), "dimensions"),
        ((0, 0, 0, -1, 0, 0, -3, 1, 5), "dtype -3"),
        ((0, 0, 0, -1, 0, 0, 99, 1, 5), "dtype 99"),
        ((0, 0, 0, -1, 0, 0, 0, 1, -5), "shape (-5,)"),
        ((0, 0, 0, -1, 0, 0, 0, 2, -5, -5), "shape (-5, -5)"),
        ((0, 0, 0, -1, 0, 0, 0, 1, 769), "shape (769,), which 4096 bytes cannot hold"),
        ((0, 0, 0, 2, 0, 0, 0, 1, 700, 0, 1, 700), "shape (700,), which 4096 bytes cannot hold"),
        ((0, 0, 0, -1, 0, 0, 0, 1, 1 << 62), "cannot hold"),
        ((0, 0, 0, -1, 0, 0, 0, 3, 0, 1 << 62, 1 << 62), "cannot hold"),
        ((0, 0, 0, 128, 0, 0), "with 0 dimensions"),
        ((0, 0, header._bits(-1.0), -1, 0, 0, 0, 1, 5), "weight -1.0"),
        ((0, 0, header._bits(math.nan), -1, 0, 0, 0, 1, 5), "weight nan"),
    ],
)
def test_nothing_that_a_peer_says_is_believed_unchecked(words, part):
    """Neither memory beyond the message nor any amount of it is taken."""
    with no_packet(part):
        header.unpack(hostile(header._MAGIC, *words))


@pytest.mark.parametrize("size", [-5, 0, header.HEADER_BYTES - 1, 1 << 50])
def test_a_new_size_that_no_message_can_have_is_refused(size):
    with no_packet(f"a new size of {size} bytes"):
        header.new_size(hostile(header._RESIZE, size))


@pytest.mark.parametrize("count", [-1, 6, 1 << 60])
def test_floats_that_come_back_fit_their_message(count):
    message = hostile(returns.FLOATS, 3, count, size=returns.backward_bytes(5))
    with no_packet(f"{count} floats in 44 bytes"):
        returns.floats_in(message)


def test_seeded_noise_is_refused_or_a_packet_within_its_message():
    generator = torch.Generator().manual_seed(0)
    small = torch.tensor([-2, -1, 0, 1, 2, 3, 17, 1 << 20, 1 << 62])
    for _ in range(2000):
        message = hostile(header._MAGIC, *small[torch.randint(len(small), (127,), generator=generator)].tolist())
        with suppress(LinkError):
            packet = header.unpack(message)
            assert all(tensor.untyped_storage().nbytes() == 4096 for tensor in as_tuple(packet.payload))
