"""Saves models of `transformers` that were split, as folders that `from_pretrained` loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.models.huggingface import split_of_run
from decoupled_pp.models.splitting import Split
from decoupled_pp.models.transformers_load import load_transformers
from decoupled_pp.settings.sections import HuggingFaceModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_transformers(model: PreTrainedModel, found: Split, output: str | Path, *, tied: bool = False) -> None:
    """Write a folder that `from_pretrained` loads with the model's present weights.

    Splitting unties shared weights (mostly the output projection); the saved config says so with
    `tie_word_embeddings: false`. That setting undoes all ties, so a weight that is still shared is written under each
    of its names.

    Args:
        model: The model that was split; every rank may have the weights of all (`Trainer.export`).
        found: The result of `split_transformers`.
        output: The folder.
        tied: True to make one weight again of those that were untied: the later user's (the output projection). This
            holds for the folder; the model keeps two.

    Raises:
        UsageError: `tied` is True, but splitting this model untied no weights.
    """
    _set_tying(model, found, tied=tied)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if tied:
        for later, first in found.untied.items():
            state[first] = state[later].clone()
    # save_pretrained may write its own view of tying into the config.
    before = model.config.tie_word_embeddings
    model.save_pretrained(output, state_dict=state)
    model.config.tie_word_embeddings = before


def export_transformers(
    settings: HuggingFaceModel,
    info: DataInfo,
    load: Callable[[nn.Module], None],  # puts the trained weights into the layers
    # For a model on the meta device: writes them to a folder under their names, and tied ones under another's.
    write: Callable[[Path, Mapping[str, str], Mapping[str, str]], object],
    output: Path,
    *,
    tied: bool = False,
    tokenizer: str | None = None,
) -> None:
    """Write a run's model as `save_transformers` does, with the tokenizer of the data, or else of the model."""
    model = load_transformers(settings, info, weights=False)
    found = split_of_run(settings, model, info)
    if settings.meta:
        _set_tying(model, found, tied=tied)
        write(output, found.names, {first: later for later, first in found.untied.items()} if tied else {})
        # The model was never saved by the library, which would have written these files.
        model.config.architectures = [type(model).__name__]
        for config in (model.config, getattr(model, "generation_config", None)):
            if config is not None:
                config.save_pretrained(output)
    else:
        load(found.layers)
        save_transformers(model, found, output, tied=tied)
    _copy_tokenizer(tokenizer, settings.path, output)


def _set_tying(model: PreTrainedModel, found: Split, *, tied: bool) -> None:
    """Make the config say whether untied weights are saved as one."""
    if tied and not found.untied:
        raise UsageError(
            f"--tied: splitting a {type(model).__name__} unties no weights, so there is nothing to tie; leave it out",
            code="nothing-tied",
        )
    if found.untied:
        model.config.tie_word_embeddings = tied


def _copy_tokenizer(tokenizer: str | None, path: str | None, output: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerFast

    if tokenizer is not None and Path(tokenizer).is_file():
        PreTrainedTokenizerFast(tokenizer_file=tokenizer).save_pretrained(output)  # type: ignore[no-untyped-call]
        tokenizer = None
    for kind, source in ((AutoTokenizer, tokenizer or path), (AutoImageProcessor, path)):
        if source is None:
            continue
        with suppress(OSError, ValueError, KeyError, ImportError):  # most models have one of the two
            kind.from_pretrained(source).save_pretrained(output)
