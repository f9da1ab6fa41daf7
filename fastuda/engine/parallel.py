"""Data-parallel training of a method's networks: shared gradients and batch-norm statistics.

Every network of ``Method.networks()`` has its own DDP wrapper, which reduces gradients only in the
network's last backward of a step. The first step shows which phase that is. A network whose last phase
does not reach all of its parameters is reduced manually after the step's last backward; so is a network
whose phases change.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastuda.methods.base import Method
from fastuda.system.ddp import CallsThrough
from fastuda.system.distributed import World

# torch 2.13 renamed the argument and deprecates the old name
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}

BUCKET = 16 << 20
"""Elements per manual all-reduce."""


def all_reduce_mean(tensors: list[Tensor], world: World) -> None:
    """Replace every tensor by its mean over the ranks, in few collectives."""
    pending: list[Tensor] = []
    for index, tensor in enumerate(tensors):
        pending.append(tensor)
        if index + 1 == len(tensors) or sum(t.numel() for t in pending) >= BUCKET:
            flat = world.sum(torch.cat([t.reshape(-1) for t in pending])) / world.size
            for t, part in zip(pending, flat.split([t.numel() for t in pending]), strict=True):
                t.copy_(part.view_as(t))
            pending = []


class Parallel:
    """Averages gradients and running statistics over the ranks; does nothing in a single process.

    Call :meth:`before` each phase is computed, :meth:`after` its backward, :meth:`reduce` after the step's
    last phase, and :meth:`share_statistics` after the optimisers' step.
    """

    def __init__(self, method: Method, networks: dict[str, nn.Module], world: World):
        self.world, self.networks = world, networks
        self.wraps: dict[str, DistributedDataParallel] = {}
        self.sequence: list[str] = []
        self.last_phase: dict[str, int] = {}
        self.shells: dict[str, CallsThrough] = {}
        self.called: dict[int, set[str]] = {}
        self.reached: dict[int, set[nn.Parameter]] | None = None
        self.norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if world.size == 1:
            return
        self.reached = {}
        for name, net in networks.items():
            # the parts of a composition contain the network as well
            places = [(m, key) for m in method.modules() for key, child in m.named_children() if child is net]
            if places and any(p.requires_grad for p in net.parameters()):
                self.wraps[name] = DistributedDataParallel(net, **NO_BUFFERS)
                self.shells[name] = CallsThrough(self.wraps[name])
                for module, key in places:
                    setattr(module, key, self.shells[name])
        parameters = {p for net in networks.values() for p in net.parameters() if p.requires_grad}
        self.hooks = [p.register_post_accumulate_grad_hook(self._reach) for p in parameters]

    def _reach(self, parameter: Tensor) -> None:
        if self.reached is not None and isinstance(parameter, nn.Parameter):
            self.reached.setdefault(len(self.sequence), set()).add(parameter)

    def before(self) -> None:
        """The next phase is about to be computed."""
        for name, wrap in self.wraps.items():
            # as DDP's no_sync(), but set before the forward: the phase's network is not known yet
            wrap.require_backward_grad_sync = self.last_phase.get(name) == len(self.sequence)

    def after(self, net: str) -> None:
        """The backward of a phase of ``net`` has run."""
        if self.reached is not None:
            self.called[len(self.sequence)] = {name for name, shell in self.shells.items() if shell.called}
            for shell in self.shells.values():
                shell.called = False
        self.sequence.append(net)

    def reduce(self) -> None:
        """Average the gradients of every network that its last backward did not reduce."""
        if self.world.size == 1:
            return
        final = {name: index for index, name in enumerate(self.sequence)}
        for name, net in self.networks.items():
            if name in final and (self.last_phase.get(name) != final[name] or name not in self.wraps):
                grads = [p.grad for p in net.parameters() if p.grad is not None]
                all_reduce_mean(grads, self.world)
        if self.reached is not None:
            self._learn(final, self.reached)
        self.sequence = []

    def _learn(self, final: dict[str, int], reached: dict[int, set[nn.Parameter]]) -> None:
        """Let DDP reduce a network in its last phase if that phase calls it and reaches all of its
        parameters on every rank."""
        for name, index in final.items():
            wanted = {p for p in self.networks[name].parameters() if p.requires_grad}
            missed = not wanted <= reached.get(index, set()) or name not in self.called[index]
            if not self.world.any(missed) and name in self.wraps:
                self.last_phase[name] = index
        self.reached = None
        for hook in self.hooks:
            hook.remove()

    def share_statistics(self) -> None:
        """Average batch norm's running statistics over the ranks, so that all ranks evaluate the same
        model."""
        if self.world.size == 1:
            return
        pairs = [(n.running_mean, n.running_var) for n in self.norms if n.training]
        statistics = [b for pair in pairs for b in pair if b is not None]
        all_reduce_mean(statistics, self.world)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all ranks on any device. torch's own needs CUDA.

    In training ``y = (x - m) / sqrt(v + eps) * weight + bias``, where ``m`` and ``v`` are the mean and
    biased variance over all ranks' pixels. A second, centred pass computes the variance.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        count = torch.tensor(float(x.numel() // x.shape[1]), dtype=torch.float64, device=x.device)
        dist.all_reduce(count)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = count.to(wide.dtype)
        mean = _summed(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = _summed(centred.square().sum((0, 2, 3))) / count
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * count / (count - 1), share)
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        y = centred * scale[:, None, None]
        return (y + self.bias[:, None, None] if self.affine else y).to(x.dtype)


class _Summed(torch.autograd.Function):
    """The sum over the ranks, whose gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


def _summed(x: Tensor) -> Tensor:
    return _Summed.apply(x)


def sync_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """``module`` with every trainable batch norm replaced by a synchronised one; the state's names stay
    the same."""
    for name, child in list(module.named_children()):
        if type(child) is nn.BatchNorm2d:  # a frozen one has its own class, and keeps its statistics
            if device.type == "cuda":
                synced: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(child)
            else:
                synced = SyncedBatchNorm2d(child.num_features, child.eps, child.momentum, child.affine)
                synced.__dict__.update(child.__dict__)
            setattr(module, name, synced)
        else:
            sync_batch_norm(child, device)
    return module
