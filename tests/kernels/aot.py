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

from fastuda.ops._backends import BACKENDS, launcher
from tests.cases import case, every

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


LOSSES = {80: torch.float32, 90: torch.bfloat16, 120: torch.float32}
"""A loss widens what it reads: its dtype changes a load, and one for each GPU will do."""


def launches(arch: int, everything: bool) -> Iterator[tuple[torch.dtype, str, Callable[[], object]]]:
    """What to compile for ``arch``: each op and similarity, in every dtype or where the dtype matters. The
    kernels do not run, so the sizes are small and the values meaningless."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for op, name, operator, *args in every("compiled", dtype):
            call = partial(launcher(op, operator), *args)
            by_library = any(row.name == "library" for row in BACKENDS[op])
            if dtype == torch.float16:  # its gradients are scaled; all else is bfloat16's, but for the load
                wanted = by_library and name.endswith("backward cosine")
            elif by_library:
                # float32 tiles are those of sm_80, and bfloat16's KL is float32 inside
                wanted = everything or (arch, dtype) != (90, torch.float32)
            else:
                wanted = everything or dtype == LOSSES[arch] or getattr(case(op), "EVERY_DTYPE", False)
            if wanted:
                yield dtype, name, call
            if wanted and dtype == torch.bfloat16 and name.endswith("cosine") and op != "cycle_match":
                yield dtype, name.replace("cosine", "library"), partial(call, library=True)


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
