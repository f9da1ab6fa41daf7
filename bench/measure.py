"""Measures one provider on one case: correctness, time, peak memory. Prints one JSON line.

    python -m bench.measure JOB      # a process for this job alone, so that its peak memory is its own
    python -m bench.measure --serve  # a line of JSON per job from the standard input, for a GPU

On a CPU, time is wall time. On a GPU it is the time between two events around each run, with inputs from
copies that together exceed the L2 cache.
"""

from __future__ import annotations

import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch

from bench.case import CannotExpress, Case, Inputs
from bench.providers import PROVIDERS
from bench.registry import make_inputs
from bench.timing import ceilings, device_seconds, floor_rates, seconds
from fastuda.ops import release_memory
from fastuda.system.memory import give_back_freed_memory, keep_freed_memory

CHECK_PIXELS = 384
COPIES = 12
"""Largest number of copies of the inputs."""


kept_inputs = lru_cache(maxsize=2)(make_inputs)
"""The inputs of a case, drawn once: on a GPU one process measures all its providers."""


def copies(inputs: Inputs) -> list[Inputs]:
    """The inputs and copies of them, together at least twice the L2 cache."""
    held = sum(x.numel() * x.element_size() for x in inputs.values())
    count = min(COPIES, 1 + 2 * torch.cuda.get_device_properties(0).L2_cache_size // max(held, 1))
    others = [
        {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in inputs.items()}
        for _ in range(count - 1)
    ]
    return [inputs, *others]


def captured(step: Callable[[], object], pool: object) -> Callable[[], object]:
    """``step`` as a CUDA graph with memory from ``pool``."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compilation and tables happen once and must not be captured
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


def _weight(out: torch.Tensor) -> torch.Tensor:
    """The gradient of the result."""
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
        ValueError: the error exceeds four roundings of the dtype (a margin on the plain formulation's own
            error).
    """
    draw = kept_inputs if device == "cuda" else make_inputs
    small = draw(case, device, CHECK_PIXELS)
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
        limit = 1e-2  # single pixels may have two best scores that are equal up to rounding
    if provider in ("authors", "sdpa", "compile") and case.dtype == "bfloat16":
        limit = 0.6  # similarities rounded to bf16 give other matches
    if not error <= limit:
        raise ValueError(f"error {error:.2g} is over {limit:.2g}")
    return error


def resident(key: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    return 0.0


def start_peak(device: str) -> float:
    """Reset the peak; returns the memory in use in MiB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    release_memory()  # memory cached by earlier calls must count as the measured call's own
    give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM to the current VmRSS
    return resident("VmRSS")


def peak(device: str) -> float:
    """Peak memory in MiB since :func:`start_peak`."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resident("VmHWM")


def settle(step: Callable[[], object], seconds: float = 5.0) -> None:
    """Run until a step needs no page that the system has to clear, at most ten times or for ``seconds``."""
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
    inputs = (kept_inputs if device == "cuda" else make_inputs)(case, device)
    run = PROVIDERS[provider](case)

    weight: torch.Tensor | None = None

    def step(inputs: Inputs = inputs) -> None:
        _gradients(case, run(inputs), inputs, weight)

    if device == "cuda":
        step()  # excludes compilation, tables and the library's workspace
    before = start_peak(device)
    step()
    extra = peak(device) - before
    if case.mode != "fwd":
        weight = _weight(run(inputs).detach())
    if device == "cuda":
        steps: list[Callable[[], object]] = [partial(step, each) for each in copies(inputs)]
        if provider == "graph":
            pool = torch.cuda.graph_pool_handle()
            steps = [captured(each, pool) for each in steps]
        times = device_seconds(steps, repeats)
    else:
        keep_freed_memory()  # as the trainer does
        settle(step)
        times = seconds(step, repeats, device)
    quantiles = statistics.quantiles(times, n=10) if len(times) > 1 else [times[0]] * 9
    return {"p20": 1e3 * quantiles[1], "p50": 1e3 * statistics.median(times), "p80": 1e3 * quantiles[7],
            "extra_mib": extra, "error": error}  # fmt: skip


def answer(job: dict) -> dict[str, object]:
    """The result of ``job`` (case, provider, device, repeats, threads), or the reason for none."""
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
    except Exception as reason:  # a provider may raise anything; the next one is still measured
        lines = str(reason).strip().splitlines() or [""]
        return {"failed": f"{type(reason).__name__}: {lines[0]}"[:200]}


def serve() -> None:
    """Answer jobs until the input ends, or until an error leaves the GPU unusable; then another process
    continues."""
    for line in sys.stdin:
        job = json.loads(line)
        result = answer(job)
        gc.collect()
        if job["device"] == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                result["broken"] = True
        print("RESULT " + json.dumps(result), flush=True)


def main() -> None:
    """Command line of a measuring process."""
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(f"{__doc__}\nbench.run starts it; it is not meant to be run by hand.")
    elif sys.argv[1] == "--serve":
        serve()
    else:
        print("RESULT " + json.dumps(answer(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
