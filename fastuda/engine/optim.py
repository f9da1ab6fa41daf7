"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from fastuda.config.schema import OptimConfig
from fastuda.errors import UserError


def build_optimizer(config: OptimConfig, network: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of one network.

    Raises:
        UserError: the implementation is not installed, or torch rejects a number.
    """
    if hasattr(network, "param_groups"):
        decay = {} if config.layer_decay == 1 else {"layer_decay": config.layer_decay}
        groups = network.param_groups(config.lr, config.head_lr_mult, **decay)  # type: ignore[operator]
    else:
        groups = [{"params": [p for p in network.parameters() if p.requires_grad], "lr": config.lr}]
    kwargs: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "sgd":
        kwargs["momentum"] = config.momentum
        cls: Any = torch.optim.SGD
    else:
        kwargs["betas"] = config.betas
        cls = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    if config.impl == "apex":
        cls = _apex(config.name)
    elif config.impl == "auto":
        kwargs["fused"] = True
    else:
        kwargs["foreach"] = True
    try:
        optimizer = cls(groups, **kwargs)
    except ValueError as error:
        raise UserError(f"{config.name} rejects the settings of optim or optim.networks: {error}") from error
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
        if cls is torch.optim.SGD and group["momentum"] and kwargs.get("fused"):
            for p in group["params"]:
                # torch leaves these uninitialised if the scaler skips step 1
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _apex(name: str) -> Any:
    try:
        from apex import optimizers

        if name == "sgd":
            return optimizers.FusedSGD
        # apex's FusedAdam is AdamW by default
        return functools.partial(optimizers.FusedAdam, adam_w_mode=name == "adamw")
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"optim.impl=apex needs NVIDIA apex built with its CUDA extensions ({error}); leave it at auto"
        ) from error


def lr_factor(config: OptimConfig, step: int, steps: int) -> float:
    """Factor of the learning rate at ``step``, counted from 0."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return warm
    return warm * max(0.0, 1 - step / (config.horizon or steps)) ** config.power


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
