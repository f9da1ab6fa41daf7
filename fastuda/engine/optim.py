"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from fastuda.config.schema import OptimConfig
from fastuda.config.settings import build
from fastuda.errors import UserError


def network_config(config: OptimConfig, network: str) -> OptimConfig:
    """The settings of one network.

    Raises:
        UserError: ``optim.networks`` holds an unknown setting.
    """
    own = config.networks.get(network, {})
    if not isinstance(own, dict):
        raise UserError(f"optim.networks.{network} must be a section of settings, got {own!r}")
    base = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "networks"}
    return build(OptimConfig, {**base, **own}, f"optim.networks.{network}")


def build_optimizer(config: OptimConfig, network: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of one network.

    Raises:
        UserError: the optimiser or implementation is unknown or not installed, or a number is out of range.
    """
    if hasattr(network, "param_groups"):
        groups = network.param_groups(config.lr, config.head_lr_mult)  # type: ignore[operator]
    else:
        groups = [{"params": [p for p in network.parameters() if p.requires_grad], "lr": config.lr}]
    kwargs: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "sgd":
        kwargs["momentum"] = config.momentum
        cls: Any = torch.optim.SGD
    elif config.name in ("adam", "adamw"):
        kwargs["betas"] = config.betas
        cls = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    else:
        raise UserError(f"unknown optimiser {config.name!r}: choose sgd, adamw or adam")
    if config.impl == "apex":
        cls = _apex(config.name)
    elif config.impl == "auto":
        kwargs["fused"] = True
    elif config.impl == "foreach":
        kwargs["foreach"] = True
    else:
        raise UserError(f"unknown optim.impl {config.impl!r}: choose auto, foreach or apex")
    try:
        optimizer = cls(groups, **kwargs)
    except ValueError as error:
        raise UserError(f"{config.name} refuses what optim or optim.networks says: {error}") from error
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
        if cls is torch.optim.SGD and group["momentum"] and kwargs.get("fused"):
            for p in group["params"]:
                # torch's own come from empty memory, which a first step that the scaler skips leaves in use
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _apex(name: str) -> Any:
    try:
        from apex import optimizers

        if name == "sgd":
            return optimizers.FusedSGD
        # apex's Adam decays weights as AdamW does unless told not to
        return functools.partial(optimizers.FusedAdam, adam_w_mode=name == "adamw")
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"optim.impl=apex needs NVIDIA apex built with its CUDA extensions ({error}); leave it at auto"
        ) from error


def lr_factor(config: OptimConfig, step: int, steps: int) -> float:
    """What the learning rate of ``step`` (from 0) is multiplied with.

    Raises:
        UserError: the schedule is unknown.
    """
    if config.schedule not in ("poly", "constant"):
        raise UserError(f"unknown optim.schedule {config.schedule!r}: choose poly or constant")
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return warm
    return warm * max(0.0, 1 - step / (config.horizon or steps)) ** config.power


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
