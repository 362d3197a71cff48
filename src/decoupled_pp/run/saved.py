"""Loads a network from disk: out of a run folder, or out of a folder that `dpp export` has written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.device import on_meta, seeded
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.paths import expanded
from decoupled_pp.data import open_data
from decoupled_pp.data.vocabulary import open_vocabulary
from decoupled_pp.models import build_model
from decoupled_pp.models.huggingface import split_of_run
from decoupled_pp.models.transformers_load import load_exported, load_transformers
from decoupled_pp.run.checkpoints.opened import Checkpoint, latest_checkpoint
from decoupled_pp.run.checkpoints.resume import load_model
from decoupled_pp.run.early_exit import EarlyExit, read_early_exit
from decoupled_pp.run.folder import CHECKPOINTS, CONFIG_FILE, WEIGHTS_FILE, load_weights, read_info
from decoupled_pp.settings.load import load_settings
from decoupled_pp.settings.run import Settings
from decoupled_pp.settings.sections import FactoryData, HuggingFaceModel

TOKENIZER_FILE = "tokenizer.json"
TRANSFORMERS_FILE = "config.json"
"""The file by which `transformers` knows a folder as one of its own."""


@dataclass(frozen=True)
class Saved:
    """A folder with a network, and what is needed to build it."""

    folder: Path
    settings: Settings
    info: DataInfo
    checkpoint: Checkpoint | None  # the newest, whose weights are the network's; None: they are in the file of weights
    early_exit: EarlyExit | None = None  # the network ends there

    def build(self) -> nn.Module:
        """Build the network, without its trained weights."""
        model = self.settings.model
        if self.early_exit is None:
            return build_model(model, self.info)
        if isinstance(model, HuggingFaceModel):
            model = model.model_copy(update={"meta": False})
            layers = split_of_run(model, load_transformers(model, self.info, weights=False), self.info).layers
            return self.early_exit.network(layers, self.settings)
        return self.early_exit.network(build_model(model, self.info), self.settings)

    def fill(self, module: nn.Module) -> None:
        """Give the network its trained weights."""
        if self.checkpoint is None:
            load_weights(self.folder, module, key=None)
            return
        if on_meta(module):
            module.to_empty(device="cpu")
        load_model(self.checkpoint, module)

    def with_text(self) -> DataInfo:
        """Return what the data are like, with the functions that turn text into tokens and back."""
        own = self.folder / TOKENIZER_FILE
        data = self.settings.data
        info = self.info
        if isinstance(data, FactoryData):
            info = open_data(data, self.settings.seed).info
        elif info.form == "tokens":
            # An export has its tokenizer beside it; a run names the one that its data were read with.
            vocabulary = open_vocabulary(str(own) if own.is_file() else getattr(data, "tokenizer", None))
            info = replace(info, encode=vocabulary.encode, decode=vocabulary.decode)
        if info.form != "tokens" or info.encode is None or info.decode is None:
            raise UsageError(
                f"{self.folder} was trained on `data.kind` {data.kind}, which is no text to go on from; give a run on "
                "text with next-token targets",
                code="sample-needs-text",
                key="data.kind",
            )
        return info


def open_saved(folder: str | Path) -> Saved:
    """Open a run folder, or the folder of an export."""
    path = Path(expanded(folder))
    if not (path / CONFIG_FILE).is_file():
        raise UsageError(
            f"{path} is not a run folder: it has no {CONFIG_FILE}; give one, or what dpp export RUN -o FOLDER writes",
            code="not-a-run-folder",
        )
    checkpoint = latest_checkpoint(path / CHECKPOINTS)
    if checkpoint is None and not any(path.glob("model*.safetensors")):
        raise UsageError(
            f"{path} has no checkpoint yet, and no {WEIGHTS_FILE}; train on until `checkpoint.every` steps are done",
            code="no-checkpoint",
            key="checkpoint.every",
        )
    return Saved(path, load_settings(path / CONFIG_FILE), read_info(path), checkpoint, read_early_exit(path))


def load(folder: str | Path) -> nn.Module:
    """Load a trained network, in evaluation mode on the CPU.

    Args:
        folder: A run folder, whose newest checkpoint is taken, or a folder that `dpp export` has written. Its data need
            not be there. A factory that its `config.yaml` names is called, so load only what you trust.

    Returns:
        A plain module: the layers in order, which take a micro-batch of the run's inputs (B, ...) and return their
        logits; of a `transformers` model, that model.

    Raises:
        UsageError: There is no network, or its weights do not fit its settings.
    """
    path = Path(expanded(folder))
    with seeded(0):  # fresh weights are drawn before the trained ones take their place
        module = _load(path)
    return module.eval()


def _load(path: Path) -> nn.Module:
    if (path / TRANSFORMERS_FILE).is_file():
        return load_exported(path)
    saved = open_saved(path)
    if isinstance(saved.settings.model, HuggingFaceModel) and saved.early_exit is None:
        whole = saved.settings.model.model_copy(update={"meta": False})
        model = load_transformers(whole, saved.info, weights=False)
        saved.fill(split_of_run(whole, model, saved.info).layers)  # which are parts of the model
        return model
    module = saved.build()
    saved.fill(module)
    return module
