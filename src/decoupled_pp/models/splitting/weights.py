"""Weights for networks that were built on the meta device: every stage gets its own from disk, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.plans import Weights

INDEX = "model.safetensors.index.json"
"""File beside the shards of a model that says which tensor is in which."""


class StoredWeights(Weights):
    """Tensors in safetensors files, under the names of the model that was split.

    One file, or a folder as `save_pretrained` writes it.
    """

    def __init__(
        self,
        source: Path | None,
        names: Mapping[str, str],
        untied: Mapping[str, str],
        prepare: Callable[[nn.Module], None],
        shared: Iterable[Sequence[str]] = (),
    ) -> None:
        """Look up where every tensor is; none is read.

        Args:
            source: The file or folder; None: there is none, `prepare` makes the weights.
            names: Key of the layers -> name in the model.
            untied: Name of a parameter that was another's in the model -> that one's.
            prepare: Fills a part that has storage and no content: buffers that are not saved, fresh weights.
            shared: Names in the model of what is one parameter, group by group; a file may have one of a group.

        Raises:
            UsageError: The files cannot be read, or lack a tensor.
        """
        self._names, self._untied, self._prepare = names, untied, prepare
        self._alike = {name: tuple(group) for group in shared for name in group}
        self._files = _files(source) if source is not None else {}
        if source is not None:
            for name in names.values():
                self._found(name, source)

    def fill(self, part: nn.Module, device: torch.device) -> None:
        """Give a part that is on the meta device storage and content.

        Args:
            part: Layers of the network under their names in it.
            device: Where to.
        """
        shared = shared_parameters(part)
        part.to_empty(device=device)
        for group in shared:  # each has become a parameter of its own
            (module, key), *others = group
            for other, name in others:
                other._parameters[name] = module._parameters[key]
        with torch.no_grad():
            self._prepare(part)
            state = part.state_dict()
            wanted: dict[Path, list[str]] = {}
            for key in state if self._files else ():
                wanted.setdefault(self._files[self._found(self._names[key])], []).append(key)
            for file, keys in wanted.items():
                with safe_open(str(file), framework="pt") as tensors:
                    for key in keys:
                        state[key].copy_(tensors.get_tensor(self._found(self._names[key])))

    def _found(self, name: str, source: Path | None = None) -> str:
        for one in (name, *self._alike.get(name, ()), self._untied.get(name, name)):
            if one in self._files:
                return one
        raise UsageError(
            f"{source} has no tensor {name!r}: it is of another model, or of one whose names its library converts when "
            "it loads (mixtures of experts, ViT), which only from_pretrained can read"
        )


def shared_parameters(part: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Places (module, key) of every parameter that has several, place by place."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in part.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, key))
    return [group for group in places.values() if len(group) > 1]


def _files(source: Path) -> dict[str, Path]:
    """Name of every tensor -> its file."""
    try:
        if (source / INDEX).is_file():
            listed = json.loads((source / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {name: source / file for name, file in listed.items()}
        file = source / "model.safetensors" if source.is_dir() else source
        with safe_open(str(file), framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), file)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
        raise UsageError(f"cannot read the weights in {source}: {reason}; give a folder of save_pretrained") from None
