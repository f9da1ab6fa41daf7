"""What the op tests share: inputs, literal formulas in any dtype, the error budget and the backends to
judge."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastuda.ops as F
from tests.cases import case, good

EPS = {
    torch.float64: 2.3e-16,
    torch.float32: 1.2e-7,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


def cpu_backends(op: str) -> list:
    """The implementations of ``op`` that can run on the CPU here, as pytest parameters."""
    names = [row.name for row in F.backends(op, torch.zeros(1, 1, 1)) if row.usable]
    names = [name for name in dict.fromkeys([*names, "reference"]) if name not in ("triton", "library")]
    return [pytest.param(name, id=name) for name in names]


def flat(results: Any) -> list[Tensor]:
    """The tensors of what an op returns."""
    if isinstance(results, Tensor):
        return [results]
    parts = vars(results).values() if dataclasses.is_dataclass(results) else results
    return [x for part in parts for x in flat(part)]


def tensors(op: str) -> list[str]:
    """The arguments of an op that are tensors."""
    return [name for name, value in good(op).items() if isinstance(value, Tensor)]


def run(op: str, backend: str, arguments: dict[str, Any], around: Any = lambda call: call) -> list[Tensor]:
    """Results of an op and its gradients; ``around`` may wrap the call."""
    names = tensors(op)[: getattr(case(op), "GRADIENTS", 1)]
    leaves = [arguments[name].detach().requires_grad_() for name in names]
    rest = {name: value for name, value in arguments.items() if name not in names}

    def call(*leaves: Tensor) -> Any:
        return getattr(F, op)(**dict(zip(names, leaves, strict=True)), **rest, backend=backend)

    results = flat(around(call)(*leaves))
    if not leaves:
        return results
    assert results[0].requires_grad
    weight = torch.linspace(0.5, 1.5, results[0].numel()).reshape(results[0].shape)
    return [*results, *torch.autograd.grad((results[0] * weight).sum(), leaves)]


def at(x: Tensor | None) -> ctypes.c_void_p:
    """Where its values are, for a function of C."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def wave(shape: tuple[int, ...], a: float) -> Tensor:
    """``sin(a k k / 7 + k + 0.3)`` in float64: the inputs of the published test vectors."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(a * k * k / 7 + k + 0.3).reshape(shape)


def rows(b: int, n: int, c: int, seed: int = 0, kind: str = "cosine") -> Tensor:
    """Random features [B, N, C] in float64, or probabilities."""
    x = torch.randn(b, n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * x).softmax(-1) if kind == "kl" else x


def similarity(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """Literal [B, N, M] similarity in the dtype of the inputs."""
    if kind == "cosine":
        return (a / a.norm(dim=-1, keepdim=True)) @ (b / b.norm(dim=-1, keepdim=True)).transpose(1, 2)
    a, b = a[:, :, None], b[:, None]
    return -(a * ((a + 1e-10).log() - (b + 1e-10).log())).sum(-1)


def contrast_normalised(sim: Tensor) -> Tensor:
    """Literal (D - mean) / (std + 1e-10), statistics detached."""
    mean = sim.detach().mean(-1, keepdim=True)
    return (sim - mean) / (sim.detach().std(-1, keepdim=True) + 1e-10)


def within_budget(found: Tensor, plain: Tensor, truth: Tensor, name: str, dtype: torch.dtype) -> None:
    """Error against float64 at most twice that of plain torch in the same dtype, plus one rounding band."""
    truth = truth.double()
    error = (found.double() - truth).abs().max().item()
    if dtype == torch.float64:
        assert error <= 1e-11 * max(1.0, truth.abs().max().item()), f"{name}: error {error:.3g} in float64"
        return
    budget = 2 * (plain.double() - truth).abs().max().item() + 8 * EPS[dtype] * truth.abs().max().item()
    assert torch.isfinite(found).all(), f"{name} is not finite"
    assert error <= budget, f"{name}: error {error:.3g} is over the budget {budget:.3g}"


def value_and_gradient(function: Any, x: Tensor, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Of a function of an input and a backend; the value alone where it has no gradient."""
    leaf = x.detach().to(dtype, copy=True).requires_grad_()
    value = function(leaf, backend)
    weight = torch.linspace(-1, 2, value.numel(), device=x.device).reshape(value.shape).to(value.dtype)
    return [value.detach(), *(torch.autograd.grad(value, leaf, weight) if value.requires_grad else ())]


def judge(function: Any, x: Tensor, found: list[Tensor], name: str = "") -> None:
    """Hold the :func:`value_and_gradient` of ``x`` to the budget. A value in the input's dtype is rounded to
    it."""
    assert found[-1].dtype in (x.dtype, torch.float32)
    plain = value_and_gradient(function, x, "reference", x.dtype)
    truth = value_and_gradient(function, x, "reference", torch.float64)
    for part, *three in zip((f"value {name}", f"gradient {name}"), found, plain, truth, strict=False):
        within_budget(*three, part, x.dtype if three[0].dtype == x.dtype else torch.float32)


def as_good_match(index: Tensor, sim: Tensor, slack: float) -> None:
    """Each argmax reaches the best similarity of its row, up to ``slack``; judged in float64."""
    reached = sim.gather(-1, index[..., None])[..., 0]
    short = (sim.amax(-1) - reached).max().item()
    assert short <= slack, f"a match is {short:.3g} below the best (allowed {slack:.3g})"


def count_parameters(module: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())
