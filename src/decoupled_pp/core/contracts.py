"""The vocabulary that everyone shares: packets, plans, errors, and the few abstract interfaces between the parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Payload: TypeAlias = Tensor | tuple[Tensor, ...]
"""What flows between layers: one tensor, or a flat tuple of tensors (of any dtypes and shapes)."""

Batch: TypeAlias = tuple[Payload, Payload]
"""(input, target) of one micro-batch; dimension 0 of every tensor is the batch."""

Loss: TypeAlias = Callable[[Tensor, Payload], Tensor]
"""loss(logits, target) -> scalar, the mean over the micro-batch."""

Record: TypeAlias = dict[str, Any]
"""One JSON-able line of metrics; always has `kind` and `stage`."""

PHASES = ("wait_in", "forward", "wait_out", "critic", "backward", "step")
"""What a stage does with a training packet, in order; the names of the spans in metrics and traces.

Evaluation and checkpoints are spans of their own, `evaluate` and `save`.
"""


class UsageError(ValueError):
    """The user's input is at fault: one line that names the fault, the value and the remedy (exit code 2)."""


class TrainingError(RuntimeError):
    """Training cannot go on: a non-finite loss, a failed peer, a signal (one line, exit code 1)."""


class LinkError(TrainingError):
    """A link broke or a bounded wait on it expired; the text says who waited for whom, for what, how long."""


LAUNCHER_GONE = "the launcher is gone: its store does not answer"
"""What a rank says whose launcher was killed: nobody else can say how to go on."""


@dataclass(frozen=True)
class Fault:
    """Why a run ends early.

    Attributes:
        text: One line.
        rank: The rank that found it.
        usage: Whether the user's input is at fault (exit code 2) rather than the training (1).
    """

    text: str
    rank: int
    usage: bool = False


class PeerError(TrainingError):
    """This rank ends because another one reported a fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.text)
        self.fault = fault


class PacketKind(IntEnum):
    """What a stage is asked to do with a packet. All kinds travel the links in order, first in first out."""

    TRAIN = 0
    EVALUATE = 1
    EVALUATION_END = 2
    SAVE = 3
    END = 4


@dataclass(frozen=True, slots=True)
class Packet:
    """One message of the pipeline: a micro-batch on its way forward, or a marker between micro-batches.

    Attributes:
        kind: What to do with it.
        number: Sequence number of a TRAIN packet (from 0); for other kinds the count of TRAIN packets before it.
        payload: Activations; dimension 0 is the batch. An empty tuple in markers.
        target: Targets of the micro-batch; they ride along to every stage. An empty tuple in markers.
        rider: What a critic sends to the next stage's critic (`objective.Critic.rider`); usually an empty tuple.
    """

    kind: PacketKind
    number: int
    payload: Payload = ()
    target: Payload = ()
    rider: Payload = ()

    @property
    def samples(self) -> int:
        """Size of dimension 0 of the first payload tensor, 0 in a marker."""
        tensors = as_tuple(self.payload)
        return tensors[0].shape[0] if tensors and tensors[0].dim() else 0


def as_tuple(payload: Payload) -> tuple[Tensor, ...]:
    """The tensors of a payload, always as a tuple."""
    return (payload,) if isinstance(payload, Tensor) else payload


def map_payload(function: Callable[[Tensor], Tensor], payload: Payload) -> Payload:
    """Apply `function` to every tensor and keep the form (tensor or tuple)."""
    return function(payload) if isinstance(payload, Tensor) else tuple(function(tensor) for tensor in payload)


def first_tensor(payload: Payload) -> Tensor:
    """The tensor a built-in critic looks at: the payload itself, or the first of its tuple."""
    return payload if isinstance(payload, Tensor) else payload[0]


def check_payload(value: object, source: str) -> Payload:
    """Return `value` if it can travel a link, else raise UsageError naming `source` (the layer that made it)."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple) and value and all(isinstance(item, Tensor) for item in value):
        return value
    raise UsageError(
        f"{source} returned {type(value).__name__}: between layers only a tensor or a flat, non-empty tuple of "
        "tensors can travel; return one of these"
    )


class Weights(ABC):
    """The weights of a network that was built on the meta device."""

    @abstractmethod
    def fill(self, part: nn.Module, device: torch.device) -> None:
        """Give storage and content to layers of the network, under their names in it."""


class Layers(nn.Sequential):
    """Layers under names that may have dots in them: those that they have in the user's own, nested network.

    Attributes:
        places: Boundaries where the network may be cut (`cut_after`); None: anywhere.
        weights: What fills layers that are on the meta device, stage by stage; None: they have their weights.
        tied: Key of a parameter that was another one's before the network was split -> key of that one.
    """

    places: tuple[int, ...] | None = None
    weights: Weights | None = None
    tied: Mapping[str, str] = MappingProxyType({})

    def __init__(self, named: Iterable[tuple[str, nn.Module]] = ()) -> None:
        super().__init__()
        self._modules.update(named)  # add_module refuses dots

    def _load_from_state_dict(  # noqa: PLR0917 - torch's own signature
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, False, missing, unexpected, errors)
        known = tuple(f"{prefix}{name}." for name in self._modules)
        if strict:  # torch would look up the first part of a key alone
            unexpected += [key for key in state_dict if key.startswith(prefix) and not key.startswith(known)]


@dataclass(frozen=True)
class Plan:
    """A network and where it is cut. Built by `dpp.partition`; stages are contiguous runs of layers.

    Attributes:
        module: The whole network: the user's own layers under their own names.
        boundaries: Index of the first layer of every stage, then the number of layers: strictly increasing,
            `len(boundaries) == stages + 1`, `boundaries[0] == 0`.
        sample: An input micro-batch (fixes shapes for critics and measurements).
        layer_seconds: Measured forward + backward seconds of every layer, or None if not measured.
        critic_seconds: Measured forward + backward seconds of the critic of every cut stage, or None.
    """

    module: nn.Sequential
    boundaries: tuple[int, ...]
    sample: Payload
    layer_seconds: tuple[float, ...] | None = None
    critic_seconds: tuple[float, ...] | None = None

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.boundaries) - 1

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the layers in order, as in the user's module."""
        return tuple(name for name, _ in self.module.named_children())

    @property
    def sizes(self) -> tuple[int, ...]:
        """Layers per stage."""
        return tuple(b - a for a, b in zip(self.boundaries[:-1], self.boundaries[1:], strict=True))

    def stage_module(self, stage: int) -> nn.Sequential:
        """The layers of one stage, sharing the user's modules and keeping their names in `state_dict`."""
        first, last = self.boundaries[stage], self.boundaries[stage + 1]
        return Layers(list(self.module.named_children())[first:last])


@dataclass(frozen=True)
class Exit:
    """Held-out score of one exit: the stages up to `stage`, and its critic (the network's own head in the last).

    Attributes:
        stage: Index of the stage.
        val_loss: Mean loss per target, None if there was no evaluation.
        val_accuracy: Share of targets classified right, None without class targets.
        knn_accuracy: Share classified right by the nearest training samples (`validation.knn`), None if not asked for.
    """

    stage: int
    val_loss: float | None
    val_accuracy: float | None
    knn_accuracy: float | None = None


@dataclass(frozen=True)
class Report:
    """What a run did, the same on every rank. The dictionaries have the keys of `summary.json`.

    Attributes:
        steps: Optimizer steps per stage in all, resumed ones included.
        seconds: Wall-clock seconds of this run.
        training_seconds: The same without evaluations and checkpoints.
        step_seconds: `mean`, `p50` and `p95` of the training seconds from one optimizer update of the last stage to
            the next in steady state (without the first tenth of them); None with too few updates.
        samples_per_second: Training samples per training second of this run, through the last stage.
        train_loss: Mean training loss of the last stage over its last metrics interval.
        exits: Held-out score of every exit at the last evaluation.
        per_stage: Parameters, times and memory of every stage.
        links: Packets and bytes of every link.
        stopped: Why the run ended before its last step (a request to stop), or None.
    """

    steps: int
    seconds: float
    training_seconds: float
    step_seconds: dict[str, float] | None
    samples_per_second: float
    train_loss: float | None
    exits: tuple[Exit, ...]
    per_stage: tuple[Record, ...]
    links: tuple[Record, ...]
    stopped: str | None = None


@dataclass(frozen=True)
class CriticContext:
    """What a critic builder may look at.

    Attributes:
        stage: Index of the stage the critic judges.
        stages: Number of stages; only stages before the last have a critic.
        boundary: Index of the first layer above the stage.
        hidden: A sample of the stage's output (no gradient).
        output: A sample of the whole network's output (logits; no gradient).
        layers: All layers of the network; builders may deep-copy layers from `boundary` on, never use them directly.
        hiddens: For every layer above, a sample of its input: `hiddens[j]` goes into `layers[boundary + j]`
            (so `hiddens[0]` is `hidden`).
        sample: A sample of the network's own input.
    """

    stage: int
    stages: int
    boundary: int
    hidden: Payload
    output: Tensor
    layers: tuple[nn.Module, ...]
    hiddens: tuple[Payload, ...] = ()
    sample: Payload = ()


CriticBuilder: TypeAlias = Callable[[CriticContext], nn.Module]
"""Builds the critic of one stage: a module from the stage's output to logits shaped like the network's output."""


class BatchSource(ABC):
    """A deterministic, resumable stream of micro-batches."""

    @abstractmethod
    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield micro-batches from number `start` on; the same number is always the same micro-batch."""


@dataclass(frozen=True)
class DataInfo:
    """What a model or an example may want to know about the data.

    Attributes:
        form: "image" (B, C, H, W float), "vector" (B, D float), "tokens" (B, T int64, next-token targets),
            "masked_tokens" (B, T int64, targets where tokens are masked, IGNORED elsewhere), "sentences" (ids (B, T),
            bool mask (B, T), class targets) or "other".
        shape: Shape of one sample without the batch dimension; of sentences the longest.
        outputs: Number of classes or size of the vocabulary.
        encode: For text, string -> token ids.
        decode: For text, token ids -> string.
        vocabulary: For sentences, the size of the vocabulary.
        pad: For sentences, the id of padding.
    """

    form: str
    shape: tuple[int, ...]
    outputs: int
    encode: Callable[[str], list[int]] | None = None
    decode: Callable[[list[int]], str] | None = None
    vocabulary: int | None = None
    pad: int | None = None

    def known(self) -> dict[str, Any]:
        """All but the functions, as JSON."""
        known = {"form": self.form, "shape": list(self.shape), "outputs": self.outputs}
        return {**known, "vocabulary": self.vocabulary, "pad": self.pad}

    @staticmethod
    def of(known: dict[str, Any]) -> DataInfo:
        """What `known` gave; it can neither encode nor decode."""
        more = {key: known.get(key) for key in ("vocabulary", "pad")}
        return DataInfo(known["form"], tuple(known["shape"]), known["outputs"], **more)


@dataclass(frozen=True)
class Data:
    """A data set ready to train on: seeded, shuffled training micro-batches and a fixed validation pass."""

    info: DataInfo
    train: BatchSource
    validation: BatchSource


def count_parameters(module: nn.Module | None) -> int:
    """Number of parameter elements (0 for None)."""
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


def payload_bytes(payload: Payload) -> int:
    """Bytes of all tensors of a payload."""
    return sum(tensor.numel() * tensor.element_size() for tensor in as_tuple(payload))


def is_classification(logits: Tensor, target: Payload) -> bool:
    """Whether `target` holds class indices of `logits`' last dimension, so that accuracy means something."""
    first = as_tuple(target)[0]
    return not torch.is_floating_point(first) and first.shape == logits.shape[:-1]
