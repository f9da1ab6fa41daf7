"""Tiny networks of Hugging Face's transformers in folders, for the tests of what takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

TINY_VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
TINY_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 48]}
TINY_SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 4}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("Dinov2", {**TINY_VIT, "image_size": 70, "patch_size": 14}),
    "dinov2 with registers": ("Dinov2WithRegisters", {**TINY_VIT, "image_size": 70, "patch_size": 14}),
    "dinov3": ("DINOv3ViT", {**TINY_VIT, "intermediate_size": 64}),
    "beit": ("Beit", {**TINY_VIT, "intermediate_size": 64, "image_size": 64, "patch_size": 16}),
    "swin": ("Swin", TINY_SWIN),
    "convnextv2": ("ConvNextV2", TINY_STAGES),
    "resnet": ("ResNet", {**TINY_STAGES, "embedding_size": 16, "layer_type": "basic"}),
    "pvt_v2": (
        "PvtV2",
        {"hidden_sizes": [16, 16, 32, 32], "depths": [1] * 4, "num_attention_heads": [1] * 4},
    ),
    "hiera": ("Hiera", {"image_size": [64, 64], "embed_dim": 16, "depths": [1] * 4, "num_heads": [1] * 4}),
}  # fmt: skip
"""Name of a backbone's class before ``Config`` and ``Backbone``, and a tiny configuration."""


def saved_backbone(folder: Path, name: str, **settings: Any) -> str:
    """``hf:`` and a folder with a tiny backbone of random weights."""
    transformers = pytest.importorskip("transformers")
    family, tiny = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**tiny, **settings})
    getattr(transformers, f"{family}Backbone")(config).save_pretrained(folder)
    return f"hf:{folder}"


def saved_model(
    folder: Path, family: str = "Segformer", classes: int = 5, names: Sequence[str] | None = None
) -> str:
    """``hf:`` and a folder with a tiny whole model of random weights, of ``classes`` or of the ``names``."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    classes = len(names or range(classes))
    if family == "Segformer":
        tiny: dict[str, Any] = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
        config = transformers.SegformerConfig(**tiny, decoder_hidden_size=32, num_labels=classes)
    elif family == "DPT":
        config = transformers.DPTConfig(
            **{**TINY_VIT, "num_hidden_layers": 4}, intermediate_size=64, image_size=64, patch_size=16,
            backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 16, 16, 16], fusion_hidden_size=16,
            num_labels=classes, use_auxiliary_head=True,
        )  # fmt: skip
    else:
        inner = transformers.ConvNextConfig(
            **TINY_STAGES, out_features=["stage1", "stage2", "stage3", "stage4"]
        )
        config = transformers.UperNetConfig(
            backbone_config=inner, hidden_size=16, auxiliary_channels=16, auxiliary_in_channels=32,
            num_labels=classes,
        )  # fmt: skip
    if names is not None:
        config.id2label = dict(enumerate(names))
    getattr(transformers, f"{family}ForSemanticSegmentation")(config).save_pretrained(folder)
    return f"hf:{folder}"


def normalizing(folder: Path, **values: Any) -> None:
    """A ``preprocessor_config.json`` in the folder."""
    (folder / "preprocessor_config.json").write_text(json.dumps(values), encoding="utf-8")
