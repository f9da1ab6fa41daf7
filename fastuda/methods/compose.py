"""Combines methods: ``--method plca+self_training`` trains one segmentor with the phases of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastuda.data.loading.batch import Batch
from fastuda.errors import UserError
from fastuda.methods.base import Method, Phase, SegPrediction, phases_of
from fastuda.methods.cycles import Cycles
from fastuda.models.segmentor import Segmentor, SegOutput


@contextmanager
def shared_forwards(model: Segmentor) -> Iterator[dict[int, tuple[Tensor, SegOutput]]]:
    """Within the block, the segmentor runs once per tensor of images; the caller clears the cached
    outputs."""
    kept: dict[int, tuple[Tensor, SegOutput]] = {}
    plain = type(model).forward

    def forward(images: Tensor) -> SegOutput:
        if not torch.is_grad_enabled():
            return plain(model, images)
        if id(images) not in kept:
            kept[id(images)] = (images, plain(model, images))
        return kept[id(images)][1]

    model.forward = forward  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        del model.forward


class Composition(Method):
    """Runs the parts' phases in parallel. In every round, phases that train the same network become one phase
    with the weighted sum of their losses; forwards of the same images are shared.

    The first part predicts.
    """

    @dataclass(frozen=True)
    class Config(Method.Config):
        weights: dict[str, float] = field(default_factory=dict)
        """Factor of all losses of a part; default 1."""

        def supervised(self) -> dict[str, Any]:
            """For every setting, the largest value among the parts."""
            largest: dict[str, Any] = {}
            for part in self._parts():
                for key, value in part.supervised().items():
                    largest[key] = max(value, largest.get(key, value))
            return largest

        def keeps_initial(self) -> bool:
            return any(part.keeps_initial() for part in self._parts())

        def _parts(self) -> list[Any]:
            return [getattr(self, f.name) for f in fields(self) if f.name != "weights"]

    parts: ClassVar[dict[str, type[Method]]] = {}

    def __init__(self, config: Any, model: Segmentor, num_classes: int):
        super().__init__(config, model, num_classes)
        unknown = set(config.weights) - set(self.parts)
        if unknown:
            raise UserError(f"method.weights has {sorted(unknown)}; the parts are {', '.join(self.parts)}")
        self.members = nn.ModuleDict(
            {name: cls(getattr(config, name), model, num_classes) for name, cls in self.parts.items()}
        )

    def configure(self, config: Any) -> None:
        super().configure(config)
        for name, member in self._members().items():
            member.configure(getattr(config, name))

    def _members(self) -> dict[str, Method]:
        return {name: member for name, member in self.members.items() if isinstance(member, Method)}

    def _name(self, part: str, net: str) -> str:
        """A network's unique name, prefixed with its part if two parts use the same name."""
        if net == "model":
            return net
        owners = Counter(name for member in self._members().values() for name in member.networks())
        return net if owners[net] == 1 else f"{part}_{net}"

    def networks(self) -> dict[str, nn.Module]:
        # a part's model may contain more than the segmentor: the largest contains the others
        models = [member.networks()["model"] for member in self._members().values()]
        largest = max(models, key=lambda m: sum(p.numel() for p in m.parameters()))
        held = {id(p) for p in largest.parameters()}
        for model in models:
            if any(id(p) not in held for p in model.parameters()):
                raise UserError(
                    f"{' and '.join(self.parts)} each train their own head on the segmentor, so they"
                    " cannot be combined"
                )
        others = {
            self._name(part, net): module
            for part, member in self._members().items()
            for net, module in member.networks().items()
            if net != "model"
        }
        return {"model": largest, **others}

    def phases(self, batch: Batch, step: int) -> Iterator[Phase]:
        running = {}
        for name, member in self._members().items():
            member.horizon = self.horizon
            running[name] = phases_of(member, batch, step)
        with shared_forwards(self.model) as kept:
            first = True
            while running:
                merged: dict[str, tuple[dict[str, Tensor], dict[str, Tensor | float]]] = {}
                for name in list(running):
                    self._take(name, running, merged)
                if first and id(batch.target_image) in kept:
                    # after the backward the graph is freed, and the forward would have to run again
                    for name, member in self._members().items():
                        if member.target_second:
                            self._take(name, running, merged)
                first = False
                for net, (losses, metrics) in merged.items():
                    yield Phase(net, losses, metrics)
                kept.clear()

    def _take(
        self,
        name: str,
        running: dict[str, Iterator[Phase]],
        merged: dict[str, tuple[dict[str, Tensor], dict[str, Tensor | float]]],
    ) -> None:
        """Add a part's next phase, weighted, to the round. A part without a next phase is finished."""
        phase = next(running[name], None)
        if phase is None:
            del running[name]
            return
        losses, metrics = merged.setdefault(self._name(name, phase.net), ({}, {}))
        weight = self.config.weights.get(name, 1.0)
        losses.update({f"{name}_{key}": weight * loss for key, loss in phase.losses.items()})
        metrics.update({f"{name}_{key}": value for key, value in phase.metrics.items()})

    def after_step(self, step: int) -> None:
        for member in self._members().values():
            member.after_step(step)

    def predict(self, images: Tensor) -> SegPrediction:
        return next(iter(self._members().values())).predict(images)

    def explain(self, batch: Batch) -> Cycles | None:
        """The cycles of the first part that has any."""
        explained = (member.explain(batch) for member in self._members().values())
        return next((cycles for cycles in explained if cycles is not None), None)


@cache
def compose(names: tuple[str, ...], classes: tuple[type[Method], ...]) -> type[Method]:
    """Build the class of a composition. Its settings are the parts' settings, each under the part's name.

    Raises:
        UserError: a method is named twice.
    """
    if len(set(names)) != len(names):
        raise UserError(f"{'+'.join(names)} has a method twice")
    members = [(n, c.Config, field(default_factory=c.Config)) for n, c in zip(names, classes, strict=True)]
    config = make_dataclass("Config", members, bases=(Composition.Config,), frozen=True)
    defaults = {key: value for cls in classes for key, value in cls.optim_defaults.items()}
    for name, cls in zip(names, classes, strict=True):
        for key, value in cls.optim_defaults.items():
            head, _, rest = key.removeprefix("optim.networks.").partition(".")
            if key.startswith("optim.networks."):
                defaults[f"optim.networks.{name}_{head}.{rest}"] = value
    namespace = {
        "Config": config,
        "parts": dict(zip(names, classes, strict=True)),
        "optim_defaults": defaults,
        "titles": {
            f"{part}_{key}": title
            for part, cls in zip(names, classes, strict=True)
            for key, title in cls.titles.items()
        },
        "name": "+".join(names),
    }
    return type("Composition", (Composition,), namespace)
