"""The interface of methods: a module that yields losses. The trainer does backward, scaling, optimiser
steps and logging."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastuda.data.loading.batch import Batch
from fastuda.errors import UserError, nearest
from fastuda.methods.cycles import Cycles
from fastuda.methods.tensors import at_least_float32
from fastuda.models.segmentor import Segmentor
from fastuda.system.settings import check


@dataclass(frozen=True)
class Phase:
    """One backward pass: the weighted losses to sum, and metrics to log."""

    net: str
    """The entry of ``networks()`` that the losses train."""
    losses: dict[str, Tensor]
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)


class SegPrediction(NamedTuple):
    """A method's low-resolution prediction of an image; the evaluator upsamples it and takes the argmax."""

    scores: Tensor
    """[B, K, h, w]."""
    are_probabilities: bool


class Method(nn.Module):
    """The base of every method.

    All state is in parameters and buffers, so that checkpoints and resuming need no code in the method.
    """

    @dataclass(frozen=True)
    class Config:
        """The method's settings, under ``method:`` in a configuration. Their types declare the allowed
        values (see fastuda.system.settings)."""

        def supervised(self) -> dict[str, Any]:
            """Settings with which the baseline trains the same supervised objective, without the adaptation.
            A method of the settings, because the baseline is trained before the method is built."""
            return {}

        def keeps_initial(self) -> bool:
            """Whether the method needs the initial weights of ``hf:PATH`` throughout, so that a resumed run
            reads them again."""
            return False

    name: ClassVar[str] = ""
    optim_defaults: ClassVar[dict[str, Any]] = {}
    """Dotted settings that the method changes from their defaults; the user's settings override them."""
    titles: ClassVar[dict[str, str]] = {}
    """Maps a loss or metric to the title of its curve in the report; by default, its name with spaces."""
    target_second: ClassVar[bool] = False
    """Whether the second phase trains the segmentor on target images and the first on source images alone.
    A composition merges the two phases if another part needs both images at once."""

    def __init__(self, config: Any, model: Segmentor, num_classes: int):
        super().__init__()
        check(config, "method")
        self.config = config
        self.model = model
        self.num_classes = num_classes
        self.horizon = 0
        """Length of the schedules in steps, set by the trainer; 0: unknown."""
        self.class_bias: Tensor | None
        """[K], added to the scores of :meth:`segment`; see :meth:`adjust`."""
        self.register_buffer("class_bias", None, persistent=False)

    def configure(self, config: Any) -> None:
        """Replace the settings; modules that were built with the old ones stay."""
        self.config = config

    def networks(self) -> dict[str, nn.Module]:
        """The networks that get an optimiser and a DDP wrapper. A teacher is not one of them."""
        return {"model": self.model}

    @abstractmethod
    def phases(self, batch: Batch, step: int) -> Iterator[Phase]:
        """Yield the losses of one step, one :class:`Phase` per backward pass. A generator frees each graph
        before the next is built."""

    def after_step(self, step: int) -> None:
        """Called after the optimisers' step, for averages, prototypes and banks."""
        return

    def predict(self, images: Tensor) -> SegPrediction:
        """Scores of images [B, 3, H, W] at low resolution."""
        return SegPrediction(self.model(images).logits, False)

    def segment(self, images: Tensor) -> SegPrediction:
        """:meth:`predict` with the logit adjustment: ``s + b`` of logits, ``p e^b / sum_k p_k e^b_k`` of
        probabilities."""
        scores, are_probabilities = self.predict(images)
        if self.class_bias is None:
            return SegPrediction(scores, are_probabilities)
        bias = self.class_bias[:, None, None]
        if not are_probabilities:
            return SegPrediction(scores + bias, False)
        weighted = at_least_float32(scores) * bias.exp()
        return SegPrediction(weighted / weighted.sum(1, keepdim=True), True)

    def adjust(self, tau: float, shares: Sequence[float] | None) -> None:
        """Set the logit adjustment ``b_k = -tau ln(share_k)`` of predictions. A class without pixels has
        ``b_k = 0``.

        Source: Menon et al., Long-tail learning via logit adjustment, ICLR 2021.

        Args:
            tau: 0: no adjustment.
            shares: share of each class among the labelled pixels of the training images.

        Raises:
            UserError: there are no shares, or not one per class.
        """
        self.class_bias = None
        if not tau:
            return
        if shares is None:
            raise UserError(
                "eval.logit_adjustment needs the share of each class, which a run with eval.logit_adjustment"
                " counts when it begins: give eval.class_shares"
            )
        if len(shares) != self.num_classes:
            raise UserError(f"eval.class_shares has {len(shares)} entries for {self.num_classes} classes")
        share = torch.tensor(shares, dtype=torch.float64)
        bias = torch.where(share > 0, -tau * share.log(), 0.0).float()
        self.class_bias = bias.to(next(self.model.parameters()).device)

    def explain(self, batch: Batch) -> Cycles | None:
        """The cycles between the images of a batch of one pair, for the report; None if there is nothing to
        draw. Called in evaluation mode, without gradients."""
        return None


def _checked(phase: Any, networks: Collection[str], of: str) -> Phase:
    """Check that a phase can be trained.

    Raises:
        UserError: it is not a Phase, names an unknown network, or has no loss with a gradient.
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
    """The phases of a method, each checked.

    Raises:
        UserError: the method yields anything else.
    """
    of = method.name or type(method).__name__
    phases: Any = method.phases(batch, step)
    if not isinstance(phases, Iterable):
        raise UserError(f"phases() of {of} gave a {type(phases).__name__}: write it with yield")
    networks = method.networks()
    for phase in phases:
        yield _checked(phase, networks, of)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the block, gradients pass through ``module`` to its input but do not reach its parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
