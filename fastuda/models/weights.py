"""Weight files: where keys come from, what they are called here, and what their images must look like."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastuda.errors import UserError

if TYPE_CHECKING:
    from fastuda.models.segmentor import Segmentor


@dataclass(frozen=True)
class Normalization:
    """What a set of weights expects of an image: ``(x * scale / 255 - mean) / std`` in the channel order
    given."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    channel_order: str = "rgb"
    """rgb or bgr; mean and std are in this order."""
    scale: float = 1.0
    """1 for images in 0..1, 255 for images in 0..255."""

    def apply(self, image: Tensor) -> Tensor:
        """float32 ``[..., 3, H, W]`` from an RGB image in 0..255."""
        x = image.float() * (self.scale / 255.0)
        if self.channel_order == "bgr":
            x = x.flip(-3)
        mean = torch.tensor(self.mean)[:, None, None]
        return x.sub_(mean).div_(torch.tensor(self.std)[:, None, None])

    def invert(self, x: Tensor) -> Tensor:
        """uint8 RGB image of a normalised one, for pictures."""
        x = x.float().cpu() * torch.tensor(self.std)[:, None, None] + torch.tensor(self.mean)[:, None, None]
        if self.channel_order == "bgr":
            x = x.flip(-3)
        return (x * (255.0 / self.scale)).round().clamp(0, 255).to(torch.uint8)


IMAGENET = Normalization()
CAFFE = Normalization((104.00698793, 116.66876762, 122.67891434), (1.0, 1.0, 1.0), "bgr", 255.0)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth/.pt or .safetensors file, unpickling nothing but tensors.

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
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} was refused: it holds more than tensors ({reason})") from error
    except Exception as error:
        raise UserError(f"{path} cannot be read as weights: {error}") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors")
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors; is it a weights file?")
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def remap(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Keys as this package names them, and the layout they came in.

    Known layouts: our own (``backbone.*``, ``head.*``), torchvision (``layer1.*``, ``features.*``),
    Caffe-style DeepLab (``Scale.layer1.*``, ``layer5.conv2d_list.*``) and AdaptSegNet's (``layer6.*`` for the
    head; its auxiliary head ``layer5.*`` on layer3 is left out then). ``module.`` in front is dropped.
    """
    plain = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("head.") for key in plain) and any(key.startswith("backbone.") for key in plain):
        return plain, "fastuda"
    caffe = any(key.startswith(("Scale.", "layer5.", "layer6.")) for key in plain)
    plain = {key.removeprefix("Scale.").removeprefix("backbone."): value for key, value in plain.items()}
    head = "layer6." if any(key.startswith("layer6.") for key in plain) else "layer5."
    out = {}
    for key, value in plain.items():
        if key.startswith(("fc.", "classifier.", "layer5.", "layer6.")) and not key.startswith(head):
            continue
        if key.startswith(head):
            out["head.convs." + key.removeprefix(head).removeprefix("conv2d_list.")] = value
        else:
            out["backbone." + key] = value
    return out, "caffe" if caffe else "torchvision"


def load_weights(model: Segmentor, path: str | Path) -> Normalization:
    """Load what the file holds of the model, and return what its images must look like.

    The backbone must be found whole, save for parts that no such file holds (VGG16's fc6 and fc7). The head
    is loaded where its shapes fit, else it stays as it was initialised. Everything is reported through the
    logger.

    Raises:
        UserError: the file is unreadable, or it is not of this backbone.
    """
    state, layout = remap(read_state(path))
    own = model.state_dict()
    matched = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    wrong = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    fresh = tuple(f"backbone.{part}." for part in getattr(model.backbone, "fresh", ()))
    missing = [key for key in own if key not in matched and not key.endswith("num_batches_tracked")]
    lost = [key for key in missing if key.startswith("backbone.") and not key.startswith(fresh or ("\0",))]
    if lost:
        first = ", ".join(lost[:3])
        shapes = f"; of another shape: {', '.join(wrong[:3])}" if wrong else ""
        raise UserError(
            f"{path} does not fit this backbone: {len(lost)} of its keys are missing"
            f" (first: {first}{shapes}); choose the --backbone that the file was made for"
        )
    model.load_state_dict(matched, strict=False)
    unexpected = [key for key in state if key not in own]
    logging.getLogger("fastuda").info(
        "weights %s (%s layout): %d keys matched, from scratch: %s, unused: %s",
        path,
        layout,
        len(matched),
        _few([key for key in missing]) or "none",
        _few(unexpected + wrong) or "none",
    )
    return CAFFE if layout == "caffe" else IMAGENET


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def count_parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())
