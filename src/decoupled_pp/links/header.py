"""Packs packets into host messages: kind, number, weight, structure, specs, and in CPU links the tensors too."""

from __future__ import annotations

import ctypes
import json
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from decoupled_pp.core.device import host_memory
from decoupled_pp.core.errors import LinkError, UsageError
from decoupled_pp.core.packets import Packet, PacketKind, Payload
from decoupled_pp.core.structures import assemble, dismantle

HEADER_BYTES = 1024  # of most headers: room for about twenty tensors of four dimensions; those of more are larger

_MAGIC = 0x6470_7004
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
    torch.complex32,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_FIRST = 8  # word of the first tensor's spec
_SINGLE = -1  # see Forms
_NESTED = -2
_KINDS = frozenset(int(kind) for kind in PacketKind)
_MOST_BYTES = 1 << 48  # of a packet; far more than any machine holds, and no stride overflows

Spec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of one tensor."""

Forms = tuple[int, int, int]
"""Forms of payload, target and rider: -1 is one tensor, n >= 0 a tuple of n, -2 - n a structure with n tensors."""


class Announced(NamedTuple):
    """The content of a header."""

    kind: PacketKind
    number: int
    weight: float
    forms: Forms
    specs: list[Spec]  # of all tensors, in order
    structures: Sequence[str]  # the texts of those parts whose form is a structure
    size: int  # of the header, in bytes


class Parcel(NamedTuple):
    """A packet made ready to travel."""

    header: bytes  # what `decode` reads, without padding
    header_bytes: int  # with padding
    tensors: tuple[Tensor, ...]  # activations, then targets, then the rider
    payload_bytes: int
    message_bytes: int  # size of the smallest message that holds the header and all tensors, each aligned


def parcel(packet: Packet) -> Parcel:
    """Make a packet ready to travel; UsageError if something in it cannot."""
    # One plain loop: this is a CPU link's hot path, and after every wait its code is no longer in the caches.
    parts = [dismantle(part) for part in (packet.payload, packet.target, packet.rider)]
    tensors = (*parts[0][1], *parts[1][1], *parts[2][1])
    forms = (
        _form(packet.payload, *parts[0]),
        _form(packet.target, *parts[1]),
        _form(packet.rider, *parts[2]),
    )
    words = [_MAGIC, 0, packet.kind, packet.number, _bits(packet.weight), *forms]
    payload_bytes = 0
    message_bytes = 0
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
    if min(forms) <= _NESTED:
        words += _text_words([text for text, _ in parts if text is not None])
    header_bytes = max(HEADER_BYTES, _aligned(8 * len(words)))
    words[1] = header_bytes
    return Parcel(_words(words), header_bytes, tensors, payload_bytes, header_bytes + message_bytes)


def announce(content: Parcel, size: int) -> Tensor:
    """Return a message of `size` bytes that holds the header alone; at least `header_bytes`."""
    return _message(content.header, size)


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
    at = message.data_ptr() + content.header_bytes
    for tensor in content.tensors:
        # Conjugation and negation may be pending: bits of the tensor, not in its memory yet.
        plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
        source = tensor if plain else tensor.resolve_conj().resolve_neg().contiguous()
        ctypes.memmove(at, source.data_ptr(), source.nbytes)  # a tenth of the cost of slicing and copying in torch
        at += _aligned(tensor.nbytes)
    return message


def unpack(message: Tensor) -> Packet:
    """Return the packet of a message made by `pack`; its tensors share the message's memory."""
    announced = decode(message, message.numel())
    storage = message.untyped_storage()
    at = announced.size
    tensors = []
    for shape, dtype in announced.specs:
        # Not a view of the message: views share one version counter, and so an in-place change of one would make
        # autograd refuse all others.
        tensor = torch.empty(0, dtype=dtype)
        tensor.set_(storage, at // tensor.element_size(), shape, _strides(shape))
        tensors.append(tensor)
        at += _aligned(tensor.nbytes)
    return packet_of(announced, tensors)


def decode(header: Tensor, size: int = _MOST_BYTES) -> Announced:
    """Return the content of a header.

    Args:
        header: The message, uint8, or its first bytes.
        size: Bytes of the message that holds header and tensors; if they do not come in one: what no packet exceeds.

    Raises:
        LinkError: The words are not those of a packet. Nothing that a peer says is believed unchecked.
    """
    words: list[int] = header[:HEADER_BYTES].view(torch.int64).tolist()
    if words[0] != _MAGIC:
        raise not_of_a_packet(f"first word {words[0]:#x}")
    own_size = words[1]
    if not HEADER_BYTES <= own_size <= header.numel() or own_size % _ALIGNMENT:
        raise not_of_a_packet(f"a header of {own_size} bytes")
    if own_size > HEADER_BYTES:
        words = header[:own_size].view(torch.int64).tolist()
    if words[2] not in _KINDS or words[3] < 0:
        raise not_of_a_packet(f"kind {words[2]}, number {words[3]}")
    weight = _number(words[4])
    if not 0 <= weight < math.inf:
        raise not_of_a_packet(f"weight {weight}")
    forms = (words[5], words[6], words[7])
    specs, end = _specs(words, sum(map(_count, forms)))
    _refuse_larger(specs, size, own_size)
    structures = _structures(words, end) if min(forms) <= _NESTED else ()
    return Announced(PacketKind(words[2]), words[3], weight, forms, specs, structures, own_size)


def _specs(words: list[int], count: int) -> tuple[list[Spec], int]:
    """Return the specs of so many tensors, and the word behind them."""
    specs: list[Spec] = []
    at = _FIRST
    for _ in range(count):
        code, dims = words[at : at + 2] if at + 2 <= len(words) else (-1, 0)
        end = at + 2 + dims
        if not (0 <= code < len(_DTYPES) and dims >= 0 and end <= len(words)):
            raise not_of_a_packet(f"a tensor of dtype {code} with {dims} dimensions")
        specs.append((tuple(words[at + 2 : end]), _DTYPES[code]))
        at = end
    return specs, at


def _structures(words: list[int], at: int) -> list[str]:
    """Return the structures that the words from `at` on spell."""
    count = words[at] if at < len(words) else -1
    if not 0 <= count < len(words) - at:
        raise not_of_a_packet(f"a text of {count} words")
    try:
        found = json.loads(struct.pack(f"={count}q", *words[at + 1 : at + 1 + count]))
    except (ValueError, RecursionError):
        raise not_of_a_packet("a text that is no JSON") from None
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise not_of_a_packet("a text that lists no structures")
    return found


def not_of_a_packet(what: str) -> LinkError:
    """Return the error of a message from a peer that no rank of this version sends."""
    return LinkError(
        f"got a message that is no packet ({what}); run one version on all ranks", code="message-is-no-packet"
    )


def _refuse_larger(specs: list[Spec], size: int, header_size: int) -> None:
    """Raise LinkError unless tensors of these specs fit into a message of `size` bytes, behind the header."""
    room = size - header_size
    for shape, dtype in specs:
        if min(shape, default=0) < 0:
            raise not_of_a_packet(f"a tensor of shape {shape}")
        extent = dtype.itemsize * math.prod(max(dimension, 1) for dimension in shape)  # by it an empty one has strides
        room -= 0 if 0 in shape else _aligned(extent)
        if room < 0 or extent > _MOST_BYTES:
            raise not_of_a_packet(f"a tensor of shape {shape}, which {size} bytes cannot hold")


def packet_of(announced: Announced, tensors: list[Tensor]) -> Packet:
    """Return the packet of received tensors, which are in the order of their specs."""
    parts: list[Payload] = []
    structures = iter(announced.structures)
    at = 0
    for form in announced.forms:
        part = tensors[at : at + _count(form)]
        at += len(part)
        if form <= _NESTED:
            parts.append(_assembled(next(structures, ""), part))
        else:
            parts.append(part[0] if form == _SINGLE else tuple(part))
    payload, target, rider = parts
    return Packet(announced.kind, announced.number, payload, target, rider, announced.weight)


def _assembled(text: str, tensors: list[Tensor]) -> Payload:
    try:
        return assemble(text, tensors)
    except ValueError as error:
        raise LinkError(
            f"{error}; return a dictionary, or a class that this rank has at the top of a module",
            code="structure-not-known",
        ) from error


def _form(payload: Payload, text: str | None, tensors: tuple[Tensor, ...]) -> int:
    if text is not None:
        return _NESTED - len(tensors)
    return _SINGLE if isinstance(payload, Tensor) else len(tensors)


def _count(form: int) -> int:
    if form <= _NESTED:
        return _NESTED - form
    return 1 if form == _SINGLE else form


def _text_words(structures: list[str]) -> tuple[int, ...]:
    """Return the structures as words, the first of which says how many follow; spaces fill the last one."""
    text = json.dumps(structures).encode()
    count = -(-len(text) // 8)
    return count, *struct.unpack(f"={count}q", text.ljust(8 * count))


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
