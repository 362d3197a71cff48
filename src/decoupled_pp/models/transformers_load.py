"""Builds the `transformers` model that a run's settings name, for the data of the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError, first_line
from decoupled_pp.core.extras import import_extra
from decoupled_pp.core.suggestions import did_you_mean
from decoupled_pp.settings.sections import HuggingFaceModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_HEADS = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
}
_HEAD_OF_FORM = {
    "tokens": "causal_lm",
    "masked_tokens": "masked_lm",
    "sentences": "sequence_classification",
    "image": "image_classification",
}


def load_transformers(settings: HuggingFaceModel, info: DataInfo, *, weights: bool = True) -> PreTrainedModel:
    """Build the model of a run, in fp32; fresh weights come from torch's global generator.

    Without `weights` they are fresh even where the settings ask for pretrained ones: the caller overwrites them.
    """
    transformers = import_extra("transformers", "model.kind", "huggingface")
    head = settings.head or _HEAD_OF_FORM.get(info.form)
    if head is None:
        raise UsageError(
            f"`model.head` is not given and data of form {info.form!r} suggests none; give one of {', '.join(_HEADS)}",
            code="model-head-unknown",
            key="model.head",
        )
    maker = getattr(transformers, _HEADS[head])
    config = _config(settings, info, head)
    try:
        if settings.meta:
            # from_config allocates nothing under this context; from_pretrained would read all weights.
            with torch.device("meta"):
                model = maker.from_config(config, dtype=torch.float32)
        elif settings.path is not None and settings.pretrained and weights:
            model = _pretrained(maker, settings.path, config)
        else:
            model = maker.from_config(config, dtype=torch.float32)
    except UsageError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _unusable(settings, f"cannot be loaded as {head}", error) from None
    _check_vocabulary(model, info)
    loaded: PreTrainedModel = model
    return loaded


def load_exported(folder: Path) -> PreTrainedModel:
    """Load a folder that `save_pretrained` has written, as the class that its config names."""
    transformers = import_extra("transformers", "model.kind", "huggingface")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        (name,) = config.architectures or (None,)
        if not isinstance(name, str) or not hasattr(transformers, name):
            raise ValueError(f"its config.json names no model of the library, but {name!r}")
        loaded: PreTrainedModel = getattr(transformers, name).from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UsageError(
            f"{folder} is no usable folder of transformers: {first_line(error)}; export it again",
            code="export-not-loadable",
        ) from error
    return loaded


def sample_inputs(info: DataInfo) -> dict[str, Tensor]:
    """Return a micro-batch of two made-up samples, by the name of the argument that takes it."""
    vocabulary = _vocabulary_of(info)
    if vocabulary is not None:
        ids = torch.arange(2 * info.shape[0]).reshape(2, -1) % vocabulary
        if info.form == "sentences":
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool)}
        return {"input_ids": ids}
    if info.form == "image":
        return {"pixel_values": torch.linspace(-1, 1, 2 * torch.Size(info.shape).numel()).reshape(2, *info.shape)}
    raise UsageError(
        f"`model.kind` huggingface takes tokens, sentences or images, not data of form {info.form!r}; split the model "
        "yourself (dpp.split_blocks)",
        code="model-data-mismatch",
        key="model.kind",
    )


def _unusable(settings: HuggingFaceModel, fault: str, error: Exception) -> UsageError:
    key = "model.path" if settings.path else "model.type"
    return UsageError(
        f"`{key}` {settings.path or settings.type!r} {fault}: {first_line(error)}", code="model-not-loadable", key=key
    )


def _pretrained(maker: Any, path: str, config: PretrainedConfig) -> PreTrainedModel:
    """Load a pretrained model. Its classifier is made anew if it has another number of classes."""
    model, found = maker.from_pretrained(
        path, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
    )
    for name, stored, here in sorted(found["mismatched_keys"]):
        is_classifier = stored[1:] == here[1:] and here[0] == config.num_labels
        if not is_classifier:
            raise UsageError(
                f"{name} has shape {tuple(stored)} in {path} and {tuple(here)} with the changes in `model.config`; "
                "leave out those that change shapes, or set `model.pretrained` to false",
                code="model-config-mismatch",
                key="model.config",
            )
    loaded: PreTrainedModel = model
    return loaded


def _config(settings: HuggingFaceModel, info: DataInfo, head: str) -> PretrainedConfig:
    """Return the config of the model, with the changes of the settings and those that the data need."""
    from transformers import AutoConfig

    changes = dict(settings.config)
    _adapt(changes, settings, info, head)
    try:
        if settings.path is not None:
            config: PretrainedConfig = AutoConfig.from_pretrained(settings.path, **changes)
        else:
            config = AutoConfig.for_model(settings.type or "", **changes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unusable(settings, "has no usable config", error) from None
    known = type(config)()  # from_pretrained takes any key, so that a misspelt one would do nothing
    for key in settings.config:
        if not hasattr(known, key) and key != "attn_implementation":
            raise UsageError(
                f"`model.config` has {key!r}, which is no setting of a {config.model_type}"
                f"{did_you_mean(key, known.to_dict())}",
                code="unknown-model-config",
                key="model.config",
            )
    return config


def _adapt(changes: dict[str, Any], settings: HuggingFaceModel, info: DataInfo, head: str) -> None:
    """Add to the changes of a config what the data need, unless they say it themselves."""
    if head.endswith("classification"):
        changes.setdefault("num_labels", info.outputs)
    if info.pad is not None and changes.setdefault("pad_token_id", info.pad) != info.pad:
        raise UsageError(
            f"`model.config` has pad_token_id {changes['pad_token_id']}, but the tokenizer's is {info.pad}; leave it "
            "out",
            code="pad-token-mismatch",
            key="model.config",
        )
    if settings.path is not None and settings.pretrained:
        return  # the shapes of a pretrained model are given
    vocabulary = _vocabulary_of(info)
    if vocabulary is not None:
        changes.setdefault("vocab_size", vocabulary)
    if info.form == "image":
        changes.setdefault("image_size", info.shape[-1])
        changes.setdefault("num_channels", info.shape[0])


def _vocabulary_of(info: DataInfo) -> int | None:
    return info.outputs if info.form in {"tokens", "masked_tokens"} else info.vocabulary


def _check_vocabulary(model: nn.Module, info: DataInfo) -> None:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    vocabulary = _vocabulary_of(info)
    if vocabulary is not None and isinstance(size, int) and size < vocabulary:
        raise UsageError(
            f"the data have {vocabulary} tokens and the model {size}; give `data.tokenizer` the model's own, or "
            "vocab_size in `model.config`",
            code="vocabulary-too-small",
            key="data.tokenizer",
        )
