"""Build in advance, on a machine without a GPU, what a machine with a GPU would spend its first minutes on:
the CUDA library, and the compiled Triton kernels, with their launchers, that the tests and the bench need.

The kernels are reused only by the same Triton and Python, so build the kit with the versions of the GPU
machine, e.g. `make gpu-kit PYTHON=python3.12`, and after the last change: the library is reused only with the
same sources, and a kernel that has changed is compiled again. bench.gpu_check says what does not fit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.machine import commit
from fastuda import cli
from fastuda.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = """\
  python -m bench.gpu_kit                      # into build/gpu-kit, for a GPU of compute capability 9.0
  python -m bench.gpu_kit --arch 80 --only entropy"""
STAND_IN = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void** s) { *s = nullptr; return 0; }'


def triton_identity() -> str:
    """The hash of Triton's own files that is part of the key of compiled kernels."""
    from triton.runtime import cache

    return hashlib.sha256(cache.triton_key().encode()).hexdigest()[:16]


def sources() -> str:
    """The hash of the sources of the CUDA library; a GPU machine without .git does not know its commit."""
    csrc = ROOT / "csrc"
    files = sorted([*csrc.glob("*.h"), *csrc.glob("cuda/*.*")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def facts(kit: Path) -> dict[str, Any]:
    """What a kit was made of; empty without a kit."""
    path = kit / "kit.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def commit_of(kit: Path) -> str:
    """The commit of the checkout, or of the kit where there is no .git; empty if unknown."""
    with suppress(ValueError, OSError):  # bench.gpu_check reports a kit that cannot be read
        return commit() or facts(kit).get("commit", "")
    return ""


def compiled(cache: Path) -> int:
    """The number of compiled kernels in Triton's cache."""
    return sum(1 for _ in cache.rglob("*.cubin"))


def build_library(folder: Path, arch: int) -> str:
    """Build ``_cuda.so`` in ``folder``. Returns why this is not possible, or the empty string.

    A torch without CUDA has no library to link against. An empty library of the same name takes its place,
    and the loader later uses the real one.
    """
    recipe = runpy.run_path(str(ROOT / "csrc" / "cuda" / "build.py"))
    compiler = recipe["nvcc"]()
    if compiler is None:
        return "no nvcc was found"
    from torch.utils.cpp_extension import include_paths, library_paths

    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    (work / "stand_in.cpp").write_text(STAND_IN, encoding="utf-8")
    name = "libtorch_cuda.so"
    options = ["-shared", "-fPIC", "-x", "c++", f"-Wl,-soname,{name}"]
    os.environ["FASTUDA_CUDA_ARCH"] = str(arch)
    try:
        subprocess.run(
            ["g++", *options, str(work / "stand_in.cpp"), "-o", str(work / name)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        links = [f"-L{path}" for path in (work, *library_paths())] + ["-ltorch_cuda", "-ltorch_cpu"]
        recipe["build"](compiler, work, folder / recipe["NAME"], include_paths(), links)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return str(getattr(error, "stderr", None) or error)[:2000]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return ""


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """The calls of tests/gpu and the bench, by name, on CPU tensors, which have the same alignment."""
    import fastuda.ops as F
    from bench.gpu_stages import variants
    from bench.providers import public
    from bench.registry import CASES, make_inputs
    from bench.run import GPU_FIRST
    from tests.cases import OPS, every
    from tests.cases import case as module_of
    from tests.gpu.kernels import DTYPES, has

    def both_ways(function: Callable, x: torch.Tensor, backend: str = "triton") -> None:
        leaf = x.clone().requires_grad_()
        value = function(leaf, backend)
        if value.requires_grad:
            torch.autograd.grad(value.float().sum(), leaf)

    for dtype in DTYPES:
        for op, name, x, function in every("samples", "cpu"):
            if has(op, "triton"):
                yield f"{name} {dtype}", partial(both_ways, function, x.to(dtype))
        for op in OPS:
            for width, backend in ((256, "triton"), (512, "library")):
                for x, function in getattr(module_of(op), "wide", lambda *_: ())(width, "cpu"):
                    call = partial(both_ways, function, x.to(dtype), backend)
                    yield f"many panels {backend} {op} {dtype}", call
    for case in dict.fromkeys([*GPU_FIRST, *CASES]):
        small = replace(case, pixels=272 if case.pixels % 16 == 0 else 265)

        def step(small=small) -> None:
            inputs = make_inputs(small, "cpu")
            leaves = [x for x in inputs.values() if x.requires_grad]
            for backend in ("triton", "library"):
                rows = F.backends(small.op, next(iter(inputs.values())))
                if backend in {row.name for row in rows if row.usable}:
                    value = public(small, backend)(inputs)
                    if leaves:
                        torch.autograd.grad(value.float().sum(), leaves)

        yield f"bench {case.op} {case.mode} {case.dtype} {case.shape}", step
    for name, change in variants().items():
        for case in GPU_FIRST[:2]:

            def changed(case=case, name=name, change=change) -> None:
                small = replace(case, pixels=272)
                inputs = make_inputs(small, "cpu")
                with change():
                    value = public(small, name.split(" ")[0].replace("tiles", "triton").strip(","))(inputs)
                    torch.autograd.grad(value.float().sum(), [x for x in inputs.values() if x.requires_grad])

            yield f"choice {case.op} {name}", changed


@contextmanager
def launchers(folder: Path) -> Iterator[Callable[..., object]]:
    """Yields a driver's ``launcher_cls`` that compiles the C code for a kernel's launch, as the first launch
    on a GPU does, and launches nothing. An empty libcuda takes the place of the real one."""
    from triton.backends.nvidia import driver

    code = "".join(path.read_text(encoding="utf-8") for path in Path(driver.__file__).parent.glob("driver.*"))
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+", code)))
    text = "".join(f"void {name}(void) {{}}\n" for name in names)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    name = "libcuda.so.1"
    options = ["-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{name}", "-o", str(folder / name)]
    try:
        subprocess.run(["gcc", *options], input=text, check=True, capture_output=True, text=True)
        with mock.patch("triton.runtime.build._load_module_from_path", mock.MagicMock()):
            driver.CudaUtils()

            def launcher_cls(*about: object) -> Callable[..., None]:
                if hasattr(driver, "make_launcher"):  # from Triton 3.7 on, CudaUtils launches every kernel
                    driver.CudaLauncher(*about)
                return lambda *args: None

            yield launcher_cls
    finally:
        shutil.rmtree(folder)


def compile_kernels(kit: Path, arch: int, only: str) -> list[str]:
    """Compile into ``kit``. Returns the calls that failed."""
    os.environ["TRITON_CACHE_DIR"] = str(kit / "triton")
    os.environ.pop("TRITON_INTERPRET", None)
    import triton
    from tqdm import tqdm

    from fastuda.kernels import _common
    from fastuda.ops import _backends
    from tests.kernels.aot import LIMIT, Driver

    driver = Driver(arch)
    triton.runtime.driver.set_active(driver)
    _backends.INTERPRETED = True  # makes Triton's backends accept CPU tensors
    _common.generation = lambda x: arch // 10
    _common.shared_memory = lambda x: LIMIT[arch]
    failed = []
    chosen = [(name, call) for name, call in calls() if only in name]
    if not chosen:
        raise UserError(f"no call has {only!r} in its name")
    with launchers(kit / "work") as launcher_cls, mock.patch.object(driver, "launcher_cls", launcher_cls):
        for name, call in tqdm(chosen, unit="call", disable=None):
            try:
                call()
            except Exception as error:  # values are meaningless here, and a call may reject them
                failed.append(f"{name}: {type(error).__name__}: {str(error)[:160]}")
    return failed


def install(kit: Path, package: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Copy the kit's library into ``package`` if it has none, and return the environment variables for the
    kit's kernels. Calls ``say`` with what does not fit."""
    made = facts(kit)
    if not made:
        say(f"no kit in {kit}: kernels are compiled when needed (python -m bench.gpu_kit builds one)")
        return {}
    library = package / "_cuda.so"
    if made["sources"] != sources():
        say("the kit's CUDA library is not used: csrc has changed since")
    elif (kit / "_cuda.so").is_file() and not library.exists():
        shutil.copyfile(kit / "_cuda.so", library)
    try:
        here = triton_identity()
    except ImportError:
        here = "triton is not installed"
    if here != made["triton"]:
        say(f"the kit's kernels are of another Triton ({made['triton']}, here {here}); they are recompiled")
        return {}
    cache = kit / "triton"
    for group in cache.rglob("__grp__*.json"):  # they contain absolute paths of their files
        text = json.loads(group.read_text(encoding="utf-8"))
        text["child_paths"] = {name: str(group.parent / name) for name in text["child_paths"]}
        group.write_text(json.dumps(text), encoding="utf-8")
    say(f"kit of commit {made['commit']}: {made['kernels']} kernels for sm_{made['arch']}")
    return {"TRITON_CACHE_DIR": str(cache)}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.parser("bench.gpu_kit", __doc__ or "", EXAMPLES)
    p.add_argument(
        "out", nargs="?", type=cli.a_path, default=ROOT / "build" / "gpu-kit", metavar="DIR",
        help="output folder (default: build/gpu-kit)",
    )  # fmt: skip
    p.add_argument(
        "--arch",
        type=int,
        choices=(80, 90, 120),
        default=90,
        help="compute capability times ten (default: 90)",
    )
    p.add_argument("--only", default="", metavar="TEXT", help="compile only calls with TEXT in their names")
    return p


def main() -> int:
    """Build both parts and print the result."""
    args = build_parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    why = build_library(args.out, args.arch)
    print(f"no CUDA library: {why}" if why else f"{args.out / '_cuda.so'}: built", flush=True)
    failed = compile_kernels(args.out, args.arch, args.only)
    kernels = compiled(args.out / "triton")
    made = {"triton": triton_identity(), "kernels": kernels, "arch": args.arch, "commit": commit(),
            "sources": sources(), "python": sys.version.split()[0], "torch": torch.__version__}  # fmt: skip
    (args.out / "kit.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    for line in failed:
        print(line, file=sys.stderr)
    print(f"{args.out}: {kernels} kernels for sm_{args.arch}, {len(failed)} calls failed")
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
