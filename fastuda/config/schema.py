"""A run's configuration: nested frozen dataclasses, whose types say which values are allowed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastuda.data.config import DataConfig
from fastuda.errors import UserError
from fastuda.methods import DEFAULT, get_method
from fastuda.models.build import ModelConfig
from fastuda.system.settings import Bounds, Count, Natural, NonNegative, build, plain
from fastuda.system.yaml import to_yaml


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule; ``networks`` replaces single settings for single networks."""

    name: Literal["sgd", "adamw", "adam"] = "sgd"
    """The optimiser."""
    lr: NonNegative = 2.5e-4
    """Learning rate of the backbone."""
    head_lr_mult: NonNegative = 1.0
    """The segmentation head's learning rate is this times lr."""
    momentum: NonNegative = 0.9
    """Of sgd."""
    weight_decay: NonNegative = 5e-4
    """L2 for sgd and adam, decoupled for adamw."""
    betas: Annotated[tuple[float, float], Bounds(0, 1, open_above=True)] = (0.9, 0.999)
    """Of adam and adamw."""
    schedule: Literal["poly", "constant"] = "poly"
    """poly: lr * (1 - step / horizon) ** power; or constant."""
    power: NonNegative = 0.9
    """Of poly."""
    horizon: Count | None = None
    """Step where poly would reach zero; none is train.steps (PLCA stops before its horizon)."""
    warmup: Natural = 0
    """Steps of linear warm-up."""
    clip_norm: NonNegative | None = None
    """Largest gradient norm of a network."""
    impl: Literal["auto", "foreach", "apex"] = "auto"
    """auto (torch's fused implementation where it has one), foreach, or apex (FusedSGD, where apex is
    installed)."""
    networks: dict[str, Any] = field(default_factory=dict)
    """Per network of the method: e.g. {discriminator: {name: adam, lr: 1.0e-4}}."""

    def of(self, network: str) -> OptimConfig:
        """The settings of one network.

        Raises:
            UserError: ``networks`` holds an unknown setting of it, or a value that is not allowed.
        """
        where = f"optim.networks.{network}"
        own = self.networks.get(network, {})
        if not isinstance(own, dict):
            raise UserError(f"{where} must be a section of settings, got {own!r}")
        return dataclasses.replace(build(OptimConfig, {**self._shared(), **own}, where), networks={})

    def _shared(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "networks"}


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: Count = 10000
    """Optimiser steps."""
    accumulate: Count = 1
    """Batches per optimiser step."""
    amp: Literal["off", "bf16", "fp16", "force-bf16", "force-fp16"] = "off"
    """off, bf16 or fp16 (with a loss scaler), float32 where the machine only emulates it; force-bf16 and
    force-fp16 take it nevertheless."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: Annotated[int, Bounds(0, 10**16)] = 0
    """Of weights, samples and augmentation; the ranks' seeds are a thousand times as large, and torch's have
    64 bits."""
    baseline: Literal["auto", "on", "off"] = "auto"
    """on: also train source_only with the same seed and steps, and print both; auto: on for the built-in
    scenes."""
    sync_bn: bool = False
    """Under torchrun: batch norm over the images of all processes."""
    compile: bool = False
    """torch.compile the segmentor."""
    channels_last: bool = True
    """Pixel-major weights and features: what the ops take without a copy, and what tensor cores and oneDNN
    are fastest on."""
    keep_memory: bool = True
    """On a CPU: memory that a step frees stays with the process for the next one, and is not given back to
    the system, which would clear it again (glibc only). off where other work on the machine needs it."""
    timeout: Annotated[float, Bounds(1)] = 1800.0
    """Seconds that a process of torchrun waits for the others before it stops and names them."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the target's held-out split."""

    every: Natural = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    pictures: Natural = 12
    """Pictures of predictions to leave in preds/ and to show in the report."""
    protocol: Literal["ignore", "confusion19"] = "ignore"
    """Pixels of classes that the target has and the run has not: ignore leaves them out (PLCA, FADA),
    confusion19 counts what is predicted there as false positives (ASANet, WeakSegDA, SePiCo)."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    every: Natural = 500
    """Steps between checkpoints; one is always written at the end."""
    keep: Natural = 0
    """How many older ones to keep beside last.pt, as step_<step>.pt; resuming falls back on them."""


@dataclass(frozen=True)
class LogConfig:
    """Curves."""

    every: Count = 10
    """Steps between rows of metrics.csv, each a mean over the steps since the last."""
    tensorboard: bool = True
    """Write tb/ as well."""
    report: bool = True
    """Write report.html when the run has ended."""


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on."""

    method: dict[str, Any] = field(default_factory=lambda: {"name": DEFAULT})
    """``name`` and the method's own settings."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    stages: dict[str, Any] = field(default_factory=dict)
    """Of --stages: dotted settings that differ in the stages source, adapt and distill. A flag or key=value
    holds for all three in place of what a file says of one; stages.source.train.steps=100 is of one."""

    def __post_init__(self) -> None:
        for network in self.optim.networks:
            self.optim.of(network)

    def with_train(self, **settings: Any) -> RunConfig:
        """The same run with other settings of the section ``train``."""
        train = build(TrainConfig, {**dataclasses.asdict(self.train), **settings}, "train")
        return dataclasses.replace(self, train=train)

    def method_config(self) -> Any:
        """The method's own Config.

        Raises:
            UserError: the method or one of its settings is unknown.
        """
        settings = {key: value for key, value in self.method.items() if key != "name"}
        return build(get_method(self.method["name"]).Config, settings, "method")

    def plain(self) -> dict[str, Any]:
        """Plain types, the method's defaults included; what is saved and what a checkpoint carries."""
        out = plain(dataclasses.asdict(self))
        out["method"] = {"name": self.method["name"], **plain(dataclasses.asdict(self.method_config()))}
        return out

    def to_yaml(self) -> str:
        """The resolved configuration; itself valid for ``--config``."""
        return to_yaml(self.plain())
