"""The precision of training and prediction: half precision only if it is faster than float32.

A processor without bf16 or fp16 instructions emulates them, several times slower than float32. ``--amp``
requests half precision, and :func:`choose` uses it only if it is faster.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

log = logging.getLogger("fastuda")

DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Name of a precision to autocast's dtype."""


class Support(NamedTuple):
    """Whether a device is faster in half precision than in float32, and the reason."""

    pays: bool
    reason: str


def choose(amp: str, device: torch.device, setting: str = "--amp") -> str:
    """The precision to run in: ``off``, ``bf16`` or ``fp16``.

    If half precision is slower than float32 on the device, the result is ``off``, with one warning.
    ``force-`` overrides this.

    Args:
        amp: off, bf16, fp16, force-bf16 or force-fp16.
        device: where the network runs.
        setting: the flag or key to name in messages.
    """
    name = amp.removeprefix("force-")
    if name in ("off", amp.partition("force-")[2]):
        return name
    supported = support(name, device.type, device.index)
    if supported.pays:
        return name
    _warn_once(f"{supported.reason}: running in float32 ({setting}=force-{name} to insist)")
    return "off"


@functools.cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


@functools.cache
def support(name: str, kind: str, index: int | None = None) -> Support:
    """Whether ``bf16`` or ``fp16`` is faster than float32 on a device of this kind and index.

    The processor's instructions decide, or a measurement if they are unknown. Cached per process.
    """
    if kind == "cuda":
        # fp16 runs at twice float32's rate on every GPU that torch supports, bf16 from compute capability 8.0
        major, minor = torch.cuda.get_device_capability(index)
        native = name == "fp16" or major >= 8 or torch.version.hip is not None
        how = "native" if native else "emulated"
        return Support(native, f"{name} is {how} on this GPU (sm_{major}{minor})")
    if kind != "cpu":
        return Support(True, f"{name} is not measured on {kind}")
    query = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    if query is None or not query():
        return Support(False, f"{name} is emulated on this CPU")
    if name == "bf16" and "ONEDNN_MAX_CPU_ISA" not in os.environ and _has_bf16_instructions():
        return Support(True, "bf16 is native on this CPU")
    ratio = measure(DTYPES[name])
    return Support(ratio > 1, f"{name} runs at {ratio:.1f} times the rate of float32 on this CPU")


def _has_bf16_instructions() -> bool:
    """Instruction sets of x86. oneDNN also accepts AVX-512 without them and then converts every operand."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def measure(dtype: torch.dtype | None, seconds: float = 0.05) -> float:
    """Speed of a convolution and a product with their gradients in ``dtype``, relative to float32.

    The two precisions alternate for about ``seconds``; the fastest run of each counts.
    """
    work = {kind: _workload(kind) for kind in (torch.float32, dtype)}
    best = dict.fromkeys(work, float("inf"))
    for run in work.values():
        run()  # oneDNN generates its code
    end = time.perf_counter() + seconds
    for _ in range(50):
        for kind, run in work.items():
            began = time.perf_counter()
            run()
            best[kind] = min(best[kind], time.perf_counter() - began)
        if time.perf_counter() > end:
            break
    return best[torch.float32] / best[dtype]


def _workload(dtype: torch.dtype | None) -> Callable[[], None]:
    image = torch.ones(1, 64, 32, 64, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.ones(64, 64, 3, 3, dtype=dtype, requires_grad=True)
    rows = torch.ones(512, 512, dtype=dtype, requires_grad=True)

    def run() -> None:
        total = torch.nn.functional.conv2d(image, weight, padding=1).mean() + (rows @ rows).mean()
        torch.autograd.grad(total, (image, weight, rows))

    return run
