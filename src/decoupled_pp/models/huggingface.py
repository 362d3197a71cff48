"""Models of Hugging Face `transformers`, split at their blocks: no adapter per family."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.suggestions import did_you_mean
from decoupled_pp.models.splitting import Split, split_blocks
from decoupled_pp.models.splitting.layers import Block, Rule
from decoupled_pp.models.splitting.stubs import Absent, Noting, Passing, without_weights
from decoupled_pp.models.splitting.weights import StoredWeights
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


def split_transformers(
    model: PreTrainedModel, sample: Mapping[str, Tensor], weights: str | Path | None = None
) -> Split:
    """Split a `transformers` model into layers, exactly: embeddings, blocks, and what comes after them.

    Args:
        model: An encoder or decoder with its head; its blocks lie in an `nn.ModuleList`. Its own loss is not used.
            It becomes part of the layers.
        sample: An input micro-batch by argument name, `input_ids` (B, T) and `attention_mask` (B, T), say.
        weights: For a model built under `torch.device("meta")`: the folder (`save_pretrained`) from which every rank
            loads its own stage when it builds it; None: fresh weights, as `transformers` makes them.

    Returns:
        The layers; they take the sample's tensors in their order (a single one by itself) and return the logits, or the
        last hidden state of a model without a head.

    Raises:
        UsageError: An encoder-decoder, or a model that is no chain of blocks (what stands in the way is named).
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(
            f"{type(model).__name__} is an encoder-decoder: every block of the decoder needs the encoder's output; "
            "take an encoder or a decoder alone (T5EncoderModel, say)"
        )
    if not isinstance(sample, Mapping):
        raise UsageError('sample: give the inputs by the names of their arguments, {"input_ids": ids}, say')
    if "labels" in sample:
        raise UsageError(
            "sample: leave labels out, they would travel for nothing; the loss is the trainer's, and every "
            "stage computes its own from the target"
        )
    _refuse_reentrant(model)
    takes = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    if "output_router_logits" in takes:  # of a mixture of experts, from all blocks: for its own loss only
        options["output_router_logits"] = False
    if "return_dict" in takes or "kwargs" in takes:
        options["return_dict"] = True
    found = split_blocks(model, _padded(sample), options=options, output=_output)
    rule = Rule(partial(_fresh, model))
    for layer in found.layers:
        if isinstance(layer, Block):
            layer.rule = rule
    if without_weights(model):
        source = Path(weights) if weights is not None else None
        found.layers.weights = StoredWeights(source, found.names, found.untied, partial(_fresh, model), _groups(found))
    return found


def _groups(found: Split) -> list[list[str]]:
    """Names in the model of what is one parameter."""
    alike: dict[int, list[str]] = {}
    for key, tensor in found.layers.state_dict(keep_vars=True).items():
        alike.setdefault(id(tensor), []).append(found.names[key])
    return [names for names in alike.values() if len(names) > 1]


def _refuse_reentrant(model: nn.Module) -> None:
    """The model's own checkpointing, of the older kind, loses gradients where nothing before asks for one."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        asked = isinstance(function, partial) and function.keywords.get("use_reentrant")
        if getattr(module, "gradient_checkpointing", False) and asked:
            raise UsageError(
                "gradient checkpointing with use_reentrant=True would leave the first block of every stage untrained: "
                "its input takes no gradient; enable it with use_reentrant=False, or use checkpoint_activations"
            )


def _fresh(model: PreTrainedModel, part: nn.Module) -> None:
    """Weights and buffers as the library makes them, children first; whole models have stubs in them and no rule."""

    def fill(module: nn.Module) -> None:
        if not any(isinstance(one, Absent | Noting | Passing) for one in module.modules()):
            model._init_weights(module)  # type: ignore[no-untyped-call]

    part.apply(fill)


def _padded(sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sample with padding in its last row: without any, models leave the mask out, and with some they do not."""
    mask = sample.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return dict(sample)
    padded = mask.clone()
    padded[-1, mask.shape[1] // 2 :] = 0
    return {**sample, "attention_mask": padded}


def _output(result: Any) -> Tensor:
    found = getattr(result, "logits", None)
    if found is None:
        found = getattr(result, "last_hidden_state", None)
    if not isinstance(found, Tensor):
        raise UsageError(f"the model returned {type(result).__name__} with neither logits nor last_hidden_state")
    return found


def load_transformers(settings: HuggingFaceModel, info: DataInfo, *, weights: bool = True) -> PreTrainedModel:
    """The model of a run, in fp32; fresh weights come from torch's global generator.

    Args:
        settings: The `model` section.
        info: The data it is for.
        weights: False: fresh ones even where the settings ask for pretrained ones, to be overwritten.

    Raises:
        UsageError: `transformers` is missing, the model cannot be loaded, or it does not fit the data.
    """
    try:
        import transformers
    except ImportError:
        raise UsageError("model.kind huggingface needs transformers: pip install 'decoupled_pp[hf]'") from None
    head = settings.head or _HEAD_OF_FORM.get(info.form)
    if head is None:
        raise UsageError(
            f"model.head is not given and data of form {info.form!r} suggests none; of {', '.join(_HEADS)}"
        )
    maker = getattr(transformers, _HEADS[head])
    config = _config(settings, info, head)
    try:
        if settings.meta:
            with torch.device("meta"):
                model = maker.from_config(config, dtype=torch.float32)
        elif settings.path is not None and settings.pretrained and weights:
            model = _pretrained(maker, settings.path, config)
        else:
            model = maker.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UsageError(f"model.path: {settings.path or settings.type!r} as {head}: {_line(error)}") from None
    _check_vocabulary(model, info)
    loaded: PreTrainedModel = model
    return loaded


def _pretrained(maker: Any, path: str, config: PretrainedConfig) -> PreTrainedModel:
    """A pretrained model; a classifier for other classes is made anew.

    Raises:
        UsageError: Another of its tensors has another shape.
    """
    model, found = maker.from_pretrained(
        path, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
    )
    for name, stored, here in sorted(found["mismatched_keys"]):
        if stored[1:] != here[1:] or here[0] != config.num_labels:
            raise UsageError(f"model.config: {name} is {tuple(stored)} in {path} and {tuple(here)} with these changes")
    loaded: PreTrainedModel = model
    return loaded


def _config(settings: HuggingFaceModel, info: DataInfo, head: str) -> PretrainedConfig:
    from transformers import AutoConfig

    changes = dict(settings.config)
    if head.endswith("classification"):
        changes.setdefault("num_labels", info.outputs)
    fresh = settings.path is None or not settings.pretrained
    if info.pad is not None and changes.setdefault("pad_token_id", info.pad) != info.pad:
        raise UsageError(
            f"model.config.pad_token_id {changes['pad_token_id']} is not the tokenizer's, {info.pad}; leave it out"
        )
    vocabulary = _vocabulary_of(info)
    if fresh and vocabulary is not None:
        changes.setdefault("vocab_size", vocabulary)
    if fresh and info.form == "image":
        changes.setdefault("image_size", info.shape[-1])
        changes.setdefault("num_channels", info.shape[0])
    try:
        if settings.path is not None:
            config: PretrainedConfig = AutoConfig.from_pretrained(settings.path, **changes)
        else:
            config = AutoConfig.for_model(settings.type or "", **changes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"model: config of {settings.path or settings.type!r}: {_line(error)}") from None
    known = type(config)()
    for key in settings.config:
        if not hasattr(known, key) and key != "attn_implementation":
            raise UsageError(
                f"model.config.{key} is no setting of a {config.model_type}{did_you_mean(key, known.to_dict())}"
            )
    return config


def _vocabulary_of(info: DataInfo) -> int | None:
    return info.outputs if info.form in {"tokens", "masked_tokens"} else info.vocabulary


def _check_vocabulary(model: nn.Module, info: DataInfo) -> None:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    vocabulary = _vocabulary_of(info)
    if vocabulary is not None and isinstance(size, int) and size < vocabulary:
        raise UsageError(
            f"the data have {vocabulary} tokens and the model {size}; give data.tokenizer the model's own, or "
            "model.config.vocab_size"
        )


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]


def sample_inputs(info: DataInfo) -> dict[str, Tensor]:
    """A micro-batch of two made-up samples by the name of the argument that takes them.

    Raises:
        UsageError: Data of another form than tokens, sentences or images.
    """
    vocabulary = _vocabulary_of(info)
    if vocabulary is not None:
        ids = torch.arange(2 * info.shape[0]).reshape(2, -1) % vocabulary
        return {"input_ids": ids} | (
            {"attention_mask": torch.ones_like(ids, dtype=torch.bool)} if info.form == "sentences" else {}
        )
    if info.form == "image":
        return {"pixel_values": torch.linspace(-1, 1, 2 * torch.Size(info.shape).numel()).reshape(2, *info.shape)}
    raise UsageError(
        f"model.kind huggingface takes tokens, sentences or images, not data of form {info.form!r}; split it yourself"
    )


def build_from_transformers(settings: HuggingFaceModel, info: DataInfo) -> nn.Sequential:
    """The layers of the model of a run.

    Raises:
        UsageError: As `load_transformers` and `split_transformers`.
    """
    return split_of_run(settings, load_transformers(settings, info), info).layers


def split_of_run(settings: HuggingFaceModel, model: PreTrainedModel, info: DataInfo) -> Split:
    """Split the model of a run.

    Raises:
        UsageError: As `split_transformers`.
    """
    stored = settings.path if settings.meta and settings.pretrained else None
    if stored is not None and not Path(stored).is_dir():
        raise UsageError(f"model.path: with model.meta {stored} must be a folder with safetensors files")
    return split_transformers(model, sample_inputs(info), stored)
