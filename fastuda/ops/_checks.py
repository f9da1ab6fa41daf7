"""Input checks that all public ops share. A message names the argument, the given value and what is expected.

The checks look only at types, shapes and Python numbers, so that they never wait for a GPU or break a
compiled graph. :func:`check_classes` and :func:`check_counts` also read values, but only of CPU tensors
outside compiled code.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# between them a number and its reciprocal are finite and positive in float32
LEAST, MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max

AXES = {
    "B": "images",
    "C": "channels",
    "A": "channels",
    "K": "classes",
    "M": "vectors",
    "N": "pixels",
    "H": "rows",
    "h": "rows",
    "W": "columns",
    "w": "columns",
    "kh": "rows",
    "kw": "columns",
    "1": "input channels",
}


def check_tensor(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is a dense tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}: torch.as_tensor makes one")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got layout {x.layout}: use {name}.to_dense()")


def check_rank(name: str, x: Tensor, shape: str) -> None:
    """Raise unless ``x`` has as many dimensions as the comma-separated ``shape`` names. Only the first may be
    empty."""
    axes = shape.split(", ")
    if x.dim() != len(axes):
        raise ValueError(f"{name} must be [{shape}], got shape {tuple(x.shape)}")
    for size, axis in zip(x.shape[1:], axes[1:], strict=True):
        if size == 0:
            raise ValueError(
                f"{name} has no {AXES[axis]}, got shape {tuple(x.shape)}: {axis} of [{shape}] is at least 1"
            )


def check_float(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is a tensor of a floating-point dtype that the ops take."""
    check_tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be floating point (float32, bfloat16, float16 or float64), got {x.dtype}:"
            f" use {name}.float()"
        )


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off: the ops choose their own types. A meta tensor has no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def check_beside(name: str, x: Tensor, other: str, y: Tensor) -> None:
    """Raise unless both are on one device."""
    if x.device != y.device:
        raise ValueError(f"{name} is on {x.device}, {other} on {y.device}: use {name}.to({other}.device)")


def check_features(source: Tensor, target: Tensor) -> None:
    """Raise unless both are ``[B, *, C]`` features of one batch size, width, dtype and device."""
    for name, x in (("source", source), ("target", target)):
        check_float(name, x)
        check_rank(name, x, "B, N, C")
    if source.shape[0] != target.shape[0] or source.shape[2] != target.shape[2]:
        raise ValueError(
            f"source {tuple(source.shape)} and target {tuple(target.shape)} must share batch and channels"
        )
    if source.dtype != target.dtype or source.device != target.device:
        raise ValueError(
            f"source ({source.dtype}, {source.device}) and target ({target.dtype}, {target.device})"
            " must share dtype and device"
        )


def check_integers(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is a tensor of integers."""
    check_tensor(name, x)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {x.dtype}: use {name}.long()")


def check_labels(name: str, labels: Tensor, shape: tuple[int, ...], other: str, x: Tensor) -> None:
    """Raise unless ``labels`` are integers of the given shape, on the device of ``x``."""
    check_integers(name, labels)
    if tuple(labels.shape) != shape:
        raise ValueError(
            f"{name} must have shape {shape}, got {tuple(labels.shape)}: {other} is {tuple(x.shape)}"
        )
    check_beside(name, labels, other, x)


def check_label_map(name: str, labels: Tensor, other: str, x: Tensor) -> None:
    """Raise unless ``labels`` are integers [B, H, W] with the batch and the device of ``x``, of any size."""
    check_integers(name, labels)
    check_rank(name, labels, "B, H, W")
    check_labels(name, labels, (x.shape[0], labels.shape[1], labels.shape[2]), other, x)


def may_read(x: Tensor) -> bool:
    """Whether the values of ``x`` can be read without a device sync or a graph break."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and not isinstance(x, FakeTensor)


def stray_labels(name: str, labels: Tensor, classes: int, ignore_index: int) -> str:
    """The error message about labels that are neither a class nor ``ignore_index``; the empty string when
    there are none."""
    if not labels.numel():
        return ""
    labels = labels.long()
    least, most = (int(x) for x in labels.aminmax())
    if least >= 0 and most < classes:
        return ""
    # comparing bytes takes a tenth of the time of comparing int64
    small = labels.byte() if least >= 0 and most <= 255 else labels
    stray = (small < 0) | (small >= classes)
    if least <= ignore_index <= most:
        stray &= small != ignore_index
    if not stray.any():
        return ""
    strays = labels[stray].unique()
    shown = ", ".join(str(int(x)) for x in strays[:5]) + (", ..." if len(strays) > 5 else "")
    return (
        f"{name} hold classes outside 0..{classes - 1} other than ignore_index {ignore_index}: {shown};"
        " map them to a class or to ignore_index"
    )


def check_classes(name: str, labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raise if a label is neither a class nor ``ignore_index``.

    Labels on a GPU, or in compiled code, are not read.
    """
    if may_read(labels):
        message = stray_labels(name, labels, classes, ignore_index)
        if message:
            raise ValueError(message)


def check_counts(name: str, count: Tensor, most: int) -> None:
    """Raise if ``count`` is below 0 or above ``most``; not read on a GPU or in compiled code."""
    if may_read(count) and count.numel() and not (count.min() >= 0 and count.max() <= most):
        raise ValueError(f"{name} must be in 0..{most}, the length of the bank, got {count.tolist()}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_flag(name: str, value: bool) -> None:
    """Raise unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_integer(name: str, value: int, least: int = -(2**63)) -> None:
    """Raise unless ``value`` is an integer of 64 bits, at least ``least``."""
    if isinstance(value, bool | Tensor) or not (isinstance(value, int) or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be an integer, got {_shown(value)}")
    if not least <= value < 2**63:
        bounds = f"at least {least}" if least > -(2**63) else "an integer of 64 bits"
        raise ValueError(f"{name} must be {bounds}, got {value}")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool | Tensor) or not (isinstance(value, float) or hasattr(value, "__float__")):
        raise TypeError(f"{name} must be a number, got {_shown(value)}")


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is positive, and it and its reciprocal are finite in float32."""
    _check_number(name, value)
    if not LEAST <= value <= MOST:
        raise ValueError(f"{name} must be positive and finite in float32, got {value}")


def check_share(name: str, value: float, *, zero: bool = True) -> None:
    """Raise unless ``value`` is a number in [0, 1], or in (0, 1] without ``zero``."""
    _check_number(name, value)
    if not 0 <= value <= 1 or (value == 0 and not zero):
        raise ValueError(f"{name} must be {'in [0, 1]' if zero else 'above 0 and at most 1'}, got {value}")


def check_size(name: str, size: Any) -> tuple[int, int]:
    """``(height, width)``; raise unless ``size`` is two positive integers."""
    if not isinstance(size, tuple | list):
        raise TypeError(f"{name} must be (height, width), got {_shown(size)}")
    if len(size) != 2:
        raise ValueError(f"{name} must be (height, width), got {tuple(size)}")
    for part, value in zip(("height", "width"), size, strict=True):
        check_integer(f"the {part} of {name}", value, 1)
    return size[0], size[1]


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)


def nothing(x: Tensor) -> Tensor:
    """The loss when no pixel counts: 0, with a gradient of zeros, in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).sum() * 0
