"""Compile the CUDA kernels and their registration into one library, with nvcc alone.

Used by setup.py and by the tests. The library holds machine code for sm_80 and sm_90, and PTX for later GPUs;
``FASTUDA_CUDA_ARCH``, a list such as ``80;90``, changes that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "_cuda.so"
# the stable interface of torch 2.11
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020B000000000000ULL"


def nvcc() -> str | None:
    """The CUDA compiler, from PATH, CUDA_HOME or the usual folder."""
    folders = [f"{home}/bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))


def architectures() -> list[str]:
    return [arch for arch in os.environ.get("FASTUDA_CUDA_ARCH", "80;90").split(";") if arch]


def kernel_command(compiler: str, source: Path, out: Path) -> list[str]:
    """Command that compiles one file of kernels. Every warning is an error; registers and spills are
    reported."""
    archs = architectures()
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    options = ["-O3", "-std=c++17", "-ftz=true", "-Werror", "all-warnings", "-Xptxas", "-v"]
    options += ["-Xcompiler", "-fPIC"]
    return [compiler, *options, *code, "-c", str(source), "-o", str(out)]


def including(macro: str) -> str:
    """C++ source that includes the file of every op, with a macro that selects the part to compile."""
    lines = (f'#include "{path}"' for path in sorted(HERE.glob("*.cu")))
    return "\n".join((f"#define {macro}", *lines, ""))


def build(compiler: str, work: Path, library: Path, includes: list[str], link: list[str]) -> str:
    """Compile everything under ``work``, link ``library``, and return the output of the compiler.

    Args:
        includes: torch's include folders.
        link: linker arguments to find ``libtorch_cuda`` and ``libtorch_cpu``.

    Raises:
        RuntimeError: a step failed, with the message of the compiler.
    """
    work.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    objects = {source: work / f"{source.stem}.o" for source in sorted(HERE.glob("*.cu"))}
    commands = [kernel_command(compiler, source, out) for source, out in objects.items()]
    registration = work / "registration.o"
    registration.with_suffix(".cpp").write_text(including("FASTUDA_TORCH"), encoding="utf-8")
    commands.append(
        [compiler, "-O2", "-std=c++17", "-Xcompiler", "-fPIC", "-DUSE_CUDA", TORCH_TARGET]
        + [f"-I{folder}" for folder in includes]
        + ["-c", str(registration.with_suffix(".cpp")), "-o", str(registration)]
    )
    everything = [str(path) for path in (*objects.values(), registration)]
    commands.append(
        [compiler, "-shared", *everything, "-Xlinker", "--no-as-needed", *link, "-o", str(library)]
    )
    said = ""
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        said += done.stdout + done.stderr
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return said
