"""Whole networks of users and other libraries: split at their classifier, or used through ``classify``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fastuda.errors import UserError, nearest
from fastuda.models.foreign import ForeignBackbone, survey
from fastuda.models.normalization import INPUTS, Normalization
from fastuda.models.segmentor import Segmentor, SegOutput

ENCODERS = ("backbone", "encoder")
"""Children of a whole network that hold its encoder, in segmentation_models.pytorch, mmsegmentation and
torchvision; transformers names it in ``base_model_prefix``."""


class Tap(nn.Module):
    """Replaces a network's classifier: keeps the classifier's input, and passes on one of its channels, so
    that the network resizes one map instead of one for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, features: Tensor) -> Tensor:
        self.seen.append(features)
        return features.detach()[:, :1]

    def take(self, output: Any) -> list[Tensor]:
        """The classifier's input of the forward that returned ``output``."""
        features = self.seen.pop()
        self.seen.clear()
        return [features]


class WholeBackbone(ForeignBackbone):
    """A whole network up to its classifier: ``images -> features``, the classifier's input."""

    def decoder_parameters(self) -> list[nn.Parameter]:
        """The parameters outside the encoder and the classifier; none if no child is a known encoder."""
        prefix = getattr(self.network, "base_model_prefix", "")
        for name in (prefix, *ENCODERS):
            encoder = getattr(self.network, name, None) if name else None
            if isinstance(encoder, nn.Module):
                inside = {id(p) for p in encoder.parameters()}
                return [p for p in self.network.parameters() if id(p) not in inside]
        return []


class OwnSegmentor(Segmentor):
    """A network with its own ``classify``, behind the interface of :class:`Segmentor`."""

    def __init__(self, network: nn.Module, name: str, num_classes: int):
        nn.Module.__init__(self)
        self.backbone, self.head = network, nn.Identity()
        self.num_classes = num_classes
        self.align_corners = bool(getattr(network, "align_corners", False))
        self.least_size = int(getattr(network, "least_size", 1))
        self.input = input_of(network, name) or Normalization()
        side = max(64, self.least_size)
        with torch.no_grad():
            output = network.eval()(torch.zeros(1, 3, side, side))
        network.train()
        if not (isinstance(output, tuple) and len(output) == 2):
            raise UserError(f"{name} has classify(), so it must return (features, logits); see the contract")
        features, logits = output
        self._check(logits, name)
        self._check(network.classify(features), name)  # type: ignore[operator]
        self.feature_channels = int(features.shape[1])
        self.stride = int(getattr(network, "stride", round(side / features.shape[2])))

    def _check(self, logits: Any, name: str) -> None:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if not isinstance(logits, Tensor) or logits.dim() != 4 or logits.shape[1] != self.num_classes:
            raise UserError(f"{name} gives logits {shape}; {self.num_classes} classes need [B, K, h, w]")

    def forward(self, images: Tensor) -> SegOutput:
        features, logits = self.backbone(images)
        return SegOutput(features, logits)

    def classify(self, features: Tensor) -> Tensor:
        return self.backbone.classify(features)  # type: ignore[operator]

    def param_groups(
        self, lr: float, head_lr_mult: float = 1.0, layer_decay: float = 1.0
    ) -> list[dict[str, Any]]:
        if not hasattr(self.backbone, "param_groups"):
            return super().param_groups(lr, head_lr_mult, layer_decay)
        if layer_decay != 1:
            raise UserError("optim.layer_decay: the network has param_groups of its own; set the rates there")
        return self.backbone.param_groups(lr, head_lr_mult)  # type: ignore[operator]


def segmentor_of(network: nn.Module, name: str, num_classes: int, size: Any = None) -> Segmentor:
    """A segmentor of any network ``images -> logits``.

    A :class:`Segmentor` is used as it is, and a network with ``classify`` with its own features. Any other
    network is split at its classifier: the last convolution with ``num_classes`` outputs whose result equals
    that of the network, except for bilinear resizing. The features are the input of the classifier.

    Args:
        size: the size of the images that the network was made for, if it takes no others.

    Raises:
        UserError: there is no such convolution, or the network gives no logits of the classes.
    """
    if isinstance(network, Segmentor):
        return network
    if not isinstance(network, nn.Module):
        raise UserError(f"{name} gave a {type(network).__name__}, not a torch.nn.Module")
    if hasattr(network, "classify"):
        return OwnSegmentor(network, name, num_classes)
    place, classifier, align = _classifier(network, name, num_classes, size)
    tap = Tap()
    network.set_submodule(place, tap)
    backbone = WholeBackbone(network, tap.take, survey(network, tap.take, name, size))
    align = bool(getattr(network, "align_corners", align))
    model = Segmentor(backbone, classifier, num_classes, align)
    model.input = input_of(network, name) or model.input
    return model


def choose_classes(model: Segmentor, rows: Sequence[int | None]) -> None:
    """Change the classes of a model that was split at its classifier. Each entry of ``rows`` is the row of
    the classifier to use, or None for a class that starts from N(0, 0.01)."""
    old = model.head
    assert isinstance(old, nn.Conv2d)
    if list(rows) == list(range(old.out_channels)):
        return
    shape: dict[str, Any] = {key: getattr(old, key) for key in ("stride", "padding", "dilation")}
    size: Any = old.kernel_size
    new = nn.Conv2d(old.in_channels, len(rows), size, bias=old.bias is not None, **shape)
    nn.init.normal_(new.weight, std=0.01)
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    with torch.no_grad():
        for k, row in enumerate(rows):
            if row is not None:
                new.weight[k] = old.weight[row]
                if new.bias is not None and old.bias is not None:
                    new.bias[k] = old.bias[row]
    model.head, model.num_classes = new, len(rows)


def _classifier(network: nn.Module, name: str, num_classes: int, size: Any) -> tuple[str, nn.Module, bool]:
    """The classifier's name, the classifier, and whether its result is resized with ``align_corners``."""
    calls: list[tuple[str, nn.Module, Tensor]] = []
    hooks = [
        part.register_forward_hook(lambda module, _, out, key=key: calls.append((key, module, out)))
        for key, part in network.named_modules()
        if isinstance(part, nn.Conv2d) and part.out_channels == num_classes
    ]
    images = torch.rand(1, 3, *(size or (64, 96)), generator=torch.Generator().manual_seed(0))
    training = network.training
    try:
        with torch.no_grad():
            logits = logits_of(network.eval()(images))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name} cannot be run on an image of 64 x 96: {reason}") from error
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    if logits is None or logits.dim() != 4:
        raise UserError(f"{name} returns no logits [B, K, h, w]: neither a tensor nor logits or out")
    if logits.shape[1] != num_classes:
        raise UserError(f"{name} gives {logits.shape[1]} classes, and the run has {num_classes}")
    for key, module, out in reversed(calls):
        for align in (False, True):
            resized = nnf.interpolate(out, logits.shape[2:], mode="bilinear", align_corners=align)
            if torch.allclose(resized, logits, atol=1e-4 * float(logits.abs().max())):
                return key, module, align
    raise UserError(
        f"{name} does more between its last convolution and its logits than bilinear resizing: give it"
        " classify(features) (docs/own-network.md)"
    )


def logits_of(output: Any) -> Tensor | None:
    """Class scores in the output of a whole network: a tensor, the first of several, or ``logits`` or ``out``
    of a dictionary."""
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("out"))
    if isinstance(output, (tuple, list)):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) else None


def input_of(network: nn.Module, name: str) -> Normalization | None:
    """The normalisation in a network's attribute ``input``, a name or a Normalization.

    Raises:
        UserError: there is no normalisation of that name.
    """
    asked = getattr(network, "input", None)
    if isinstance(asked, str):
        if asked not in INPUTS:
            raise UserError(f"{name} asks for the input {asked!r}{nearest(asked, INPUTS)}")
        return INPUTS[asked]
    return asked if isinstance(asked, Normalization) else None
