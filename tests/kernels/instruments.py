"""What Triton's interpreter can be made to show beside results: every access of every program, and what a
GPU's arithmetic does to an error. Only with TRITON_INTERPRET=1."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
BUILDER = type(interpreter.interpreter_builder)


def all_kernels() -> set[str]:
    """The names of all jitted functions in ``kernels/`` that no other one calls: what is launched."""
    jitted: dict[str, ast.FunctionDef] = {}
    for path in KERNELS.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(d) for d in node.decorator_list
            ):
                jitted[node.name] = node
    calls = (node.func for body in jitted.values() for node in ast.walk(body) if isinstance(node, ast.Call))
    return set(jitted) - {called.id for called in calls if isinstance(called, ast.Name)}


class Access(NamedTuple):
    """One load, store or atomic of one program: the addresses of the elements that its mask lets through."""

    kind: str
    program: int
    address: np.ndarray
    """[elements] uint64."""
    size: int
    """Bytes of an element."""


class Uninitialised(TorchDispatchMode):
    """Which bytes of fresh memory nothing has been written to: those of ``torch.empty`` until a kernel stores
    there or an operator of torch takes the tensor to write it."""

    def __init__(self) -> None:
        super().__init__()
        self.missing: dict[int, np.ndarray] = {}
        """Per storage address: [bytes] bool."""
        self._alive: list[torch.Tensor] = []
        """Memory that is watched must not be given to another tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.name()
        if name.startswith(("aten::empty", "aten::new_empty")):
            storage = out.untyped_storage()
            if len(storage):
                self.missing[storage.data_ptr()] = np.ones(len(storage), bool)
                self._alive.append(out)
            return out
        named = {arg.name: value for arg, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        for arg in func._schema.arguments:
            value = named.get(arg.name)
            if arg.alias_info is not None and arg.alias_info.is_write and isinstance(value, torch.Tensor):
                self._written(value)
        return out

    def _written(self, x: torch.Tensor) -> None:
        missing = self.missing.get(x.untyped_storage().data_ptr())
        if missing is not None and x.numel():
            first, last = span(x)
            base = x.untyped_storage().data_ptr()
            missing[first - base : last - base] = False


def span(x: torch.Tensor) -> tuple[int, int]:
    """Address of the first byte of a tensor, and that after its last. What pads its rows belongs to it, also
    in the last row."""
    if not x.numel():
        return x.data_ptr(), x.data_ptr()
    last = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    if x.dim() > 1:
        last = max(last, x.shape[0] * x.stride(0))
    storage = x.untyped_storage()
    return x.data_ptr(), min(x.data_ptr() + last * x.element_size(), storage.data_ptr() + storage.nbytes())


class Launch:
    """The accesses of one launch, and what is wrong with them."""

    def __init__(self, tensors: list[torch.Tensor], missing: dict[int, np.ndarray]) -> None:
        self.accesses: list[Access] = []
        self._spans = [span(x) for x in tensors]
        self._missing = [
            (base, missing[base]) for base in {x.untyped_storage().data_ptr() for x in tensors} & set(missing)
        ]
        self.faults: set[str] = set()

    def add(self, access: Access) -> None:
        inside = np.zeros(len(access.address), bool)
        for first, end in self._spans:
            inside |= (access.address >= first) & (access.address + np.uint64(access.size) <= end)
        if not inside.all():
            self.faults.add(f"{access.kind} out of bounds")
        if access.kind == "store" and len(np.unique(access.address)) < len(access.address):
            self.faults.add("one store writes an address twice")
        for base, missing in self._missing:
            here = access.address[(access.address >= base) & (access.address < base + len(missing))]
            offset = (here - np.uint64(base)).astype(np.int64)
            if access.kind != "store" and missing[offset].any():
                self.faults.add("read of memory that nothing has written")
            if access.kind == "store":
                missing[offset[:, None] + np.arange(access.size)] = False
        self.accesses.append(access)

    def judge(self) -> set[str]:
        """All faults: those above, and those of accesses to each other's addresses."""
        stored, writer, stored_at = self._joined("store")
        loaded, reader, loaded_at = self._joined("load")
        counted, _, _ = self._joined("atomic")
        if len(counted) and len(np.intersect1d(counted, np.concatenate([stored, loaded]))):
            self.faults.add("atomics and plain accesses to one address")
        if not len(stored):
            return self.faults
        order = np.lexsort((writer, stored))
        stored, writer, stored_at = stored[order], writer[order], stored_at[order]
        if ((stored[1:] == stored[:-1]) & (writer[1:] != writer[:-1])).any():
            self.faults.add("two programs write one address")
        unique, first = np.unique(stored, return_index=True)
        place = np.minimum(np.searchsorted(unique, loaded), len(unique) - 1)
        hit = unique[place] == loaded
        same = writer[first][place] == reader
        if (hit & ~same).any():
            self.faults.add("a program reads what another writes")
        if (hit & same & (loaded_at > stored_at[first][place])).any():
            self.faults.add("a program reads what it has stored itself")
        return self.faults

    def _joined(self, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of all accesses of a kind, per element: address, program, and number of the access."""
        these = [(number, access) for number, access in enumerate(self.accesses) if access.kind == kind]
        counts = [len(access.address) for _, access in these]
        address = np.concatenate([np.zeros(0, np.uint64), *(access.address for _, access in these)])
        program = np.repeat(np.array([access.program for _, access in these], int), counts)
        return address, program, np.repeat(np.array([number for number, _ in these], int), counts)


@contextmanager
def watched(monkeypatch: Any) -> Iterator[tuple[dict[str, set[str]], set[str]]]:
    """In the block every launch is watched. Gives the faults by kernel, and the names of the kernels."""
    faults: dict[str, set[str]] = {}
    launched: set[str] = set()
    current: list[Launch] = []

    def record(kind: str, pointers: TensorHandle, mask: TensorHandle) -> None:
        address = np.asarray(pointers.data)
        let_through = np.broadcast_to(np.asarray(mask.data, bool), address.shape)
        if current and let_through.any():
            (x, y, z), (_, ny, nz) = (
                getattr(interpreter.interpreter_builder, n) for n in ("grid_idx", "grid_dim")
            )
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            address = address[let_through].astype(np.uint64)
            current[-1].add(Access(kind, (x * ny + y) * nz + z, address, size))

    load, store, rmw = (
        getattr(BUILDER, f"create_{n}") for n in ("masked_load", "masked_store", "atomic_rmw")
    )

    def watched_load(self, pointers, mask, *rest):
        record("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        record("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def watched_rmw(self, op, pointers, value, mask, *rest):
        record("atomic", pointers, mask)
        return rmw(self, op, pointers, value, mask, *rest)

    call = interpreter.GridExecutor.__call__

    def watched_call(self, *args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        current.append(Launch(tensors, memory.missing))
        launched.add(self.fn.__name__)
        try:
            with torch.utils._python_dispatch._disable_current_modes():
                return call(self, *args, **kwargs)
        finally:
            found = current.pop().judge()
            if found:
                faults.setdefault(self.fn.__name__, set()).update(found)

    monkeypatch.setattr(BUILDER, "create_masked_load", watched_load)
    monkeypatch.setattr(BUILDER, "create_masked_store", watched_store)
    monkeypatch.setattr(BUILDER, "create_atomic_rmw", watched_rmw)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", watched_call)
    with Uninitialised() as memory:
        yield faults, launched


def gpu_arithmetic(monkeypatch: Any, half: bool) -> set[str]:
    """Make the interpreter err as a GPU may: approximate ``exp2`` and division (2 units in the last place),
    logarithm and root (1), products in three of TF32, and tensor cores that truncate as they add. ``half``:
    the operands of IEEE products were half precision, which tensor cores take.

    Returns:
        What products were met, filled as they are: tests look whether it is what they are meant to judge.
    """
    random = np.random.default_rng(0)
    met: set[str] = set()

    def off(x: np.ndarray, units: float) -> np.ndarray:
        """``x`` wrong by up to so many units in the last place; float32 only."""
        if x.dtype != np.float32:
            return x
        return (x.astype(np.float64) * (1 + random.uniform(-units, units, x.shape) * 2.0**-23)).astype(
            np.float32
        )

    def exp2(x: np.ndarray) -> np.ndarray:
        return off(np.exp2(x.astype(np.float64)).astype(x.dtype), 2)

    def exp(x: np.ndarray) -> np.ndarray:
        """The compiler's: by exp2, of the rounded product with log2(e)."""
        return exp2(x * np.float32(np.log2(np.e))) if x.dtype == np.float32 else np.exp(x)

    def unary(function: Callable) -> Callable:
        return lambda self, x: TensorHandle(function(x.data), x.dtype.scalar)

    def divide(self, x, y):
        return TensorHandle(off(x.data / y.data, 2), x.dtype.scalar)

    def tf32(x: np.ndarray) -> np.ndarray:
        """Rounded to 10 bits of fraction."""
        bits = x.astype(np.float32).view(np.uint32).astype(np.uint64) + 0x1000
        return (bits & 0xFFFFE000).astype(np.uint32).view(np.float32)

    def accumulate(x: np.ndarray, y: np.ndarray, total: np.ndarray, step: int) -> np.ndarray:
        """``total + x @ y``, ``step`` products exactly at a time, then cut to float32."""
        x, y = x.astype(np.float64), y.astype(np.float64)
        for k in range(0, x.shape[1], step):
            exact = total.astype(np.float64) + x[:, k : k + step] @ y[k : k + step]
            total = exact.astype(np.float32)
            over = np.abs(total.astype(np.float64)) > np.abs(exact)
            total = np.where(over, np.nextafter(total, np.float32(0)), total)
        return total

    def dot(self, a, b, total, precision, *_):
        x, y, start = a.data, b.data, total.data
        if x.dtype == np.float32 and "TF32x3" in str(precision):
            met.add("tf32x3")
            big_x, big_y = tf32(x), tf32(y)
            small_x, small_y = tf32(x - big_x), tf32(y - big_y)
            small = accumulate(small_x, big_y, np.zeros_like(start), 8)
            small = accumulate(big_x, small_y, small, 8)
            result = accumulate(big_x, big_y, np.nan_to_num(small) + start, 8)
        elif x.dtype != np.float32 or half:
            met.add("tensor cores")
            result = accumulate(x, y, start, 16)
        else:
            met.add("ieee")
            result = np.matmul(x, y) + start
        return TensorHandle(result, total.dtype.scalar)

    for name, function in (("exp2", exp2), ("exp", exp)):
        monkeypatch.setattr(BUILDER, f"create_{name}", unary(function))
    monkeypatch.setattr(BUILDER, "create_log", unary(lambda x: off(np.log(x), 1)))
    monkeypatch.setattr(BUILDER, "create_sqrt", unary(lambda x: off(np.sqrt(x), 1)))
    monkeypatch.setattr(BUILDER, "create_fdiv", divide)
    monkeypatch.setattr(BUILDER, "create_dot", dot)
    return met
