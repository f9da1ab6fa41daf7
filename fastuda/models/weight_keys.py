"""Key layouts of published weight files, and their translation into this package's names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

CLASSIFIERS = ("fc.", "classifier.", "head.fc.", "head.weight", "head.bias")
"""ImageNet classifiers, which segmentors do not use."""


WRAPPERS = re.compile(r"(?:(?:module|_orig_mod|model|net|network)\.)+")
"""Key prefixes of wrappers: DDP, torch.compile, Lightning."""
ENCODERS = re.compile(r"(?:(?:backbone|encoder|segformer|Scale)\.)+")
"""Key prefixes of a segmentor's backbone."""


def unwrap(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes :data:`WRAPPERS` from the keys."""
    return {WRAPPERS.sub("", key, count=1) if WRAPPERS.match(key) else key: state[key] for key in state}


def remap(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Rename keys to this package's names (``backbone.*``, ``head.*``), and return their original layout.

    Known layouts: ``fastuda`` (our own), ``torchvision`` (``layer1.*``, ``features.*``), ``caffe`` (DeepLab:
    ``Scale.layer1.*``, ``layer5.conv2d_list.*``; AdaptSegNet: ``layer6.*`` is the head, and the auxiliary
    head ``layer5.*`` on layer3 is left out), ``timm`` (MobileNetV2 and EfficientNet: ``conv_stem.*``,
    ``blocks.*``), ``segformer`` (NVlabs' ``patch_embed1.*``, ``block1.*``), ``segformer-hf`` (Hugging Face's
    ``segformer.encoder.*``, and ``segformer.stages.*`` since transformers 5), ``segformer-mmseg``
    (mmsegmentation's ``layers.0.0.projection.*``) and ``dinov2`` (the hub's ``blocks.0.attn.qkv.*``, in
    transformers' names, for a backbone of ``hf:``). The prefixes :data:`WRAPPERS` and :data:`ENCODERS`
    are dropped.
    """
    plain = unwrap(state)
    if any(key.startswith("head.") for key in plain) and any(key.startswith("backbone.") for key in plain):
        return plain, "fastuda"
    caffe = any(key.startswith("Scale.") for key in plain)
    plain = {key[match.end() :] if (match := ENCODERS.match(key)) else key: plain[key] for key in plain}
    if any(key.startswith("patch_embed1.") for key in plain):
        return _backbone(_segformer(plain)), "segformer"
    if any(key.startswith(("patch_embeddings.", "stages.0.patch_embeddings.")) for key in plain):
        return _backbone(_segformer_hf(plain)), "segformer-hf"
    if any(key.startswith("layers.0.0.projection.") for key in plain):
        return _backbone(_segformer_mmseg(plain)), "segformer-mmseg"
    if "blocks.0.attn.qkv.weight" in plain and "mask_token" in plain:
        return {f"backbone.network.{key}": value for key, value in _dinov2(plain).items()}, "dinov2"
    if any(key.startswith("conv_stem.") for key in plain):
        return _backbone(_timm(plain)), "timm"
    caffe = caffe or any(key.startswith(("layer5.", "layer6.")) for key in plain)
    head = "layer6." if any(key.startswith("layer6.") for key in plain) else "layer5."
    out = {}
    for key, value in plain.items():
        if key.startswith(head):
            out["head.convs." + key.removeprefix(head).removeprefix("conv2d_list.")] = value
        elif not key.startswith(("layer5.", *CLASSIFIERS)):
            out["backbone." + key] = value
    return out, "caffe" if caffe else "torchvision"


def _backbone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"backbone." + key: value for key, value in state.items() if not key.startswith(CLASSIFIERS)}


def _timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename timm's inverted residuals to torchvision's numbering: one run of ``features.N``."""
    blocks = {match.groups() for key in state if (match := re.match(r"blocks\.(\d+)\.(\d+)\.", key))}
    order = sorted(blocks, key=lambda pair: (int(pair[0]), int(pair[1])))
    number = {pair: index + 1 for index, pair in enumerate(order)}
    last = len(order) + 1
    plain = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
    plain |= {"conv_head": f"features.{last}.0", "bn2": f"features.{last}.1"}
    expanded = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "2", "bn3": "3"}
    first = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
    out = {}
    for key, value in state.items():
        name, leaf = key.rsplit(".", 1)
        if match := re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(\w+)", name):
            stage, block, part = match.groups()
            names = expanded if f"blocks.{stage}.{block}.conv_pwl.weight" in state else first
            name = f"features.{number[stage, block]}.conv.{names.get(part, part)}"
        out[f"{plain.get(name, name)}.{leaf}"] = value
    return out


_SEGFORMER = (
    (r"patch_embed(\d)\.proj\.", "encoder.stages.{}.patch_embeddings.proj."),
    (r"patch_embed(\d)\.norm\.", "encoder.stages.{}.patch_embeddings.layer_norm."),
    (r"norm(\d)\.", "encoder.stages.{}.layer_norm."),
)
_SEGFORMER_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.q": "attention.q_proj",
    "attn.proj": "attention.o_proj",
    "attn.sr": "attention.sequence_reduction.sequence_reduction",
    "attn.norm": "attention.sequence_reduction.layer_norm",
}


def _segformer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """NVlabs' MiT files: stages counted from 1, keys and values in one matrix."""
    out = {}
    for key, value in state.items():
        if match := re.match(r"block(\d)\.(\d+)\.(.+)\.(\w+)$", key):
            stage, block, part, leaf = match.groups()
            prefix = f"encoder.stages.{int(stage) - 1}.blocks.{block}."
            if part == "attn.kv":
                for name, half in zip(("k_proj", "v_proj"), value.chunk(2), strict=True):
                    out[f"{prefix}attention.{name}.{leaf}"] = half.clone()
            else:
                out[f"{prefix}{_SEGFORMER_BLOCK.get(part, part)}.{leaf}"] = value
            continue
        for pattern, name in _SEGFORMER:
            if match := re.match(pattern, key):
                key = name.format(int(match[1]) - 1) + key[match.end() :]
                break
        out[key] = value
    return out


_HF_BLOCK = {
    "layer_norm_1": "layernorm_before",
    "layer_norm_2": "layernorm_after",
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "attention.self.sr": "attention.sequence_reduction.sequence_reduction",
    "attention.self.layer_norm": "attention.sequence_reduction.layer_norm",
    "mlp.dense1": "mlp.fc1",
    "mlp.dense2": "mlp.fc2",
}


def _segformer_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's published SegFormer files, and those that transformers 5 writes."""
    out = {}
    for key, value in state.items():
        if key.startswith("stages."):
            key = f"encoder.{key}"
        elif match := re.match(r"patch_embeddings\.(\d)\.(.+)", key):
            key = f"encoder.stages.{match[1]}.patch_embeddings.{match[2]}"
        elif match := re.match(r"layer_norm\.(\d)\.(.+)", key):
            key = f"encoder.stages.{match[1]}.layer_norm.{match[2]}"
        elif match := re.match(r"block\.(\d)\.(\d+)\.(.+)\.(\w+)$", key):
            part = _HF_BLOCK.get(match[3], match[3])
            key = f"encoder.stages.{match[1]}.blocks.{match[2]}.{part}.{match[4]}"
        out[key] = value
    return out


_MMSEG = (
    (r"layers\.(\d)\.0\.projection\.", "encoder.stages.{}.patch_embeddings.proj."),
    (r"layers\.(\d)\.0\.norm\.", "encoder.stages.{}.patch_embeddings.layer_norm."),
    (r"layers\.(\d)\.2\.", "encoder.stages.{}.layer_norm."),
)
_MMSEG_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.attn.out_proj": "attention.o_proj",
    "attn.sr": "attention.sequence_reduction.sequence_reduction",
    "attn.norm": "attention.sequence_reduction.layer_norm",
    "ffn.layers.0": "mlp.fc1",
    "ffn.layers.1": "mlp.dwconv.dwconv",
    "ffn.layers.4": "mlp.fc2",
}


def _segformer_mmseg(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmsegmentation's MixVisionTransformer: queries, keys and values in one matrix, linear layers as 1x1
    convolutions."""
    out = {}
    for key, value in state.items():
        if match := re.match(r"layers\.(\d)\.1\.(\d+)\.(.+)$", key):
            prefix = f"encoder.stages.{match[1]}.blocks.{match[2]}."
            part, _, leaf = match[3].rpartition(".")
            if leaf in ("in_proj_weight", "in_proj_bias"):
                for name, third in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                    out[f"{prefix}attention.{name}.{leaf.removeprefix('in_proj_')}"] = third.clone()
                continue
            if part in ("ffn.layers.0", "ffn.layers.4") and leaf == "weight":
                value = value.flatten(1)
            key = f"{prefix}{_MMSEG_BLOCK.get(part, part)}.{leaf}"
        else:
            for pattern, name in _MMSEG:
                if match := re.match(pattern, key):
                    key = name.format(match[1]) + key[match.end() :]
                    break
        out[key] = value
    return out


_DINOV2 = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_DINOV2_BLOCK = {
    "attn.proj": "attention.o_proj",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


def _dinov2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The hub's DINOv2 files: queries, keys and values in one matrix."""
    out = {}
    for key, value in state.items():
        match = re.match(r"blocks\.(\d+)\.(.+)$", key)
        if match is None:
            out[_DINOV2.get(key, key)] = value
            continue
        prefix, part = f"encoder.layer.{match[1]}.", match[2]
        if part.startswith("attn.qkv."):
            leaf = part.removeprefix("attn.qkv.")
            for name, third in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                out[f"{prefix}attention.{name}.{leaf}"] = third.clone()
            continue
        for hub, ours in _DINOV2_BLOCK.items():
            part = part.replace(hub, ours, 1) if part.startswith(hub) else part
        out[prefix + part] = value
    return out
