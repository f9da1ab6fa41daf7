"""Triton's interpreter patches its language again at every call of a helper function, which is most of its
time; in a process that does nothing else, once is enough."""

from __future__ import annotations

import os
from types import SimpleNamespace

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    patched = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    patched.restore = lambda: None
    interpreter._patch_lang = lambda function: patched
