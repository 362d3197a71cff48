"""Models of `transformers` that were split, as folders that `from_pretrained` loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.models.huggingface import load_transformers, split_of_run
from decoupled_pp.models.splitting import Split
from decoupled_pp.settings.sections import HuggingFaceModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_transformers(model: PreTrainedModel, found: Split, output: str | Path, *, tied: bool = False) -> None:
    """Write a folder that `from_pretrained` loads with the model's present weights.

    Where a weight was one with another's and has become its own (the output projection, mostly), the config says so
    (`tie_word_embeddings: false`). What is still one weight under several names is written under each of them, for
    that setting undoes all ties.

    Args:
        model: The model that was split; every rank may have the weights of all (`Trainer.export`).
        found: What `split_transformers` returned.
        output: The folder.
        tied: Make one weight again of those that were: the later user's (the output projection). In the folder; the
            model keeps two.

    Raises:
        UsageError: Nothing was tied that could be again.
    """
    _say_how_tied(model, found, tied=tied)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for later, first in found.untied.items() if tied else ():
        state[first] = state[later].clone()
    before = model.config.tie_word_embeddings
    model.save_pretrained(output, state_dict=state)
    model.config.tie_word_embeddings = before


def _say_how_tied(model: PreTrainedModel, found: Split, *, tied: bool) -> None:
    if tied and not found.untied:
        raise UsageError(f"--tied: no weight of a {type(model).__name__} was tied and is two now; leave it out")
    if found.untied:
        model.config.tie_word_embeddings = tied


def export_transformers(
    settings: HuggingFaceModel,
    info: DataInfo,
    load: Callable[[nn.Module], None],
    write: Callable[[Path, Mapping[str, str], Mapping[str, str]], object],
    output: Path,
    *,
    tied: bool = False,
    tokenizer: str | None = None,
) -> None:
    """Write a run's model as `save_transformers` does, with the tokenizer of the data, or else of the pretrained model.

    Args:
        settings: The `model` section of the run.
        info: Its data.
        load: Puts the trained weights into the layers it is given.
        write: For a model on the meta device: writes the trained weights to a folder, given the names of all tensors
            and, for tied ones, name -> the one written instead.
        output: The folder.
        tied: As for `save_transformers`.
        tokenizer: The data's: a file, or the folder or name of a model.

    Raises:
        UsageError: Nothing was tied that could be again.
    """
    model = load_transformers(settings, info, weights=False)
    found = split_of_run(settings, model, info)
    if settings.meta:
        _say_how_tied(model, found, tied=tied)
        write(output, found.names, {first: later for later, first in found.untied.items()} if tied else {})
        model.config.architectures = [type(model).__name__]
        for config in (model.config, getattr(model, "generation_config", None)):
            if config is not None:
                config.save_pretrained(output)
    else:
        load(found.layers)
        save_transformers(model, found, output, tied=tied)
    _copy_tokenizer(tokenizer, settings.path, output)


def _copy_tokenizer(tokenizer: str | None, path: str | None, output: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerFast

    if tokenizer is not None and Path(tokenizer).is_file():
        PreTrainedTokenizerFast(tokenizer_file=tokenizer).save_pretrained(output)  # type: ignore[no-untyped-call]
        tokenizer = None
    for kind, source in ((AutoTokenizer, tokenizer or path), (AutoImageProcessor, path)):
        with suppress(OSError, ValueError, KeyError, ImportError):  # most models have one of the two
            if source is not None:
                kind.from_pretrained(source).save_pretrained(output)
