"""Weights for networks that were built on the meta device: every stage gets its own from disk, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from decoupled_pp.core.errors import UsageError, first_line
from decoupled_pp.core.plans import Weights
from decoupled_pp.core.torch_private import own_parameters
from decoupled_pp.models.splitting.tying import parameter_places

INDEX = "model.safetensors.index.json"  # says which tensor is in which shard


class StoredWeights(Weights):
    """Tensors in a safetensors file, or a folder as `save_pretrained` writes it, under the names of the split model."""

    def __init__(
        self,
        source: Path | None,  # None: there is none, and `prepare` makes the weights
        names: Mapping[str, str],  # key of the layers -> name in the model
        untied: Mapping[str, str],  # name of a parameter that was another's in the model -> name of that one
        prepare: Callable[[nn.Module], None],  # fills a part that has storage: unsaved buffers, fresh weights
        shared: Iterable[Sequence[str]] = (),  # names that are one parameter; a file may have only one of them
    ) -> None:
        """Look up where every tensor is; none is read."""
        self._source = source
        self._names = names
        self._untied = untied
        self._prepare = prepare
        self._same_tensor = {name: tuple(group) for group in shared for name in group}
        self._files = {} if source is None else _files_of_tensors(source)
        if source is not None:
            for name in names.values():
                self._stored_name(name)

    def fill(self, part: nn.Module, device: torch.device) -> None:
        """Give a part that is on the meta device storage and content."""
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for _, module, key, parameter in parameter_places({"": part}):
            places.setdefault(id(parameter), []).append((module, key))
        part.to_empty(device=device)
        # to_empty makes a parameter of its own for every place of a shared one.
        for (first, first_key), *others in places.values():
            for module, key in others:
                own_parameters(module)[key] = own_parameters(first)[first_key]
        with torch.no_grad():
            self._prepare(part)  # buffers that no file has; whatever a file has is overwritten below
            state = part.state_dict()
            wanted: dict[Path, list[str]] = {}
            if self._files:
                for key in state:
                    wanted.setdefault(self._files[self._stored_name(self._names[key])], []).append(key)
            # Grouped by file, so that each shard is opened once; safetensors reads only the tensors asked for.
            for file, keys in wanted.items():
                with safe_open(str(file), framework="pt") as tensors:
                    for key in keys:
                        state[key].copy_(tensors.get_tensor(self._stored_name(self._names[key])))

    def _stored_name(self, name: str) -> str:
        """Return the name under which the files have a tensor: a tied one is saved under one of its names."""
        for candidate in (name, *self._same_tensor.get(name, ()), self._untied.get(name, name)):
            if candidate in self._files:
                return candidate
        raise UsageError(
            f"{self._source} has no tensor {name!r}: it is of another model, or of one whose names the library "
            "converts when it loads (mixtures of experts, ViT); load it with from_pretrained, without the meta device "
            "(`model.meta`)",
            code="weight-missing",
            key="model.path",
        )


def _files_of_tensors(source: Path) -> dict[str, Path]:
    try:
        if (source / INDEX).is_file():
            listed = json.loads((source / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {name: source / file for name, file in listed.items()}
        file = source / "model.safetensors" if source.is_dir() else source
        with safe_open(str(file), framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), file)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UsageError(
            f"cannot read the weights in {source}: {first_line(error)}; give a folder of save_pretrained",
            code="weights-unreadable",
            key="model.path",
        ) from None
