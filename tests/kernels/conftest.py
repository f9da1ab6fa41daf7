"""Most of the time of Triton's interpreter goes to what changes nothing here: it patches its language again
at every call of a helper function, and it works out integer overflows that it reports in debug mode only."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from tests.kernels.emulation import compiled

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    patched = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    patched.restore = lambda: None
    interpreter._patch_lang = lambda function: patched
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The CUDA kernels, compiled for the CPU."""
    return compiled(tmp_path_factory.mktemp("emulated"))
