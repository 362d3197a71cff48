"""Small models of many families, and the table of those that pass: `python -m tests.models.splitting.families`."""

from __future__ import annotations

from pathlib import Path

import torch

TABLE = Path(__file__).parents[3] / "docs" / "model-families.md"
V, T, B = 96, 12, 2
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {
    "vocab_size": V,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
IMAGE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
IMAGE |= {"image_size": 32, "patch_size": 8}
TOKENS, IMAGES = "tokens", "images"

FAMILIES = {
    "GPT-2": ("GPT2LMHeadModel", GPT2, TOKENS),
    "GPT-2, classifier": ("GPT2ForSequenceClassification", GPT2 | {"pad_token_id": 0}, TOKENS),
    "Llama": ("LlamaForCausalLM", GROUPED, TOKENS),
    "Qwen3": ("Qwen3ForCausalLM", GROUPED | {"head_dim": 8}, TOKENS),
    "Mistral": ("MistralForCausalLM", GROUPED | {"sliding_window": 4}, TOKENS),
    "Gemma": ("GemmaForCausalLM", GROUPED | {"head_dim": 8, "pad_token_id": 0}, TOKENS),
    "Gemma 2": ("Gemma2ForCausalLM", GROUPED | {"head_dim": 8, "sliding_window": 4}, TOKENS),
    "Gemma 3": (
        "Gemma3ForCausalLM",
        GROUPED
        | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2},
        TOKENS,
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", SIZES, TOKENS),
    "OPT": (
        "OPTForCausalLM",
        {"vocab_size": V, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        | {"word_embed_proj_dim": 32},
        TOKENS,
    ),
    "Phi": ("PhiForCausalLM", SIZES, TOKENS),
    "Falcon": (
        "FalconForCausalLM",
        {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
        TOKENS,
    ),
    "BLOOM": ("BloomForCausalLM", {"vocab_size": V, "hidden_size": 32, "n_layer": 4, "n_head": 4}, TOKENS),
    "Mixtral, mixture of experts": ("MixtralForCausalLM", GROUPED | {"num_local_experts": 4}, TOKENS),
    "Qwen3, mixture of experts": (
        "Qwen3MoeForCausalLM",
        GROUPED | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        TOKENS,
    ),
    "Mamba": (
        "MambaForCausalLM",
        {"vocab_size": V, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 4},
        "tokens without mask",
    ),
    "BERT": ("BertForMaskedLM", SIZES, TOKENS),
    "BERT, classifier": ("BertForSequenceClassification", SIZES, TOKENS),
    "RoBERTa": ("RobertaForMaskedLM", SIZES | {"max_position_embeddings": 64}, TOKENS),
    "DistilBERT": (
        "DistilBertForMaskedLM",
        {"vocab_size": V, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64},
        TOKENS,
    ),
    "ELECTRA, classifier": ("ElectraForSequenceClassification", SIZES | {"embedding_size": 16}, TOKENS),
    "MPNet": ("MPNetForMaskedLM", SIZES | {"max_position_embeddings": 64}, TOKENS),
    "DeBERTa v2, classifier": (
        "DebertaV2ForSequenceClassification",
        SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        TOKENS,
    ),
    "ModernBERT": (
        "ModernBertForMaskedLM",
        SIZES | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
        TOKENS,
    ),
    "T5 encoder": (
        "T5EncoderModel",
        {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4},
        TOKENS,
    ),
    "ViT": ("ViTForImageClassification", IMAGE, IMAGES),
    "DeiT": ("DeiTForImageClassification", IMAGE, IMAGES),
    "DINOv2": (
        "Dinov2ForImageClassification",
        {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
        IMAGES,
    ),
    "Swin": (
        "SwinForImageClassification",
        {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "image_size": 32, "patch_size": 4, "window_size": 4},
        IMAGES,
    ),
    "ResNet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [2, 2, 2, 2], "layer_type": "basic"},
        IMAGES,
    ),
}
"""Name -> (class of `transformers`, its config, what it takes)."""

FURTHER = {
    "Qwen2": ("Qwen2ForCausalLM", GROUPED, TOKENS),
    "Phi 3": ("Phi3ForCausalLM", GROUPED | {"pad_token_id": 0}, TOKENS),
    "OLMo 2": ("Olmo2ForCausalLM", GROUPED | {"pad_token_id": 0}, TOKENS),
    "StableLM": ("StableLmForCausalLM", GROUPED, TOKENS),
    "Cohere": ("CohereForCausalLM", GROUPED | {"pad_token_id": 0}, TOKENS),
    "GPT-J": ("GPTJForCausalLM", GPT2 | {"rotary_dim": 4}, TOKENS),
    "GPT BigCode": ("GPTBigCodeForCausalLM", GPT2, TOKENS),
    "Granite": ("GraniteForCausalLM", GROUPED, TOKENS),
    "Starcoder 2": ("Starcoder2ForCausalLM", GROUPED, TOKENS),
    "SmolLM 3": ("SmolLM3ForCausalLM", GROUPED | {"pad_token_id": 0}, TOKENS),
    "XLM-RoBERTa": ("XLMRobertaForMaskedLM", SIZES | {"max_position_embeddings": 64}, TOKENS),
    "CamemBERT": ("CamembertForTokenClassification", SIZES | {"max_position_embeddings": 64}, TOKENS),
    "ConvBERT": ("ConvBertForMaskedLM", SIZES | {"embedding_size": 32}, TOKENS),
    "RemBERT": ("RemBertForMaskedLM", SIZES | {"input_embedding_size": 16, "output_embedding_size": 16}, TOKENS),
    "RoFormer": ("RoFormerForMaskedLM", SIZES, TOKENS),
    "ESM": (
        "EsmForMaskedLM",
        SIZES | {"pad_token_id": 0, "mask_token_id": 2, "position_embedding_type": "rotary"},
        TOKENS,
    ),
    "CLIP, text": (
        "CLIPTextModelWithProjection",
        SIZES | {"projection_dim": 16, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2},
        TOKENS,
    ),
    "CLIP, vision": ("CLIPVisionModelWithProjection", IMAGE | {"projection_dim": 16}, IMAGES),
    "SigLIP, vision": ("SiglipVisionModel", IMAGE, IMAGES),
    "SigLIP, text": ("SiglipTextModel", SIZES | {"max_position_embeddings": 64, "projection_size": 32}, TOKENS),
    "BEiT": ("BeitForImageClassification", IMAGE, IMAGES),
    "ViT MSN": ("ViTMSNForImageClassification", IMAGE, IMAGES),
    "DINOv2 with registers": (
        "Dinov2WithRegistersForImageClassification",
        {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
        IMAGES,
    ),
    "ConvNeXt": ("ConvNextForImageClassification", {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 2, 1]}, IMAGES),
    "Swin v2": (
        "Swinv2ForImageClassification",
        {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "image_size": 32, "patch_size": 4, "window_size": 4},
        IMAGES,
    ),
    "MobileNet v2": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.35, "image_size": 32}, IMAGES),
    "RWKV": (
        "RwkvForCausalLM",
        {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 4, "context_length": 32},
        "tokens without mask",
    ),
    "Mamba 2": (
        "Mamba2ForCausalLM",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "state_size": 4,
            "num_hidden_layers": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
        },
        "tokens without mask",
    ),
    "XLNet": (
        "XLNetForSequenceClassification",
        {"vocab_size": V, "d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 64},
        TOKENS,
    ),
}
"""Families whose blocks are called much as others' are: their tests are slow ones."""
FAMILIES |= FURTHER


def model_of(family):
    """A fresh model of a family."""
    import transformers

    name, config, _ = FAMILIES[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**config)).eval()


def inputs_of(family, batch=B, length=T, padding=True):
    """A micro-batch by argument name."""
    kind = FAMILIES[family][2]
    if kind == IMAGES:
        return {"pixel_values": torch.randn(batch, 3, 32, 32)}
    ids = torch.randint(3, V, (batch, length))
    mask = torch.ones_like(ids)
    if padding:
        mask[-1, length // 2 :] = 0
        ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask} if kind == TOKENS else {"input_ids": ids}


def table():
    """The page of families that pass; each is checked by `test_transformers.py`."""
    from decoupled_pp.models.huggingface import split_transformers

    lines = [
        "# Model families that pass",
        "",
        "Each is split at its blocks by one general mechanism, without an adapter, and checked with small fresh",
        "weights against the model in one piece: output bit for bit for three shapes of input, padding included, and",
        "the weights after one training step. Written by `python -m tests.models.splitting.families`; a test holds it",
        "to what the checks run.",
        "",
        "| family | class | blocks | beside the hidden state travel | untied |",
        "| --- | --- | --- | --- | --- |",
    ]
    for family, (name, _, _) in FAMILIES.items():
        inputs = inputs_of(family)
        found = split_transformers(model_of(family), inputs)
        given = tuple(inputs.values()) if len(inputs) > 1 else next(iter(inputs.values()))
        with torch.no_grad():
            payload = found.layers[0](given)
        sides = len(payload) - 1 - len(inputs)
        lines.append(
            f"| {family} | `{name}` | {len(found.layers) - 2} | {sides} tensors, {len(inputs)} inputs | "
            f"{', '.join(f'`{one}`' for one in found.untied) or '-'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
