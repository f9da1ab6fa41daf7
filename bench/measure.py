"""One provider on one case, in its own process: check, time, peak memory. Prints one JSON line."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.providers import PROVIDERS, CannotExpress, Inputs
from bench.registry import DTYPES, Case, make_inputs
from fastuda.memory import give_back_freed_memory, keep_freed_memory
from fastuda.ops import release_memory

CHECK_PIXELS = 384


def seconds(run: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Wall time of each of ``repeats`` runs after one warm-up."""
    times = []
    for k in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if k:
            times.append(time.perf_counter() - start)
    return sorted(times)


def _weight(out: torch.Tensor) -> torch.Tensor:
    """What the result's gradient is taken to be."""
    return torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)


def _gradients(
    case: Case, out: torch.Tensor, inputs: Inputs, weight: torch.Tensor | None = None
) -> list[torch.Tensor]:
    if case.mode == "fwd":
        return []
    leaves = [x for x in inputs.values() if x.requires_grad]
    return list(torch.autograd.grad(out, leaves, _weight(out) if weight is None else weight))


def error_of(case: Case, provider: str, device: str) -> float:
    """Largest error against the float64 reference at a small size, relative to the largest value.

    Raises:
        ValueError: it is over four roundings' worth of the dtype (the plain formulation's own error,
            widened).
    """
    small = make_inputs(case, device, CHECK_PIXELS)
    exact = {
        k: v.detach().double().requires_grad_(v.requires_grad) for k, v in small.items() if k != "labels"
    }
    if "labels" in small:
        exact["labels"] = small["labels"]
    run, truth = PROVIDERS[provider](case), PROVIDERS["reference"](case)
    found, wanted = run(small), truth(exact)
    pairs = [
        (found, wanted),
        *zip(_gradients(case, found, small), _gradients(case, wanted, exact), strict=True),
    ]
    error = max(((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in pairs)
    limit = {"float32": 2e-4, "bfloat16": 6e-2}[case.dtype]
    if case.op == "upsample_confusion":
        limit = 1e-2  # single pixels whose two best scores are equal up to rounding
    if provider in ("authors", "sdpa", "compile") and case.dtype == "bfloat16":
        limit = 0.6  # similarities kept in bf16 choose other matches
    if not error <= limit:
        raise ValueError(f"error {error:.2g} is over {limit:.2g}")
    return error


def resident(key: str) -> float:
    """MiB of VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    return 0.0


def start_peak(device: str) -> float:
    """MiB in use; the peak counts from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    release_memory()  # what earlier calls left for later ones counts as the measured call's own
    give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    return resident("VmRSS")


def peak(device: str) -> float:
    """MiB at the worst moment."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resident("VmHWM")


def settle(step: Callable[[], object], seconds: float = 5.0) -> None:
    """Runs until a step needs no page that the system has to clear; ten times or ``seconds`` at most."""
    end = time.perf_counter() + seconds
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        calm = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 16
        if calm or time.perf_counter() > end:
            return


def measure(case: Case, provider: str, device: str, repeats: int) -> dict[str, object]:
    """Quantiles in milliseconds, peak extra MiB and error."""
    error = error_of(case, provider, device)
    inputs = make_inputs(case, device)
    run = PROVIDERS[provider](case)

    weight: torch.Tensor | None = None

    def step() -> None:
        _gradients(case, run(inputs), inputs, weight)

    before = start_peak(device)
    step()
    extra = peak(device) - before
    if case.mode != "fwd":
        weight = _weight(run(inputs).detach())
    if device == "cpu":
        keep_freed_memory()  # as the trainer does
        settle(step)
    times = seconds(step, repeats, device)
    quantiles = statistics.quantiles(times, n=10) if len(times) > 1 else [times[0]] * 9
    return {"p20": 1e3 * quantiles[1], "p50": 1e3 * statistics.median(times), "p80": 1e3 * quantiles[7],
            "extra_mib": extra, "error": error}  # fmt: skip


def floor_rates(case: Case, device: str, repeats: int) -> dict[str, float]:
    """Seconds of one product, and of a copy that moves the case's bytes, on this device now."""
    product = copy = 0.0
    if case.products:
        a = torch.randn(case.pixels, case.channels, device=device).to(DTYPES[case.dtype])
        out = torch.empty(case.pixels, case.pixels, device=device, dtype=a.dtype)
        product = statistics.median(seconds(lambda: torch.mm(a, a.T, out=out), repeats, device))
    if case.moved:
        x = torch.randn(case.moved // 8, device=device)
        y = torch.empty_like(x)
        copy = statistics.median(seconds(lambda: y.copy_(x), 5 * repeats, device))
    return {"floor": 1e3 * max(case.products * case.batch * product, copy)}


def ceilings(device: str, repeats: int) -> list[dict[str, object]]:
    """What the machine reaches: the rate of a plain product of random values per dtype, and of a copy."""
    size, moved = (8192, 2**30) if device == "cuda" else (2048, 2**28)
    found: list[dict[str, object]] = []

    def add(op: str, dtype: str, shape: str, amount: float, unit: str, run: Callable[[], object]) -> None:
        times = [1e3 * t for t in seconds(run, 5 * repeats, device)]
        median = statistics.median(times)
        found.append({"op": op, "dtype": dtype, "shape": shape, "p20": times[len(times) // 5], "p50": median,
                      "p80": times[4 * len(times) // 5],
                      "note": f"{amount / median / 1e6:.1f} {unit}"})  # fmt: skip

    for name, dtype in DTYPES.items():
        a = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        add("ceiling: product", name, f"{size}x{size}x{size}", 2 * size**3 / 1e3, "TFLOP/s",
            lambda a=a, out=out: torch.mm(a, a.T, out=out))  # fmt: skip
    x = torch.randn(moved // 8, device=device)
    y = torch.empty_like(x)
    add("ceiling: copy", "float32", f"{moved >> 20} MiB read and written", moved, "GB/s", lambda: y.copy_(x))
    return found


def answer(job: dict) -> dict[str, object]:
    """What ``job`` (case, provider, device, repeats, threads) measured, or why there is nothing."""
    torch.manual_seed(0)
    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    case = Case(**job["case"])
    try:
        if job["provider"] == "ceilings":
            return {"ceilings": ceilings(job["device"], job["repeats"])}
        if job["provider"] == "floor":
            return dict(floor_rates(case, job["device"], job["repeats"]))
        return measure(case, job["provider"], job["device"], job["repeats"])
    except CannotExpress as reason:
        return {"skipped": str(reason) or "cannot express it"}
    except (ValueError, RuntimeError, MemoryError) as reason:
        return {"failed": str(reason).splitlines()[0][:200]}


def main() -> None:
    """Entry of the child process: the job as JSON on the command line."""
    print("RESULT " + json.dumps(answer(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
