"""Published weight files by name: their addresses and checksums."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from fastuda.errors import UserError, nearest
from fastuda.system.download import download, sha256_of
from fastuda.system.log import log_is_quiet


@dataclass(frozen=True)
class WeightsFile:
    """A weight file on a public server."""

    url: str
    sha256: str
    """The SHA-256, or its first digits as in the file's name."""
    public_name: str
    """The publisher's name of the weights."""
    licence: str
    megabytes: float | None = None
    """Size as published, in MiB; None: not published."""
    input: str = "imagenet"
    """Name of the image format that the file expects."""

    @property
    def name(self) -> str:
        """The file's name."""
        return PurePosixPath(self.url).name

    @property
    def path(self) -> Path:
        """Its place in torch's cache, which torchvision uses as well: ``$TORCH_HOME/hub/checkpoints``, or
        ``torch/hub/checkpoints`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
        return Path(torch.hub.get_dir(), "checkpoints", self.name)

    def fetch(self) -> Path:
        """The checked file in the cache, downloaded if it is not there.

        Raises:
            UserError: it cannot be downloaded, or the file in the cache is another one.
        """
        path = self.path
        if not path.is_file():
            download(self.url, path, self.sha256, quiet=log_is_quiet())
        elif not (digest := sha256_of(path)).startswith(self.sha256):
            raise UserError(
                f"{path} is damaged: its SHA-256 begins with {digest[: len(self.sha256)]}, not with"
                f" {self.sha256}; delete it, and it is downloaded again"
            )
        return path


def _torchvision(network: str, name: str, megabytes: float) -> WeightsFile:
    url = f"https://download.pytorch.org/models/{name}.pth"
    public_name = f"torchvision {network}_Weights.IMAGENET1K_V1"
    return WeightsFile(url, name.rpartition("-")[2], public_name, "not stated (code: BSD)", megabytes)


def _mmsegmentation(name: str) -> WeightsFile:
    url = f"https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segformer/{name}.pth"
    public_name = f"mmsegmentation; on Hugging Face nvidia/mit-b{name[5]}"
    return WeightsFile(url, name.rpartition("-")[2], public_name, "NVIDIA's, non-commercial")


def _dinov2(size: str, hugging_face: str, sha256: str, megabytes: float) -> WeightsFile:
    url = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_{size}/dinov2_{size}_pretrain.pth"
    public_name = f"torch.hub dinov2_{size}; on Hugging Face facebook/dinov2-{hugging_face}"
    return WeightsFile(url, sha256, public_name, "Apache-2.0", megabytes)


_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights"

IMAGENET: dict[str, WeightsFile] = {
    "resnet18": _torchvision("ResNet18", "resnet18-f37072fd", 44.661),
    "resnet34": _torchvision("ResNet34", "resnet34-b627a593", 83.275),
    "resnet50": _torchvision("ResNet50", "resnet50-0676ba61", 97.781),
    "resnet101": _torchvision("ResNet101", "resnet101-63fe2227", 170.511),
    "mobilenet_v2": _torchvision("MobileNet_V2", "mobilenet_v2-b0353104", 13.555),
    "vgg16": _torchvision("VGG16", "vgg16-397923af", 527.796),
    "efficientnet_lite0": WeightsFile(
        f"{_TIMM}/tf_efficientnet_lite0-0aa007d2.pth",
        "0aa007d2",
        "timm tf_efficientnet_lite0.in1k",
        "Apache-2.0",
        input="half",
    ),
    "mit_b0": _mmsegmentation("mit_b0_20220624-7e0fe6dd"),
    "mit_b1": _mmsegmentation("mit_b1_20220624-02e5a6a1"),
    "mit_b2": _mmsegmentation("mit_b2_20220624-66e8bf70"),
    "mit_b3": _mmsegmentation("mit_b3_20220624-13b1141c"),
    "mit_b4": _mmsegmentation("mit_b4_20220624-d588d980"),
    "mit_b5": _mmsegmentation("mit_b5_20220624-658746d9"),
}
"""Backbone to its file trained on ImageNet-1k: torchvision's first version (IMAGENET1K_V1), timm's, and
mmsegmentation's copy of SegFormer's encoders. Their names hold the first eight digits of their SHA-256."""

DINOV2: dict[str, WeightsFile] = {
    "dinov2_vits14": _dinov2(
        "vits14", "small", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9", 84.2
    ),
    "dinov2_vitb14": _dinov2(
        "vitb14", "base", "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73", 330.3
    ),
    "dinov2_vitl14": _dinov2(
        "vitl14", "large", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428", 1161.2
    ),
}
"""The hub's name of a DINOv2 network to its file. The authors publish no checksums; these are the ones that
users have published, which all agree."""

NAMES = ("imagenet", *DINOV2)
"""Values of ``model.weights`` that are not paths."""


def published(
    weights: str, backbone: str, *, caffe: bool = False, input: str | None = None
) -> WeightsFile | None:
    """The published file that ``weights`` names, or None if it is the path of a file.

    Args:
        weights: ``imagenet``, a name of :data:`DINOV2`, or a path.
        backbone: the network, for ``imagenet``.
        caffe: whether the ResNet is in the Caffe style, which the published files do not fit.
        input: the image format of the settings, if any.

    Raises:
        UserError: there is no published file for the network, or it expects other images.
    """
    if weights in DINOV2:
        file = DINOV2[weights]
    elif weights != "imagenet":
        return None
    elif backbone not in IMAGENET:
        raise UserError(
            f"model.weights imagenet: no file is known for {backbone}{nearest(backbone, IMAGENET)};"
            " give a file"
        )
    elif caffe:
        raise UserError(
            "model.weights imagenet is torchvision's file, which does not fit a Caffe-style ResNet:"
            " set model.caffe=false, or give a Caffe-style file"
        )
    else:
        file = IMAGENET[backbone]
    if input not in (None, file.input):
        raise UserError(
            f"model.weights {weights} expects images as {file.input}, and model.input is {input}:"
            " set model.input=null"
        )
    return file
