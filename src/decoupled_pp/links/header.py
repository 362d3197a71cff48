"""Packs packets into host messages: kind, number, weight, form, dtypes and shapes, and in CPU links the tensors too."""

from __future__ import annotations

import ctypes
import math
import struct
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from decoupled_pp.core.device import host_memory
from decoupled_pp.core.errors import LinkError, UsageError
from decoupled_pp.core.packets import Packet, PacketKind, Payload, as_tuple

HEADER_WORDS = 128  # of int64: room for about twenty tensors of four dimensions
HEADER_BYTES = 8 * HEADER_WORDS

_MAGIC = 0x6470_7003
_RESIZE = 0x6470_7002
_ALIGNMENT = 64  # bytes; torch's kernels take aligned memory faster
# The place in this list travels: append only, or give _MAGIC another value, so that no other version is misread.
_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex128,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_SINGLE = -1  # see Forms
_KINDS = frozenset(int(kind) for kind in PacketKind)
_MOST_BYTES = 1 << 48  # of a packet; far more than any machine holds, and no stride overflows

Spec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of one tensor."""

Forms = tuple[int, int, int]
"""Forms of payload, target and rider: -1 is one tensor, n >= 0 a tuple of n tensors."""


class Parcel(NamedTuple):
    """A packet made ready to travel."""

    header: bytes  # what `decode` reads; at most HEADER_BYTES
    tensors: tuple[Tensor, ...]  # activations, then targets, then the rider
    payload_bytes: int
    message_bytes: int  # size of the smallest message that holds the header and all tensors, each aligned


def parcel(packet: Packet) -> Parcel:
    """Make a packet ready to travel; UsageError if a dtype cannot, or if it has too many tensors."""
    # One plain loop: this is a CPU link's hot path, and after every wait its code is no longer in the caches.
    parts = (packet.payload, packet.target, packet.rider)
    tensors = (*as_tuple(parts[0]), *as_tuple(parts[1]), *as_tuple(parts[2]))
    words = [_MAGIC, packet.kind, packet.number, _bits(packet.weight), *map(_form, parts)]
    payload_bytes = 0
    message_bytes = HEADER_BYTES
    for tensor in tensors:
        code = _CODES.get(tensor.dtype)
        if code is None:
            raise UsageError(
                f"packet {packet.number}: a tensor of {tensor.dtype} cannot travel a link; convert it first",
                code="dtype-cannot-travel",
            )
        words += (code, tensor.dim(), *tensor.shape)
        payload_bytes += tensor.nbytes
        message_bytes += _aligned(tensor.nbytes)
    if len(words) > HEADER_WORDS:
        raise UsageError(
            f"packet {packet.number} holds {len(tensors)} tensors, more than a link's header can announce; "
            "cut elsewhere",
            code="too-many-tensors-to-travel",
        )
    return Parcel(_words(words), tensors, payload_bytes, message_bytes)


def announce(content: Parcel) -> Tensor:
    """Return a message of the header alone, uint8 (HEADER_BYTES,)."""
    return _message(content.header, HEADER_BYTES)


def encode_resize(size: int, new_size: int) -> Tensor:
    """Return a message of the present size that says: one posted receive less of this size, one more of the new."""
    return _message(_words([_RESIZE, new_size]), size)


def new_size(message: Tensor) -> int | None:
    """Return the new size if this is a resize message, else None; LinkError if no message can have it."""
    kind, size = message[:16].view(torch.int64).tolist()
    if kind != _RESIZE:
        return None
    if not HEADER_BYTES <= size <= host_memory():
        raise not_of_a_packet(f"a new size of {size} bytes")
    return int(size)


def pack(content: Parcel, size: int) -> Tensor:
    """Put header and tensors into one message of `size` bytes, at least `message_bytes`; the rest is padding."""
    message = _message(content.header, size)
    at = message.data_ptr() + HEADER_BYTES
    for tensor in content.tensors:
        # Conjugation and negation may be pending: bits of the tensor, not in its memory yet.
        plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
        source = tensor if plain else tensor.resolve_conj().resolve_neg().contiguous()
        ctypes.memmove(at, source.data_ptr(), source.nbytes)  # a tenth of the cost of slicing and copying in torch
        at += _aligned(tensor.nbytes)
    return message


def unpack(message: Tensor) -> Packet:
    """Return the packet of a message made by `pack`; its tensors share the message's memory."""
    start, forms, specs = decode(message, message.numel())
    storage = message.untyped_storage()
    at = HEADER_BYTES
    tensors = []
    for shape, dtype in specs:
        # Not a view of the message: views share one version counter, and so an in-place change of one would make
        # autograd refuse all others.
        tensor = torch.empty(0, dtype=dtype)
        tensor.set_(storage, at // tensor.element_size(), shape, _strides(shape))
        tensors.append(tensor)
        at += _aligned(tensor.nbytes)
    return assemble(start, forms, tensors)


def decode(header: Tensor, size: int = _MOST_BYTES) -> tuple[Packet, Forms, list[Spec]]:
    """Return a packet without tensors, the forms of payload, target and rider, and the specs of their tensors.

    Args:
        header: The message, uint8, or its first HEADER_BYTES.
        size: Bytes of the message that holds header and tensors; if they do not come in one: what no packet exceeds.

    Raises:
        LinkError: The words are not those of a packet. Nothing that a peer says is believed unchecked.
    """
    words: list[int] = header[:HEADER_BYTES].view(torch.int64).tolist()
    if words[0] != _MAGIC:
        raise not_of_a_packet(f"first word {words[0]:#x}")
    if words[1] not in _KINDS or words[2] < 0:
        raise not_of_a_packet(f"kind {words[1]}, number {words[2]}")
    weight = _number(words[3])
    if not 0 <= weight < math.inf:
        raise not_of_a_packet(f"weight {weight}")
    forms = (words[4], words[5], words[6])
    if min(forms) < _SINGLE or max(forms) > HEADER_WORDS:
        raise not_of_a_packet(f"{forms} tensors")
    specs = []
    at = 7
    for _ in range(sum(map(_count, forms))):
        code, dims = words[at : at + 2] if at + 2 <= HEADER_WORDS else (-1, 0)
        end = at + 2 + dims
        if not (0 <= code < len(_DTYPES) and dims >= 0 and end <= HEADER_WORDS):
            raise not_of_a_packet(f"a tensor of dtype {code} with {dims} dimensions")
        specs.append((tuple(words[at + 2 : end]), _DTYPES[code]))
        at = end
    _refuse_larger(specs, size)
    return Packet(PacketKind(words[1]), words[2], weight=weight), forms, specs


def not_of_a_packet(what: str) -> LinkError:
    """Return the error of a message from a peer that no rank of this version sends."""
    return LinkError(
        f"got a message that is no packet ({what}); run one version on all ranks", code="message-is-no-packet"
    )


def _refuse_larger(specs: list[Spec], size: int) -> None:
    """Raise LinkError unless tensors of these specs fit into a message of `size` bytes."""
    room = size - HEADER_BYTES
    for shape, dtype in specs:
        if min(shape, default=0) < 0:
            raise not_of_a_packet(f"a tensor of shape {shape}")
        extent = dtype.itemsize * math.prod(max(dimension, 1) for dimension in shape)  # by it an empty one has strides
        room -= 0 if 0 in shape else _aligned(extent)
        if room < 0 or extent > _MOST_BYTES:
            raise not_of_a_packet(f"a tensor of shape {shape}, which {size} bytes cannot hold")


def assemble(start: Packet, forms: Forms, tensors: list[Tensor]) -> Packet:
    """Return a packet with the tensors that were received, which are in the order of their specs."""
    parts: list[Payload] = []
    at = 0
    for form in forms:
        part = tensors[at : at + _count(form)]
        parts.append(part[0] if form == _SINGLE else tuple(part))
        at += len(part)
    payload, target, rider = parts
    return replace(start, payload=payload, target=target, rider=rider)


def _form(payload: Payload) -> int:
    return _SINGLE if isinstance(payload, Tensor) else len(payload)


def _count(form: int) -> int:
    return 1 if form == _SINGLE else form


def _bits(number: float) -> int:
    """Return a float as the bits of an int64, which is what a header is made of."""
    return int(struct.unpack("=q", struct.pack("=d", number))[0])


def _number(bits: int) -> float:
    return float(struct.unpack("=d", struct.pack("=q", bits))[0])


def _words(words: list[int]) -> bytes:
    return struct.pack(f"={len(words)}q", *words)


def _message(header: bytes, size: int) -> Tensor:
    # Empty, not zeros: padding may be most of a message, and nobody reads it.
    message = torch.empty(size, dtype=torch.uint8)
    ctypes.memmove(message.data_ptr(), header, len(header))
    return message


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))  # as torch counts them, also where a dimension is empty
    return tuple(reversed(strides[: len(shape)]))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
