"""The header: what a packet is, announced in one message of fixed size."""

import dataclasses
import math
import re
import struct
from collections import namedtuple
from contextlib import contextmanager, suppress

import pytest
import torch
from torch import nn
from torch.masked import masked_tensor

from decoupled_pp.core.errors import LinkError, UsageError
from decoupled_pp.core.packets import Packet, PacketKind, as_tuple
from decoupled_pp.core.torch_private import pytree
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
    parcel = header.parcel(packet)
    found = header.decode(header.announce(parcel, parcel.header_bytes))
    return header.packet_of(found, [torch.empty(shape, dtype=dtype) for shape, dtype in found.specs])


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


def test_common_headers_have_one_size():
    small, large = Packet(PacketKind.END, 0), Packet(PacketKind.TRAIN, 1, tuple(TENSORS.values()), torch.ones(1))
    assert {header.parcel(packet).header_bytes for packet in (small, large)} == {header.HEADER_BYTES}


def test_the_header_of_many_tensors_is_larger():
    many = tuple(torch.full((1, 1, 1, 1), float(number)) for number in range(300))
    parcel = header.parcel(Packet(PacketKind.TRAIN, 5, many, torch.ones(1)))
    assert parcel.header_bytes > header.HEADER_BYTES
    arrived = header.unpack(header.pack(parcel, parcel.message_bytes))
    assert [tensor.item() for tensor in arrived.payload] == list(range(300))


State = namedtuple("State", "hidden mask")


@dataclasses.dataclass
class Graph:
    nodes: torch.Tensor
    edges: torch.Tensor | None = None


torch.export.register_dataclass(Graph)
NESTED = {
    "list": [torch.ones(2), torch.zeros(3)],
    "nested tuple": (torch.ones(2), (torch.zeros(1), torch.zeros(2))),
    "constants": {"a": (torch.ones(2), None, 2.5, "x", True, 3), 7: torch.zeros(2)},
    "named tuple": State(torch.ones(2), {"deep": [torch.ones(1, dtype=torch.bool)]}),
    "dataclass": Graph(torch.ones(2)),
    "result of torch": torch.max(torch.rand(2, 3), dim=1),
    "parameter": nn.Parameter(torch.ones(2)),
    "coo": torch.eye(3).to_sparse(),
    "coo, not coalesced": torch.eye(3).to_sparse() + torch.eye(3).to_sparse(),
}


def sparse_rows():
    return torch.ones(2), torch.eye(3).to_sparse_csr()


def sparse_blocks():
    return torch.eye(4).to_sparse_bsr((2, 2))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("payload", [*NESTED.values(), sparse_rows, sparse_blocks], ids=[*NESTED, "csr", "bsr"])
def test_any_structure_survives(payload):
    payload = payload() if callable(payload) else payload
    parcel = header.parcel(Packet(PacketKind.TRAIN, 3, payload, torch.arange(3), payload))
    arrived = header.unpack(header.pack(parcel, parcel.message_bytes))
    for found in (arrived.payload, arrived.rider):
        assert_same_structure(found, payload)
    assert torch.equal(arrived.target, torch.arange(3))


def assert_same_structure(found, wanted):
    ours, form = pytree.tree_flatten(found)
    theirs, their_form = pytree.tree_flatten(wanted)
    assert form == their_form
    for one, other in zip(ours, theirs, strict=True):
        if not isinstance(other, torch.Tensor):
            assert type(one) is type(other) and one == other
            continue
        assert (one.layout, one.dtype) == (other.layout, other.dtype)
        assert torch.equal(one.to_dense(), other.detach().to_dense())


def test_a_class_that_this_rank_does_not_know_is_refused_and_not_imported():
    parcel = header.parcel(Packet(PacketKind.TRAIN, 3, State(torch.ones(1), torch.ones(1))))
    message = header.pack(parcel, parcel.message_bytes)
    for known, unknown in (("test_header:State", "pickle:Unpickle"), ("test_header:State", "test_header:Absent")):
        altered = bytes(message.numpy()).replace(known.encode(), unknown.encode().ljust(len(known)))
        with refused("structure-not-known", LinkError):
            header.unpack(torch.frombuffer(bytearray(altered), dtype=torch.uint8))


REFUSED = {
    "nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "MaskedTensor": lambda: (torch.ones(1), masked_tensor(torch.ones(2), torch.tensor([True, False]))),
    "layout torch._mkldnn": lambda: torch.eye(2).to_mkldnn(),
    "dict with keys": lambda: {("a", 1): torch.ones(1)},
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_more_than_plain_tensors_is_refused_by_name(name):
    with refused("output-cannot-travel", UsageError, name):
        header.parcel(Packet(PacketKind.TRAIN, 0, REFUSED[name]()))


def test_a_size_arrives_as_a_tuple_as_torch_itself_makes_it():
    parcel = header.parcel(Packet(PacketKind.TRAIN, 0, (torch.ones(1), torch.ones(3, 4).shape)))
    assert header.unpack(header.pack(parcel, parcel.message_bytes)).payload[1] == (3, 4)


def test_a_dtype_that_cannot_travel_is_refused():
    with refused("dtype-cannot-travel", UsageError, "packet 0", "torch.bits8"):
        header.parcel(Packet(PacketKind.TRAIN, 0, torch.empty(1, dtype=torch.bits8)))


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


def _text(text):
    """A text as the words of a header."""
    return struct.unpack(f"={len(text.ljust(8)) // 8}q", text.ljust(8).encode())


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
        ((0, 0, 0, -7, 0, 0), "a text that is no JSON"),
        ((0, 0, 0, -2, 0, 0, 1 << 60), "a text of"),
        ((0, 0, 0, -2, 0, 0, 1, *_text("[7]")), "lists no structures"),
        ((0, 0, 0, 1 << 60, 0, 0, 0, -2), "-2 dimensions"),
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
        header.unpack(hostile(header._MAGIC, header.HEADER_BYTES, *words))


@pytest.mark.parametrize("size", [-64, 0, 1000, 8192, 1 << 60])
def test_a_header_lies_within_its_message(size):
    with no_packet(f"a header of {size} bytes"):
        header.unpack(hostile(header._MAGIC, size))


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
        message = hostile(header._MAGIC, 1024, *small[torch.randint(len(small), (126,), generator=generator)].tolist())
        with suppress(LinkError):
            packet = header.unpack(message)
            assert all(tensor.untyped_storage().nbytes() == 4096 for tensor in as_tuple(packet.payload))
