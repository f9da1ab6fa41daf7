"""What a method is: a module that generates losses. Backward, scaling, stepping and logging are the
trainer's."""

from __future__ import annotations

import importlib
import os
import sys
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fastuda.data.loading.batch import Batch
from fastuda.errors import UserError, nearest
from fastuda.models.segmentor import Segmentor


@dataclass(frozen=True)
class Phase:
    """One backward pass: the weighted losses that are summed for it, and what to log beside them."""

    net: str
    """The entry of ``networks()`` that the losses train."""
    losses: dict[str, Tensor]
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)


class SegPrediction(NamedTuple):
    """What an evaluated image gives, at low resolution; the evaluator upsamples it and takes the argmax."""

    scores: Tensor
    """[B, K, h, w]."""
    are_probabilities: bool


class Method(nn.Module):
    """The base of every method.

    State beyond parameters is kept in buffers, so that checkpoints and resuming need nothing from the method.
    """

    @dataclass(frozen=True)
    class Config:
        """The method's own settings, under ``method:`` in a configuration."""

        RANGES: ClassVar[dict[str, tuple[float, float]]] = {}
        """Setting to its smallest and largest value."""

    name: ClassVar[str] = ""
    optim_defaults: ClassVar[dict[str, Any]] = {}
    """Dotted settings that the method wants where the user says nothing."""
    target_second: ClassVar[bool] = False
    """Whether the second phase trains the segmentor on the batch's target images, the first having met the
    source's alone: a composition takes both at once where another part needs both images at once."""

    def __init__(self, config: Any, model: Segmentor, num_classes: int):
        super().__init__()
        self.config = config
        self.model = model
        self.num_classes = num_classes
        self.horizon = 0
        """Steps over which schedules run, set by the trainer; 0: not known."""

    def configure(self, config: Any) -> None:
        """Take other settings; what was built by the old ones stays."""
        self.config = config

    def networks(self) -> dict[str, nn.Module]:
        """What gets an optimiser, and a DDP wrap of its own. A teacher is not in it."""
        return {"model": self.model}

    @abstractmethod
    def phases(self, batch: Batch, step: int) -> Iterator[Phase]:
        """The losses of one step, a backward pass each; a generator, so that one graph is freed before the
        next."""

    def after_step(self, step: int) -> None:
        """What follows the optimisers' step: averages, prototypes, banks."""
        return

    def predict(self, images: Tensor) -> SegPrediction:
        """Scores of images [B, 3, H, W] at low resolution."""
        return SegPrediction(self.model(images).logits, False)


def _checked(phase: Any, networks: Collection[str], of: str) -> Phase:
    """A phase that can be trained.

    Raises:
        UserError: it is no phase, of none of the networks, or without a loss that has a gradient.
    """
    if not isinstance(phase, Phase):
        raise UserError(f"phases() of {of} gave a {type(phase).__name__}: yield Phase(network, losses)")
    if phase.net not in networks:
        raise UserError(
            f"phases() of {of} trains {phase.net!r}, which networks() lacks{nearest(phase.net, networks)}"
        )
    for kind, values in (("loss", phase.losses), ("metric", phase.metrics)):
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dim():
                raise UserError(
                    f"phases() of {of} gave the {kind} {name!r} as {list(value.shape)}: take its mean"
                )
            if not isinstance(value, Tensor) and (kind == "loss" or not isinstance(value, (int, float))):
                raise UserError(
                    f"phases() of {of} gave the {kind} {name!r} as a {type(value).__name__}, not a tensor"
                )
    if not any(value.requires_grad for value in phase.losses.values()):
        losses = ", ".join(phase.losses) or "none at all"
        raise UserError(f"phases() of {of} gave no loss of {phase.net!r} that has a gradient, but {losses}")
    return phase


def phases_of(method: Method, batch: Batch, step: int) -> Iterator[Phase]:
    """The method's phases, each of which can be trained.

    Raises:
        UserError: the method gives something else.
    """
    of = method.name or type(method).__name__
    phases: Any = method.phases(batch, step)
    if not isinstance(phases, Iterable):
        raise UserError(f"phases() of {of} gave a {type(phases).__name__}: write it with yield")
    networks = method.networks()
    for phase in phases:
        yield _checked(phase, networks, of)


METHODS: dict[str, type[Method]] = {}
"""Name to class, in the order of registration."""

M = TypeVar("M", bound=type[Method])


def register(name: str) -> Callable[[M], M]:
    """Class decorator that makes a method known to ``--method``."""

    def add(cls: M) -> M:
        cls.name = name
        METHODS[name] = cls
        return cls

    return add


def get_method(name: str) -> type[Method]:
    """The class of a registered method, of ``package.module:Class``, or of several joined by ``+``.

    Raises:
        UserError: no such method.
    """
    if name in METHODS:
        return METHODS[name]
    if "+" in name:
        from fastuda.methods.compose import compose

        parts = name.split("+")
        # settings of package.module:Class stand under Class
        own = tuple(part.rpartition(":")[2] for part in parts)
        return compose(own, tuple(get_method(part) for part in parts))
    module, colon, attribute = name.partition(":")
    if not colon or not module or module.startswith("."):
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS)}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # python -m has it, the command fastuda has not
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"method {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"{name!r} is not a fastuda.methods.base.Method")
    if "__dataclass_fields__" not in vars(found.Config):
        raise UserError(f"{name!r} has a Config that is no dataclass; write @dataclass(frozen=True) over it")
    return found


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Graphs built in the block reach through ``module`` to its input, but leave its parameters alone."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def pixel_major(x: Tensor) -> Tensor:
    """[B, C, h, w] to [B, h w, C]; a channels-last map is that already, without a copy."""
    return x.flatten(2).transpose(1, 2)


def channel_major(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, h w, C] to [B, C, h, w]."""
    return x.transpose(1, 2).unflatten(2, size)


def upsampled(logits: Tensor, images: Tensor, align_corners: bool) -> Tensor:
    """Logits [B, K, h, w] at the size of the images, bilinear, float32 at least; planes, which are
    interpolated and soft-maxed over K three times as fast as channels-last pixels."""
    planes = at_least_float32(logits).contiguous()
    return nnf.interpolate(planes, images.shape[2:], mode="bilinear", align_corners=align_corners)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision widened to float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
