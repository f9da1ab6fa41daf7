"""Build script: the package map and the optional C++ extension.

``FASTUDA_BUILD`` decides what is compiled: ``auto`` (default: the CPU extension where a compiler and torch
are found, the CUDA library where nvcc and a torch with CUDA are, and a working pure-Python install where
they are not), ``cpu`` (a failed build is an error), ``cuda`` (CPU and CUDA, a failed build is an error) or
``none``.
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
BUILD = os.environ.get("FASTUDA_BUILD", "auto")
# contraction: -std=c++20 would switch fused multiply-adds off
FLAGS = ["-O3", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]

if BUILD not in ("auto", "cpu", "cuda", "none"):
    raise SystemExit(f"FASTUDA_BUILD={BUILD!r}: choose auto, cpu, cuda or none")


def compiler() -> str | None:
    """Program that compiles C++: $CXX, or the first of the usual ones that is installed."""
    named = os.environ.get("CXX")
    programs = shlex.split(named)[:1] if named else ["g++", "c++", "clang++"]
    return next((program for program in programs if shutil.which(program)), None)


def without(reason: str) -> dict:
    """No arguments for setup(), and one line that says why."""
    print(f"fastuda: building without the C++ extension: {reason}; plain torch runs its ops", file=sys.stderr)
    return {}


def extension() -> dict:
    """setup() arguments that build ``fastuda._C``, or nothing when it is not wanted or cannot be built."""
    # a unit includes files of csrc/cpu, one parse of torch's headers for many kernels; others are their own
    units = sorted((ROOT / "csrc" / "units").glob("*.cpp"))
    included = "".join(path.read_text(encoding="utf-8") for path in units)
    alone = [p for p in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")) if f'"../cpu/{p.name}"' not in included]
    sources = [str(path.relative_to(ROOT)) for path in (*units, *alone)]
    if BUILD == "none" or not sources:
        return {}
    if BUILD == "auto" and not sys.platform.startswith("linux"):
        return without(f"it is tried on Linux only, not on {sys.platform} (FASTUDA_BUILD=cpu to insist)")
    program = compiler()
    if program is None:
        missing = f"no C++ compiler was found ({os.environ.get('CXX') or 'g++, c++, clang++'})"
        if BUILD != "auto":
            raise SystemExit(f"fastuda: {missing}")
        return without(missing)
    os.environ.setdefault("CXX", program)
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        if BUILD != "auto":
            raise
        return without("torch is not importable here")
    parts = [path for pattern in ("*.cpp", "*.h") for path in (ROOT / "csrc").rglob(pattern)]
    module = CppExtension(
        "fastuda._C",
        sources,
        # FLAGS are said again by python -m fastuda.env; -g, of Python's own build, is nine tenths of the file
        extra_compile_args=[*FLAGS, "-g0", f'-DFASTUDA_FLAGS="{" ".join(FLAGS)}"'],
        extra_link_args=["-fopenmp"],
        depends=sorted(str(path.relative_to(ROOT)) for path in parts),
        optional=BUILD == "auto",
    )

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # ninja's failure is a RuntimeError, which `optional` does not catch
                if BUILD != "auto":
                    raise
                without(f"{program} failed ({' '.join(str(error).split())[:200]})")

        def run(self) -> None:
            super().run()
            if BUILD in ("auto", "cuda"):
                folder = Path(self.get_ext_fullpath("fastuda._C")).resolve().parent
                build_cuda(Path(self.build_temp).resolve() / "cuda", folder)

    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


def build_cuda(work: Path, folder: Path) -> None:
    """Compile ``csrc/cuda`` into ``folder``, where nvcc and a torch with CUDA are present."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    recipe = runpy.run_path(str(ROOT / "csrc" / "cuda" / "build.py"))
    compiler = recipe["nvcc"]()
    missing = "no nvcc was found" if compiler is None else ""
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is built without CUDA"
    if not missing:
        links = [f"-L{path}" for path in library_paths()] + [
            "-ltorch_cuda",
            "-ltorch_cpu",
            "-ltorch",
            "-lc10",
        ]
        try:
            recipe["build"](compiler, work, folder / recipe["NAME"], include_paths(), links)
            return
        except RuntimeError as error:
            missing = str(error)
    if BUILD == "cuda":
        raise SystemExit(f"fastuda: the CUDA kernels cannot be built: {missing}")
    print(f"fastuda: building without the CUDA kernels: {missing}", file=sys.stderr)


packages = find_packages(include=["fastuda", "fastuda.*"])
packages += ["fastuda.kernels"] + ["fastuda.kernels." + name for name in find_packages("kernels")]

setup(
    license="Apache-2.0",
    packages=packages,
    package_dir={"fastuda": "fastuda", "fastuda.kernels": "kernels"},
    package_data={"fastuda": ["py.typed", "recipes/*.yaml", "report/templates/*"]},
    **extension(),
)
