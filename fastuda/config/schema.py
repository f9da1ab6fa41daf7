"""A run's configuration: nested frozen dataclasses, YAML files, flags and dotted overrides, checked key by
key.

Order: dataclass defaults < the method's own defaults < ``--config`` < flags < ``key=value``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fastuda.config.settings import build, plain
from fastuda.data.config import DataConfig
from fastuda.data.loading.transforms import FILTERS
from fastuda.errors import UserError
from fastuda.methods import DEFAULT, get_method
from fastuda.models.build import ModelConfig
from fastuda.system.yaml import to_yaml


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule; ``networks`` replaces single settings for single networks."""

    name: str = "sgd"
    """sgd, adamw or adam."""
    lr: float = 2.5e-4
    """Learning rate of the backbone."""
    head_lr_mult: float = 1.0
    """The segmentation head's learning rate is this times lr."""
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 5e-4
    """L2 for sgd and adam, decoupled for adamw."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of adam and adamw."""
    schedule: str = "poly"
    """poly: lr * (1 - step / horizon) ** power; or constant."""
    power: float = 0.9
    """Of poly."""
    horizon: int | None = None
    """Step where poly would reach zero; none is train.steps (PLCA stops before its horizon)."""
    warmup: int = 0
    """Steps of linear warm-up."""
    clip_norm: float | None = None
    """Largest gradient norm of a network."""
    impl: str = "auto"
    """auto (torch's fused implementation where it has one), foreach, or apex (FusedSGD, where apex is
    installed)."""
    networks: dict[str, Any] = field(default_factory=dict)
    """Per network of the method: e.g. {discriminator: {name: adam, lr: 1.0e-4}}."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 10000
    """Optimiser steps."""
    accumulate: int = 1
    """Batches per optimiser step."""
    amp: str = "off"
    """off, bf16 or fp16 (with a loss scaler)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Of weights, samples and augmentation."""
    baseline: str = "auto"
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
    timeout: float = 1800.0
    """Seconds that a process of torchrun waits for the others before it stops and names them."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the target's held-out split."""

    every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    pictures: int = 12
    """Pictures of predictions to leave in preds/ and to show in the report."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    every: int = 500
    """Steps between checkpoints; one is always written at the end."""
    keep: int = 0
    """How many older ones to keep beside last.pt, as step_<step>.pt; resuming falls back on them."""


@dataclass(frozen=True)
class LogConfig:
    """Curves."""

    every: int = 10
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


AT_LEAST = {
    "train.steps": 1,
    "train.accumulate": 1,
    "train.seed": 0,
    "data.batch_size": 1,
    "data.workers": 0,
    "data.max_bad": 0,
    "data.jitter": 0,
    "data.jitter_hue": 0,
    "data.flip": 0,
    "data.check_labels": 0,
    "data.rare_share": 0,
    "data.max_class_share": 0,
    "model.aspp_init_std": 0,
    "log.every": 1,
    "eval.every": 0,
    "eval.pictures": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 0,
    "optim.lr": 0,
    "optim.head_lr_mult": 0,
    "optim.momentum": 0,
    "optim.weight_decay": 0,
    "optim.power": 0,
    "optim.horizon": 1,
    "optim.warmup": 0,
    "optim.clip_norm": 0,
    "train.timeout": 1,
}
"""Dotted setting to its smallest value, where it has one at all."""
AT_MOST = {
    "train.seed": 10**16,  # the ranks' seeds are a thousand times as large, and torch's have 64 bits
    "data.flip": 1,
    "data.max_class_share": 1,
}
"""Likewise to its largest."""


def _setting(run: RunConfig, dotted: str) -> Any:
    section, _, name = dotted.partition(".")
    return getattr(getattr(run, section), name)


def _leaves(values: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no section and no list, with its dotted key."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _leaves(value, f"{where}.{key}" if where else str(key))
    elif isinstance(values, list):
        for value in values:
            yield from _leaves(value, where)
    else:
        yield where, values


def check_ranges(run: RunConfig) -> None:
    """Raises:
    UserError: a setting is below its smallest value or above its largest, a number is not finite, or a range
        or size is none.
    """
    for key, least in AT_LEAST.items():
        value = _setting(run, key)
        if value is not None and not value >= least:
            raise UserError(f"{key} is {value}; it must be at least {least}")
    for key, most in AT_MOST.items():
        if not _setting(run, key) <= most:
            raise UserError(f"{key} is {_setting(run, key)}; it must be at most {most}")
    if run.data.rare_temperature <= 0:
        raise UserError(f"data.rare_temperature is {run.data.rare_temperature:g}; it must be above 0")
    if not all(0 <= beta < 1 for beta in run.optim.betas):
        raise UserError(f"optim.betas is {list(run.optim.betas)}; both are from 0 to below 1")
    for key, value in _leaves(run.plain()):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} is {value}; it must be a finite number")
    if run.data.resampling not in FILTERS:
        raise UserError(f"data.resampling is {run.data.resampling!r}: choose {' or '.join(FILTERS)}")
    for name in ("source_resize", "target_resize", "source_size", "target_size", "eval_size"):
        edges = getattr(run.data, name)
        if edges is not None and min(edges) < 1:
            raise UserError(f"data.{name} is {list(edges)}; both must be at least 1")
        if edges is not None and name.endswith("resize") and edges[0] > edges[1]:
            raise UserError(f"data.{name} is {list(edges)}; the smaller edge comes first")
    for name, crop in (("crop", run.data.crop), ("target_crop", run.data.target_crop)):
        if crop is not None and min(crop) < 8:
            raise UserError(f"data.{name} is {list(crop)}; the network's stride needs at least 8 x 8")
