"""The configuration of a run as nested frozen dataclasses, whose types declare the allowed values."""

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
    """Optimiser and schedule. ``networks`` overrides settings for single networks."""

    name: Literal["sgd", "adamw", "adam"] = "sgd"
    """The optimiser."""
    lr: NonNegative = 2.5e-4
    """Learning rate of the backbone."""
    head_lr_mult: NonNegative = 1.0
    """Factor of the segmentation head's learning rate."""
    layer_decay: Annotated[float, Bounds(0, 1, open_below=True)] = 1.0
    """Factor of a block's learning rate for each backbone block after it (VFM-UDA++: 0.9); 1: all blocks have
    the same rate."""
    momentum: NonNegative = 0.9
    """Momentum of sgd."""
    weight_decay: NonNegative = 5e-4
    """L2 penalty for sgd and adam, decoupled weight decay for adamw."""
    betas: Annotated[tuple[float, float], Bounds(0, 1, open_above=True)] = (0.9, 0.999)
    """Betas of adam and adamw."""
    schedule: Literal["poly", "constant"] = "poly"
    """poly: lr * (1 - step / horizon) ** power; or constant."""
    power: NonNegative = 0.9
    """Exponent of poly."""
    horizon: Count | None = None
    """Step at which poly reaches zero; default: train.steps. (PLCA stops before its horizon.)"""
    warmup: Natural = 0
    """Steps of linear warm-up."""
    clip_norm: NonNegative | None = None
    """Clip the gradient norm of each network to this value."""
    impl: Literal["auto", "foreach", "apex"] = "auto"
    """auto (torch's fused implementation if there is one), foreach, or apex (FusedSGD, if apex is
    installed)."""
    networks: dict[str, Any] = field(default_factory=dict)
    """Settings per network of the method, e.g. {discriminator: {name: adam, lr: 1.0e-4}}."""

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
    """off, bf16 or fp16 (with a loss scaler). If the machine only emulates it, float32 is used; force-bf16
    and force-fp16 override this."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: Annotated[int, Bounds(0, 10**16)] = 0
    """Seed of weights, samples and augmentation. Ranks use a thousand times the seed plus their number,
    which must fit in 64 bits."""
    baseline: Literal["auto", "on", "off"] = "auto"
    """on: also train source_only with the same seed and steps, and print both. auto: on for the built-in
    scenes."""
    sync_bn: bool = False
    """Compute the statistics of batch norm over the images of all torchrun processes."""
    compile: bool = False
    """Compile the segmentor with torch.compile. The first step then takes up to minutes; on a CPU no gain was
    measured."""
    channels_last: bool = True
    """Channels-last weights and features: the ops need no copy, and tensor cores and oneDNN are fastest."""
    keep_memory: bool = True
    """On a CPU with glibc: keep the memory that a step frees for the next one, instead of returning it to
    the system, which clears it again. Set it to false if other programs need the memory."""
    timeout: Annotated[float, Bounds(1)] = 1800.0
    """Seconds that a torchrun process waits for the others before it stops and names them."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the target's held-out split."""

    every: Natural = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    pictures: Natural = 12
    """Number of pictures of predictions in preds/ and in the report."""
    logit_adjustment: NonNegative = 0.0
    """Weight tau of ``scores - tau ln(class_shares)`` in predictions, in favour of rare classes (Menon et
    al., ICLR 2021); 1: as if all classes were equally frequent; 0: off."""
    class_shares: tuple[NonNegative, ...] | None = None
    """Share of each class among the source's labelled pixels, for ``logit_adjustment``; null: counted when
    the run begins, and saved in its config.yaml."""
    protocol: Literal["ignore", "confusion19"] = "ignore"
    """Treatment of pixels whose class the run does not have: ignore leaves them out (PLCA, FADA),
    confusion19 counts predictions there as false positives (ASANet, WeakSegDA, SePiCo)."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    every: Natural = 500
    """Steps between checkpoints. One is always written at the end."""
    keep: Natural = 0
    """Number of older checkpoints to keep beside last.pt, as step_<step>.pt. Resuming falls back on them."""


@dataclass(frozen=True)
class LogConfig:
    """Curves."""

    every: Count = 10
    """Steps between rows of metrics.csv; each row is a mean over these steps."""
    tensorboard: bool = True
    """Write TensorBoard files to tb/ as well."""
    report: bool = True
    """Write report.html at the end of the run."""


@dataclass(frozen=True)
class RunConfig:
    """The complete configuration of a run."""

    method: dict[str, Any] = field(default_factory=lambda: {"name": DEFAULT})
    """``name``, and the method's own settings."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    stages: dict[str, Any] = field(default_factory=dict)
    """Dotted settings for the stages source, adapt and distill of --stages. A flag or key=value applies to
    all three stages and overrides the file; stages.source.train.steps=100 sets one."""

    def __post_init__(self) -> None:
        for network in self.optim.networks:
            self.optim.of(network)

    def with_train(self, **settings: Any) -> RunConfig:
        """The run with other settings of the section ``train``."""
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
        """The configuration as plain types, including the method's defaults, as saved in files and
        checkpoints."""
        out = plain(dataclasses.asdict(self))
        out["method"] = {"name": self.method["name"], **plain(dataclasses.asdict(self.method_config()))}
        return out

    def to_yaml(self) -> str:
        """The resolved configuration, which is valid for ``--config``."""
        return to_yaml(self.plain())
