"""Input checks that every public op shares: the message names the argument, the shape and what is
expected."""

from __future__ import annotations

import torch
from torch import Tensor


def check_rank(name: str, x: Tensor, shape: str) -> None:
    """Raise unless ``x`` has as many dimensions as the comma-separated ``shape`` names."""
    rank = len(shape.split(","))
    if x.dim() != rank:
        raise ValueError(f"{name} must be [{shape}], got shape {tuple(x.shape)}")


def check_float(name: str, x: Tensor) -> None:
    """Raise unless ``x`` has a floating-point dtype."""
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")


def check_features(source: Tensor, target: Tensor) -> None:
    """Raise unless both are ``[B, *, C]`` features of one batch size, width, dtype and device."""
    for name, x in (("source", source), ("target", target)):
        check_rank(name, x, "B, N, C")
        check_float(name, x)
        if x.shape[1] == 0 or x.shape[2] == 0:
            raise ValueError(f"{name} has no pixels or no channels: shape {tuple(x.shape)}")
    if source.shape[0] != target.shape[0] or source.shape[2] != target.shape[2]:
        raise ValueError(
            f"source {tuple(source.shape)} and target {tuple(target.shape)} must share batch and channels"
        )
    if source.dtype != target.dtype or source.device != target.device:
        raise ValueError(
            f"source ({source.dtype}, {source.device}) and target ({target.dtype}, {target.device})"
            " must share dtype and device"
        )


def check_labels(name: str, labels: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless ``labels`` are integers of the given shape."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    if tuple(labels.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(labels.shape)}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
