"""Networks of Hugging Face's transformers: backbones and whole segmentation models, by folder or name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastuda.errors import UserError
from fastuda.models.foreign import ForeignBackbone, Geometry, listed, size_of, survey
from fastuda.models.hf_folder import PREFIX, hushed, local_first, reason_of, transformers_for
from fastuda.models.mask_tokens import token_masks_of

WEIGHTS = ("*.safetensors", "*.bin")
SLOW_TO_TRACE = ("swin", "swinv2", "maskformer-swin")
"""Families with padded, shifted windows, for which torch.export takes too long to be useful."""
RANDOM_POSITIONS = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
"""Settings of DINOv3 that move positions at random in training mode. A teacher's labels would be random."""

log = logging.getLogger("fastuda")


def hf_backbone(described: dict[str, Any], pretrained: bool, quarters: bool, enlarge: float) -> nn.Module:
    """A backbone of transformers' ``AutoBackbone``.

    A network with several resolutions gives the last map of each. A network with a single resolution gives
    its last map, or the maps after each quarter of its blocks.

    Args:
        described: see :func:`~fastuda.models.hf_folder.describe`.
        pretrained: load the weights of the folder.
        quarters: take four maps from a network with a single resolution.
        enlarge: see :class:`~fastuda.models.foreign.ForeignBackbone`.

    Raises:
        UserError: the family is no backbone, needs a package, or gives no feature map.
    """
    spec = described["spec"]
    transformers = transformers_for(spec)
    config = _config(transformers, described)
    family = transformers.models.auto.modeling_auto.MODEL_FOR_BACKBONE_MAPPING
    if type(config) not in family:
        whole = type(config) in transformers.models.auto.modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING
        hint = f"; it is a whole segmentation model: --model {spec}" if whole else ""
        raise UserError(f"{spec} is a {config.model_type}, which transformers has no backbone of{hint}")
    if not hasattr(config, "stage_names"):
        raise UserError(f"{spec} wraps another library's network: give that by package.module:function")
    for key in ("apply_layernorm", "reshape_hidden_states"):
        if hasattr(config, key):
            setattr(config, key, True)
    for key in RANDOM_POSITIONS:
        if hasattr(config, key):
            setattr(config, key, None)
    stages = [name for name in config.stage_names if name != "stem"]
    config.out_features = stages
    cls = family[type(config)]
    geometry = _survey(cls, config, spec)
    chosen = [i for i, s in enumerate(geometry.strides) if s not in geometry.strides[i + 1 :]]
    if len(chosen) == 1 and quarters:
        chosen = sorted({-(-len(stages) * part // 4) - 1 for part in (1, 2, 3, 4)})
    config.out_features = [stages[i] for i in chosen]
    built = _build(cls, config, spec, pretrained)
    backbone = ForeignBackbone(built, listed, geometry.of(chosen), enlarge)
    backbone.token_masks = token_masks_of(built)
    return backbone


def no_export(network: nn.Module) -> str:
    """Why torch.export is not tried on a network of transformers; the empty string if it is."""
    config = getattr(network, "config", None)
    kinds = [getattr(c, "model_type", "") for c in (config, getattr(config, "backbone_config", None))]
    slow = next((kind for kind in kinds if kind in SLOW_TO_TRACE), None)
    return (
        f"torch.export does not finish on the shifted windows of {slow} for images of any size"
        if slow
        else ""
    )


def _survey(cls: Any, config: Any, spec: str) -> Geometry:
    """The geometry of a network's maps, measured on the meta device, or with random weights if that fails.

    Raises:
        UserError: the network needs a package, or gives no feature map.
    """
    size = size_of(config)
    try:
        with torch.device("meta"), hushed():
            return survey(cls(config), listed, spec, size)
    except Exception as error:
        if isinstance(error, ImportError):
            raise UserError(reason_of(spec, error)) from error
    with hushed():
        return survey(cls(config), listed, spec, size)


def hf_model(described: dict[str, Any], num_classes: int, pretrained: bool) -> Any:
    """A whole ``AutoModelForSemanticSegmentation`` of ``num_classes`` classes.

    Raises:
        UserError: transformers has no such model of the family, or it needs a package.
    """
    spec = described["spec"]
    transformers = transformers_for(spec)
    config = _config(transformers, described)
    auto = transformers.models.auto.modeling_auto
    family = auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING
    if type(config) not in family:
        backbone = type(config) in auto.MODEL_FOR_BACKBONE_MAPPING
        hint = f"; it is a backbone: --backbone {spec}" if backbone else ""
        raise UserError(f"{spec} is a {config.model_type}, which has no model of semantic segmentation{hint}")
    config.num_labels = num_classes
    if hasattr(config, "use_auxiliary_head"):
        config.use_auxiliary_head = False
    return _build(family[type(config)], config, spec, pretrained)


def has_weights(spec: str) -> bool:
    """Whether there are weights in the folder of ``hf:PATH``; True for a name on the hub."""
    folder = Path(spec.removeprefix(PREFIX))
    return not folder.is_dir() or any(path for kind in WEIGHTS for path in folder.glob(kind))


def _build(cls: Any, config: Any, spec: str, pretrained: bool) -> nn.Module:
    """The network with the folder's weights, or with random ones.

    Raises:
        UserError: a file cannot be read, or holds none of the network's weights.
    """
    name = spec.removeprefix(PREFIX)
    missing = not has_weights(spec)
    if pretrained and missing:
        log.warning("%s has no weights (model.safetensors): it starts from scratch", spec)
    try:
        with hushed():
            if not pretrained or missing:
                return cls(config)
            load = dict(
                config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
            network, info = local_first(lambda **how: cls.from_pretrained(name, **load, **how), name)
    except Exception as error:
        raise UserError(reason_of(spec, error)) from error
    fresh = sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])})
    total = len(network.state_dict())
    if len(fresh) >= total:
        raise UserError(f"the weights of {spec} are of another network: none of its {total} keys is there")
    unused = sorted(info["unexpected_keys"])
    log.info(
        "weights %s: %d of %d keys loaded, from scratch: %s, unused: %s",
        spec, total - len(fresh), total, _few(fresh), _few(unused),
    )  # fmt: skip
    return network


def _config(transformers: Any, described: dict[str, Any]) -> Any:
    values = {key: value for key, value in described["config"].items() if key != "num_labels"}
    try:
        return transformers.AutoConfig.for_model(**values)
    except Exception as error:
        raise UserError(reason_of(described["spec"], error)) from error


def _few(keys: Sequence[str], count: int = 4) -> str:
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more if keys else "none"
