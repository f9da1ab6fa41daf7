"""Loads weight files: reads tensors safely, renames keys, and detects the image normalisation."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastuda.errors import UserError
from fastuda.models.normalization import CAFFE, INPUTS, Normalization
from fastuda.models.weight_keys import remap, unwrap

if TYPE_CHECKING:
    from fastuda.models.segmentor import Segmentor


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a .pth/.pt or .safetensors file, without unpickling anything else.

    Raises:
        UserError: the file is missing, unreadable, holds code, or no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: object = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message continues with advice to disable this protection
        held = re.search(r"GLOBAL (\S+)", str(error))
        if held is None:
            raise UserError(f"{path} cannot be read as weights: torch.save did not write it") from error
        raise UserError(f"{path} was rejected: it contains more than tensors ({held[1]})") from error
    except Exception as error:
        reason = " ".join(str(error).split()) if path.stat().st_size else "it is empty"
        raise UserError(f"{path} cannot be read as weights: {reason}") from error
    if isinstance(state, Mapping) and {"method", "optimizers"} <= set(state):
        raise UserError(f"{path} is a training checkpoint; give the run's model.safetensors")
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors")
    if isinstance(state.get("feature_extractor"), Mapping) and isinstance(state.get("classifier"), Mapping):
        tensors = _of_two_parts(state["feature_extractor"], state["classifier"])
    else:
        tensors = _tensors(_inner(state))
    if not tensors:
        inner = [str(key) for key, value in state.items() if isinstance(value, Mapping) and _tensors(value)]
        if inner:
            raise UserError(
                f"{path} contains several networks ({_few(inner)}): save the state of one of them"
            )
        raise UserError(f"{path} holds no tensors; is it a weights file?")
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


STATES = ("state_dict", "model", "model_state_dict", "teacher", "state_dict_ema", "net", "network")
"""Keys under which training scripts store a network's state; the first one present is used."""


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(key): value for key, value in state.items() if isinstance(value, Tensor)}


def _inner(state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Find the dictionary with the network's tensors: the given one, a value named in :data:`STATES`, or
    its only inner dictionary."""
    for key in STATES:
        if isinstance(state.get(key), Mapping):
            return _inner(state[key])
    within = [value for value in state.values() if isinstance(value, Mapping) and _tensors(value)]
    return within[0] if len(within) == 1 and not _tensors(state) else state


def _of_two_parts(backbone: Mapping[Any, Any], head: Mapping[Any, Any]) -> dict[str, Tensor]:
    """FADA's checkpoints: the backbone's tensors, and the head's ``conv2d_list``."""
    out = {f"backbone.{key.removeprefix('backbone.')}": v for key, v in unwrap(_tensors(backbone)).items()}
    for key, value in unwrap(_tensors(head)).items():
        out[f"head.convs.{key.removeprefix('conv2d_list.')}"] = value
    return out


@dataclass(frozen=True)
class WeightsReport:
    """What was loaded from a weights file."""

    path: str
    layout: str
    """Layout of the keys: fastuda, torchvision, caffe, timm, segformer, segformer-hf, segformer-mmseg or
    dinov2."""
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    """Keys of the network that the file lacks; they start from scratch."""
    unexpected: tuple[str, ...]
    """Keys of the file that the network lacks or has in another shape; they are not used."""
    input: Normalization
    """Normalisation of images for these weights."""

    def __str__(self) -> str:
        return (
            f"weights {self.path} ({self.layout} layout): {len(self.matched)} keys matched,"
            f" from scratch: {_few(self.missing) or 'none'}, unused: {_few(self.unexpected) or 'none'}"
        )


def load_weights(
    model: Segmentor, path: str | Path, *, caffe: bool = False, input: str | None = None
) -> WeightsReport:
    """Load a weights file into the model.

    The backbone must be complete, except for modules that such files never contain (VGG16's fc6 and fc7). The
    head is loaded completely or not at all: if the file has another number of classes, the head starts from
    scratch. A report is logged.

    Args:
        model: the network.
        path: .pth or .safetensors.
        caffe: whether the ResNet is in the Caffe style, which implies Caffe's image format.
        input: a name in ``INPUTS`` that overrides the format detected from the layout.

    Raises:
        UserError: the file is unreadable, for another backbone or style, or has only a part of the head.
    """
    log = logging.getLogger("fastuda")
    given = read_state(path)
    stored = _stored_input(path)
    state, layout = remap(given) if stored is None else (given, "fastuda")
    style = getattr(model.backbone, "caffe", None)
    if layout == "caffe" and style is False:
        raise UserError(
            f"{path} is for a Caffe-style ResNet (stride in the first 1x1, ceil_mode): set model.caffe=true"
        )
    if layout == "torchvision" and style and not input:
        log.warning(
            "%s: its keys fit torchvision's ResNets and Caffe-style ones alike, and model.caffe is on: images"
            " go in as BGR in 0..255. If the file is torchvision's, set model.caffe=false",
            path,
        )
    own = model.state_dict()
    matched = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    wrong = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    fresh = tuple(f"backbone.{part}." for part in getattr(model.backbone, "fresh", ()))
    missing = [key for key in own if key not in matched and not key.endswith("num_batches_tracked")]
    lost = [key for key in missing if key.startswith("backbone.") and not key.startswith(fresh or ("\0",))]
    if lost:
        shapes = f"; of another shape: {', '.join(wrong[:3])}" if wrong else ""
        raise UserError(
            f"{path} does not fit this backbone: {len(lost)} of its keys are missing"
            f" (first: {', '.join(lost[:3])}{shapes}), the file has {_few(list(given), 3)};"
            " choose the --backbone that the file was made for"
        )
    unexpected = [key for key in state if key not in own] + wrong
    _check_head(model, path, layout, set(matched), missing, unexpected)
    model.load_state_dict(matched, strict=False)
    expects = INPUTS[input] if input else stored or _input_of(model, layout, caffe)
    report = WeightsReport(str(path), layout, tuple(matched), tuple(missing), tuple(unexpected), expects)
    log.info("%s", report)
    return report


def _check_head(
    model: Segmentor,
    path: str | Path,
    layout: str,
    matched: set[str],
    missing: list[str],
    unexpected: list[str],
) -> None:
    log = logging.getLogger("fastuda")
    loaded = [key for key in matched if key.startswith("head.")]
    left = [key for key in unexpected if key.startswith("head.")]
    lacking = [key for key in missing if key.startswith("head.")]
    branches = len(getattr(model.head, "convs", ()))
    # published files have unused branches (see ASPP); any other unused key changes the result
    extra = [key for key in left if not (match := re.match(r"head\.convs\.(\d+)", key))
             or int(match[1]) < branches]  # fmt: skip
    if loaded and (lacking or extra):
        what = f"lacks {_few(lacking)}" if lacking else f"has {_few(extra)} besides"
        raise UserError(
            f"{path} fits only a part of the head: it {what};"
            " set model.aspp_branches and model.aspp_bias as the file was trained"
        )
    if left and not loaded:
        log.warning("%s: its head (%s) is of another shape; the head starts from scratch", path, _few(left))
    if loaded and layout == "caffe" and branches == 4:
        log.warning(
            "%s: files of AdaptSegNet's family hold four branches and trained two;"
            " set model.aspp_branches=2 if this is one",
            path,
        )


def _stored_input(path: str | Path) -> Normalization | None:
    """The input format in a safetensors file of this package."""
    if Path(path).suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = (file.metadata() or {}).get("fastuda")
    if about is None:
        return None
    stored = json.loads(about)["input"]
    return Normalization.of(stored)


def _input_of(model: Segmentor, layout: str, caffe: bool) -> Normalization:
    if layout == "caffe" or (caffe and hasattr(model.backbone, "caffe")):
        return CAFFE
    return INPUTS[getattr(model.backbone, "input", "imagenet")]


def _few(keys: Sequence[str], count: int = 4) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")
