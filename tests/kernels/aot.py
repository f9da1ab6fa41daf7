"""Compile what the launchers launch, for a GPU that is not there, and report what the compiler made of it.

    python tests/kernels/aot.py [--arch 80 90] [--only SUBSTRING] [--all]

The launchers run on CPU tensors under a stand-in driver that compiles every kernel with its real
specialisation and launches nothing. Prints one JSON line per compiled kernel: registers, stack, shared
memory, and the tensor-core instructions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget

LIMIT = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that a block may have."""
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    """What the JIT asks of a driver; a launch does nothing."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # the JIT caches by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": LIMIT[device]}

    def load_binary(self, *_: object) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024

    def launcher_cls(self, *_: object) -> object:
        return lambda *args: None


def resources(kernel) -> dict[str, object]:
    """Registers, stack (spilled registers lie there), shared memory, tensor-core instructions, the widths of
    global stores in bytes, and the barriers and shuffles inside loops."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [BIN / "cuobjdump", "--dump-resource-usage", "--dump-sass", cubin.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report).groups()
    stores = re.findall(r"st\.global(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
    looped = looped_instructions(report)
    return {
        "kernel": kernel.metadata.name,
        "arch": kernel.metadata.target.arch,
        "warps": kernel.metadata.num_warps,
        "registers": int(registers),
        "stack": int(stack),
        "shared": kernel.metadata.shared,
        "stores": sorted({int(count or 1) * int(bits) // 8 for count, bits in stores}),
        "barriers": sum(name.startswith("BAR") for name in looped),
        "shuffles": sum(name.startswith("SHFL") for name in looped),
        "products": sorted(set(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync\.[\w.]+", kernel.asm["ptx"]))),
    }


def looped_instructions(sass: str) -> list[str]:
    """The instructions between the target of a backward branch and the branch."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+ )?([^;]+);", sass)
    places = [(int(address, 16), text) for address, text in lines]
    looped: set[int] = set()
    for address, text in places:
        target = re.match(r"BRA.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            looped.update(range(int(target[1], 16), address + 1))
    return [text for address, text in places if address in looped]


LOSSES = {80: torch.float32, 90: torch.bfloat16}
"""A loss widens what it reads: its dtype changes a load, and one for each GPU will do."""


def launches(arch: int, everything: bool) -> Iterator[tuple[torch.dtype, str, Callable[[], object]]]:
    """What to compile for ``arch``: each op and similarity, in every dtype or where the dtype matters."""
    if arch not in LOSSES:  # what differs there is how much memory a tile may take
        for name, call in tile_launches(torch.bfloat16).items():
            if everything or name.endswith("cosine"):
                yield torch.bfloat16, name, call
        return
    for dtype in (torch.bfloat16, torch.float32):
        # float32 tiles are the same for both GPUs, and bfloat16's KL is float32 inside
        calls = tile_launches(dtype) if everything or (arch, dtype) != (90, torch.float32) else {}
        losses = loss_launches(dtype)
        if everything or dtype == LOSSES[arch]:
            calls |= losses
        calls["lovasz softmax"] = losses["lovasz softmax"]
        for name, call in calls.items():
            yield dtype, name, call


def tile_launches(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One call per low-level op of similarity tiles, at the widths that matter; the kernels do not run, so
    the sizes are small and the values meaningless. The number of pixels is odd, as that of crops often is,
    and of the cosine there are two images, whose vectors then begin anywhere."""
    from fastuda.kernels import cycle_association_loss as association
    from fastuda.kernels import cycle_match
    from fastuda.kernels import spatial_aggregate as aggregate

    x = torch.rand(2, 265, 2048).to(dtype)
    p = torch.rand(1, 265, 19).softmax(-1).to(dtype)
    wide = torch.rand(1, 265, 80).softmax(-1).to(dtype)
    calls: dict[str, Callable[[], object]] = {}
    features = {"cosine": x, "kl": p}
    if dtype == torch.float32:
        features |= {"kl wide": wide, "kl 64": wide[..., :64].contiguous()}
    for name, y in features.items():
        kind = name.split(" ")[0]
        stat = torch.rand(y.shape[:2]) + 0.5
        index = torch.randint(0, 265, y.shape[:2])
        residuals = (stat, stat, index, index, stat, stat, stat, stat)
        if " " not in name:  # of other widths only the gradients are kernels of their own
            calls[f"match {name}"] = partial(cycle_match.cycle_match_fwd, y, y, kind)
            calls[f"association forward {name}"] = partial(
                association.cycle_association_loss_fwd, y, y, kind, True
            )
        calls[f"association backward {name}"] = partial(
            association.cycle_association_loss_bwd, y, y, *residuals, kind
        )
        calls[f"aggregate forward {name}"] = partial(
            aggregate.spatial_aggregate_fwd, y, kind, name == "cosine", 0.5
        )
        calls[f"aggregate backward {name}"] = partial(
            aggregate.spatial_aggregate_bwd, y, y, y, stat, stat, kind, 0.5
        )
        if kind == "cosine" and dtype == torch.bfloat16:
            multiplied = {key: call for key, call in calls.items() if not key.startswith("match")}
            for key, call in multiplied.items():
                calls[key.replace("cosine", "library")] = partial(call, library=True)
    return calls


def loss_launches(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """As :func:`tile_launches`, of the row soft-max, the losses and the statistics."""
    from fastuda.kernels import affinity_cleaning_loss as cleaning
    from fastuda.kernels import (
        aspp,
        category_pool,
        class_statistics,
        depthwise_conv2d,
        smooth_max_pool,
        upsample_confusion,
        upsample_cross_entropy,
    )
    from fastuda.kernels import contrast_softmax as softmax
    from fastuda.kernels import domain_cross_entropy as domain
    from fastuda.kernels import local_affinity as affinity
    from fastuda.kernels import lovasz_softmax as lovasz
    from fastuda.kernels import prototype_contrast as contrast

    x = torch.randn(1, 19, 16, 16).to(dtype)
    labels = torch.zeros(1, 128, 128, dtype=torch.long)
    maps = torch.rand(1, 19, 32, 32).to(dtype)
    soft, pixels = torch.rand(1, 19, 128, 128), torch.rand(1, 128, 128)
    entropy = upsample_cross_entropy.upsample_cross_entropy_fwd
    plane = torch.zeros(1, 19)
    moments = class_statistics.class_statistics_fwd
    features, classes_of = torch.rand(256, 512).to(dtype), labels[0, :2].flatten()
    calls: dict[str, Callable[[], object]] = {
        "class statistics": partial(moments, features, classes_of, 19, 255),
        "smooth max forward": partial(smooth_max_pool.smooth_max_pool_fwd, x, 1.0),
        "smooth max backward": partial(smooth_max_pool.smooth_max_pool_bwd, plane, x, plane, 1.0),
        "affinity cleaning": partial(cleaning.affinity_cleaning_loss_fwd, maps.float(), 8, True),
    }
    for width in (8464, 40000):
        rows = torch.rand(4, width).to(dtype)
        calls[f"contrast softmax forward {width}"] = partial(softmax.contrast_softmax_fwd, rows, 1e-10)
        calls[f"contrast softmax backward {width}"] = partial(
            softmax.contrast_softmax_bwd, rows, rows, torch.rand(4)
        )
    scores = torch.randn(1, 256, 19).to(dtype)
    calls["category pool forward"] = partial(category_pool.category_pool_fwd, features[None], scores)
    pooled = torch.rand(1, 19, 512)
    calls["category pool backward"] = partial(
        category_pool.category_pool_bwd, pooled, features[None], scores, pooled, plane, True, True
    )
    maps_of_features, taps = torch.randn(1, 64, 16, 16).to(dtype), torch.rand(4, 3, 3, 19, 64)
    calls["aspp forward"] = partial(aspp.aspp_fwd, maps_of_features, taps, plane[0], [6, 12, 18, 24])
    calls["aspp backward"] = partial(aspp.aspp_bwd, x, maps_of_features, taps, [6, 12, 18, 24], True, True)
    for stride in (1, 2):
        y, rest = maps_of_features[..., ::stride, ::stride], (torch.rand(64, 1, 3, 3), stride, 2, 2)
        calls[f"depthwise forward {stride}"] = partial(
            depthwise_conv2d.depthwise_conv2d_fwd, maps_of_features, rest[0], None, *rest[1:]
        )
        calls[f"depthwise backward {stride}"] = partial(
            depthwise_conv2d.depthwise_conv2d_bwd, y, maps_of_features, *rest, True, True
        )
    mean, share = torch.rand(19, 512), torch.rand(256, 19)
    bank, count = torch.rand(19, 40, 512), torch.full((19,), 40)
    for name, variance in (("proto", None), ("dist", mean)):
        rest = (mean, variance, 100.0, 255)
        calls[f"prototype contrast forward {name}"] = partial(
            contrast.prototype_contrast_fwd, features, classes_of, *rest
        )
        calls[f"prototype contrast backward {name}"] = partial(
            contrast.prototype_contrast_bwd, mean[0, 0], features, classes_of, share, *rest
        )
    calls["bank contrast"] = partial(
        contrast.prototype_contrast_bank_fwd, features, classes_of, bank, count, 100.0, 255, True
    )
    calls["lovasz softmax"] = partial(lovasz.lovasz_softmax_fwd, x, labels, True, False, 255, True)
    pair = torch.randn(1, 38, 16, 16).to(dtype)
    for name, threshold in (("soft", None), ("hard", 0.5)):
        rest = (19, 128, 128, True, 1.8, 0.9, threshold, True)
        calls[f"domain cross-entropy {name}"] = partial(domain.domain_cross_entropy_fwd, pair, x, *rest)
    for name, planes, rest in (("", 8 * 19, (8, 1, False)), (" far product", 4, (4, 3, True))):
        weight = torch.rand(1, planes, 32, 32)
        calls[f"local affinity forward{name}"] = partial(affinity.local_affinity_fwd, maps, *rest)
        calls[f"local affinity backward{name}"] = partial(affinity.local_affinity_bwd, weight, maps, *rest)
    for name, target, weight, gradient in (
        ("hard", labels, None, True),
        ("hard weighted", labels, pixels, True),
        ("soft", soft, None, True),
        ("value", labels, None, False),
    ):
        rest = (False, 1.0, 255, 0.0, gradient, not gradient)
        calls[f"upsample cross-entropy {name}"] = partial(entropy, x, target, None, weight, *rest)
    for classes in (19, 100):
        scores = torch.zeros(1, classes, 16, 16).to(dtype)
        calls[f"upsample confusion {classes}"] = partial(
            upsample_confusion.upsample_confusion_fwd, scores, labels, False, 255
        )
        rest = (False, 1.0, 255, 0.0, True, False)
        calls[f"upsample cross-entropy {classes} classes"] = partial(
            entropy, scores, labels, None, None, *rest
        )
    return calls


def compiled(arch: int) -> list[object]:
    """Every kernel compiled so far for ``arch``."""
    found = []
    for module in [m for name, m in sys.modules.items() if name.startswith("fastuda.kernels")]:
        for fn in vars(module).values():
            if isinstance(fn, triton.JITFunction) and fn.__module__ == module.__name__:
                found += list(fn.device_caches[arch][0].values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=[80, 90])
    parser.add_argument("--only", default="")
    parser.add_argument("--all", action="store_true", help="every dtype on every GPU")
    args = parser.parse_args()
    from fastuda.kernels import _aggregate_symmetric, _common

    _aggregate_symmetric.Blocks.most = lambda *_: 128  # pairs of blocks beside the diagonal
    for arch in args.arch:
        triton.runtime.driver.set_active(Driver(arch))
        _common.generation = lambda x, arch=arch: arch // 10
        _common.shared_memory = lambda x, arch=arch: LIMIT[arch]
        seen: set[int] = set()
        for dtype, name, call in launches(arch, args.all):
            if args.only in name:
                call()
                for kernel in compiled(arch):
                    if id(kernel) not in seen:
                        seen.add(id(kernel))
                        row = {"call": name, "dtype": str(dtype).removeprefix("torch."), **resources(kernel)}
                        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
