"""Splits models of Hugging Face `transformers` at their blocks: no adapter per family."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from decoupled_pp.core.arguments import expect
from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.device import on_meta
from decoupled_pp.core.errors import UsageError
from decoupled_pp.models.splitting import Split, split_blocks
from decoupled_pp.models.splitting.arguments import check_model, check_sample
from decoupled_pp.models.splitting.layers import BlockLayer, Initialiser
from decoupled_pp.models.splitting.stubs import MissingPartStub
from decoupled_pp.models.splitting.weights import StoredWeights
from decoupled_pp.models.transformers_load import load_transformers, sample_inputs
from decoupled_pp.settings.sections import HuggingFaceModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_from_transformers(settings: HuggingFaceModel, info: DataInfo) -> nn.Sequential:
    """Build the layers of the model of a run."""
    return split_of_run(settings, load_transformers(settings, info), info).layers


def split_of_run(settings: HuggingFaceModel, model: PreTrainedModel, info: DataInfo) -> Split:
    """Split the model of a run."""
    stored = settings.path if settings.meta and settings.pretrained else None
    if stored is not None and not Path(stored).is_dir():
        raise UsageError(
            f"`model.path` {stored} is no folder; with `model.meta` give a folder with safetensors files",
            code="weights-unreadable",
            key="model.path",
        )
    return split_transformers(model, sample_inputs(info), stored)


def split_transformers(model: nn.Module, sample: Mapping[str, Tensor], weights: str | Path | None = None) -> Split:
    """Split a `transformers` model into layers, exactly: embeddings, blocks, and what comes after them.

    Args:
        model: An encoder or decoder with its head, or a module around one (adapters); its blocks lie in an
            `nn.ModuleList`. Its own loss is not used. It becomes part of the layers.
        sample: An input micro-batch by argument name, such as `input_ids` (B, T) and `attention_mask` (B, T).
        weights: For a model built under `torch.device("meta")`: the folder (`save_pretrained`) from which every rank
            loads its own stage when it builds it; None: fresh weights, as `transformers` makes them.

    Returns:
        The layers; they take the sample's tensors in their order (a single one by itself) and return the logits, or the
        last hidden state of a model without a head.

    Raises:
        UsageError: An encoder-decoder, or a model that is no chain of blocks (the text names what stands in the way).
    """
    check_model(model)
    check_sample(model, sample)
    expect("weights", weights, (str, Path, type(None)), "the folder of a model that `save_pretrained` wrote")
    library_model = _library_model(model)
    _refuse(library_model, sample)
    with _caches_off(model):
        options = _forward_options(model, library_model)
        found = split_blocks(model, _with_padding(sample), options=options, output=_logits)
    fresh = partial(_fresh_weights, library_model)
    initialiser = Initialiser(fresh)
    for layer in found.layers:
        if isinstance(layer, BlockLayer):
            layer.initialiser = initialiser
    if on_meta(model):
        source = None if weights is None else Path(weights)
        found.layers.weights = StoredWeights(source, found.names, found.untied, fresh, _shared_names(found))
    return found


def _refuse(model: PreTrainedModel, sample: Mapping[str, Tensor]) -> None:
    """Raise UsageError for models and samples that cannot be split."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(
            f"{type(model).__name__} is an encoder-decoder: every block of the decoder needs the encoder's output; "
            "take an encoder or a decoder alone (such as T5EncoderModel)",
            code="encoder-decoder-model",
        )
    if not isinstance(sample, Mapping):
        raise UsageError(
            'sample: give the inputs by the names of their arguments, such as {"input_ids": ids}', code="bad-sample"
        )
    if "labels" in sample:
        raise UsageError(
            "sample: leave labels out, they would travel for nothing; the loss is the trainer's, and every "
            "stage computes its own from the target",
            code="bad-sample",
        )
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        is_reentrant = isinstance(function, partial) and function.keywords.get("use_reentrant")
        # Reentrant checkpointing runs no backward if no input of the block asks for a gradient.
        if getattr(module, "gradient_checkpointing", False) and is_reentrant:
            raise UsageError(
                "gradient checkpointing with use_reentrant=True would leave the first block of every stage untrained: "
                "its input takes no gradient; enable it with use_reentrant=False, or use "
                "`training.checkpoint_activations`",
                code="reentrant-checkpointing",
            )


def _library_model(model: nn.Module) -> PreTrainedModel:
    """Return the model of the library: the model itself, or the outermost one inside a wrapper."""
    from transformers import PreTrainedModel

    found = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    if found is None:
        raise UsageError(
            f"{type(model).__name__} is no model of transformers, and holds none; split it with dpp.split or "
            "dpp.split_blocks",
            code="not-a-transformers-model",
        )
    return found


@contextmanager
def _caches_off(model: nn.Module) -> Iterator[None]:
    """Set `use_cache` to False in all configs: a wrapper may not hand it on. The copies in the layers keep it so."""
    configs = {id(config): config for part in model.modules() if (config := getattr(part, "config", None)) is not None}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


def _forward_options(model: nn.Module, library_model: PreTrainedModel) -> dict[str, Any]:
    """Return arguments of `forward` that make it return logits and nothing that training does not need."""
    takes = set(inspect.signature(model.forward).parameters)
    if "kwargs" in takes:  # a wrapper hands the others on
        takes |= set(inspect.signature(library_model.forward).parameters)
    options: dict[str, Any] = {}
    if "use_cache" in takes:
        options["use_cache"] = False
    if "output_router_logits" in takes:  # a mixture of experts collects them from all blocks, for its own loss only
        options["output_router_logits"] = False
    if "return_dict" in takes or "kwargs" in takes:
        options["return_dict"] = True
    return options


def _with_padding(sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sample with padding in its last row.

    Models leave a mask without padding out of the computation, so that the split would never see the mask.
    """
    mask = sample.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not len(mask):
        return dict(sample)
    padded = mask.clone()
    padded[-1, mask.shape[1] // 2 :] = 0
    return {**sample, "attention_mask": padded}


def _logits(result: Any) -> Tensor:
    for name in ("logits", "image_embeds", "text_embeds", "last_hidden_state"):
        found = getattr(result, name, None)
        if isinstance(found, Tensor):
            return found
    raise UsageError(
        f"the model returned {type(result).__name__} with neither logits nor last_hidden_state; take a model with a "
        "head, or split it with split_blocks and its output argument",
        code="output-not-a-tensor",
    )


def _fresh_weights(model: PreTrainedModel, part: nn.Module) -> None:
    """Fill weights and buffers as the library does, children first.

    `_init_weights` looks at a module's class; copies of the whole model hold stubs, which it does not know.
    """

    def fill(module: nn.Module) -> None:
        if not any(isinstance(one, MissingPartStub) for one in module.modules()):
            model._init_weights(module)  # type: ignore[no-untyped-call]

    part.apply(fill)


def _shared_names(found: Split) -> list[list[str]]:
    """Return the groups of names in the model that are one parameter."""
    groups: dict[int, list[str]] = {}
    for key, tensor in found.layers.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(found.names[key])
    return [names for names in groups.values() if len(names) > 1]
