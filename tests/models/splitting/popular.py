"""The 30 most used models, each split by `dpp.split` in one line: `python -m tests.models.splitting.popular`.

Writes docs/popular-models.md, or prints the rows of the models that are named. Small sizes and few blocks where the
library lets one choose, fresh weights.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

PAGE = Path(__file__).parents[3] / "docs" / "popular-models.md"
HEAD = """# The 30 most used models, split in one line

`dpp.split(model, sample, 4)` of each, with the way that it took and the seconds (on two busy CPU cores), the comparison
with the model in one piece included, bit for bit in evaluation and in training. Small sizes and few blocks where the
library lets one choose, fresh weights. Written by `python -m tests.models.splitting.popular`; a test tries each again.

| library | model | way | layers | seconds |
| --- | --- | --- | --- | --- |
"""
TOKENS = {"input_ids": torch.arange(24).reshape(2, 12) % 64}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4}
SPEECH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
SPEECH |= {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
SPEECH |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 32}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8}


class Words(nn.Module):
    """A stack of torch.nn between an embedding and a projection."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.embedding, self.stack, self.head = nn.Embedding(64, 32), stack, nn.Linear(32, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.stack(self.embedding(ids), src_key_padding_mask=ids == 0))


class Translator(nn.Module):
    """nn.Transformer between embeddings and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.transformer = nn.Transformer(32, 4, 4, 4, 64, batch_first=True)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.head(self.transformer(self.embedding(source), self.embedding(target)))


def images(size: int) -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * size * size).reshape(2, 3, size, size)


def of_transformers(name: str, sizes: dict, sample: object = None):
    def make():
        import transformers

        kind = getattr(transformers, name)
        return kind(kind.config_class(**sizes))

    return "transformers", name, make, TOKENS if sample is None else sample


def of_torchvision(name: str, size: int = 64, **options):
    def make():
        from torchvision import models

        place = models.segmentation if name.startswith("fcn") else models
        return getattr(place, name)(
            weights=None, **({"weights_backbone": None} if name.startswith("fcn") else {}), **options
        )

    return "torchvision", name, make, images(size)


def of_timm(name: str, size: int = 224, **options):
    def make():
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return "timm", name, make, images(size)


def of_torch(name: str, make, sample: object):
    return "torch.nn", name, make, sample


def encoder(layers: int = 4) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), layers)


WAVE = torch.linspace(-1, 1, 2 * 400).reshape(2, 400)
MODELS = [
    of_transformers("BertForMaskedLM", SIZES),
    of_transformers("RobertaForSequenceClassification", SIZES),
    of_transformers(
        "DistilBertForMaskedLM", {"vocab_size": 64, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64}
    ),
    of_transformers("GPT2LMHeadModel", GPT2),
    of_transformers("LlamaForCausalLM", SIZES),
    of_transformers("MistralForCausalLM", SIZES | {"num_key_value_heads": 2}),
    of_transformers("Qwen2ForCausalLM", SIZES | {"num_key_value_heads": 2}),
    of_transformers("T5EncoderModel", T5),
    of_transformers("ViTForImageClassification", VISION, {"pixel_values": images(32)}),
    of_transformers("CLIPVisionModelWithProjection", VISION | {"projection_dim": 16}, {"pixel_values": images(32)}),
    of_transformers("CLIPTextModelWithProjection", SIZES | {"projection_dim": 16}),
    of_transformers("Wav2Vec2ForCTC", SPEECH, {"input_values": WAVE}),
    of_torchvision("resnet18"),
    of_torchvision("resnet50"),
    of_torchvision("vgg16", 32),
    of_torchvision("densenet121"),
    of_torchvision("mobilenet_v3_large"),
    of_torchvision("efficientnet_b0"),
    of_torchvision("convnext_tiny"),
    of_torchvision("vit_b_16", 32, image_size=32),
    of_torchvision("swin_t"),
    of_torchvision("fcn_resnet50"),
    of_timm("vit_tiny_patch16_224"),
    of_timm("resnet18", 64),
    of_timm("convnext_atto", 64),
    of_timm("efficientnet_lite0", 64),
    of_timm("mixer_s32_224"),
    of_torch("TransformerEncoder", lambda: Words(encoder()), (torch.arange(24).reshape(2, 12) % 64,)),
    of_torch("Transformer", Translator, (torch.arange(24).reshape(2, 12), torch.arange(16).reshape(2, 8))),
    of_torch(
        "Sequential",
        lambda: nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)]),
        torch.ones(2, 8),
    ),
]


def allow_torchvision_without_operators() -> None:
    """Declare what torchvision extends at import; its build may be of another torch, and no network here needs it."""
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def row(library: str, name: str, make, sample: object) -> str:
    """Split one model and say how; its layers were compared with it by then."""
    import decoupled_pp as dpp

    torch.manual_seed(0)
    model = make()
    start = time.perf_counter()
    found = dpp.split(model, sample, 4)
    seconds = time.perf_counter() - start
    return f"| {library} | `{name}` | {found.way} | {len(found.layers)} | {seconds:.1f} |"


def main() -> None:
    """Write the table."""
    warnings.simplefilter("ignore")
    allow_torchvision_without_operators()
    wanted = sys.argv[1:]
    rows = []
    for library, name, make, sample in MODELS:
        if wanted and name not in wanted and library not in wanted:
            continue
        rows.append(row(library, name, make, sample))
        sys.stdout.write(f"{rows[-1]}\n")
        sys.stdout.flush()
    if not wanted:
        PAGE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
