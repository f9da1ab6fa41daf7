"""Runs measurements in other processes."""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from bench.case import Case

ROOT = Path(__file__).resolve().parents[1]


class Server:
    """A process that measures job after job; a new one replaces it if it dies or exceeds the time."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.Queue[str | None] = queue.Queue()
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the server)

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "bench.measure", "--serve"]
        self.errors.truncate(0)
        process = subprocess.Popen(
            command, cwd=ROOT, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors,
        )  # fmt: skip
        self.process, self.answers = process, queue.Queue()
        threading.Thread(target=self._read, args=(process.stdout, self.answers), daemon=True).start()
        return process

    @staticmethod
    def _read(lines: Iterable[str], answers: queue.Queue[str | None]) -> None:
        for line in lines:
            if line.startswith("RESULT "):
                answers.put(line[7:])
        answers.put(None)

    def ask(self, job: dict, timeout: float) -> dict:
        """Run one job."""
        process = self.process
        if process is None or process.poll() is not None:
            process = self._start()
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job) + "\n")
            line = self.answers.get(timeout=timeout)
        except queue.Empty:
            self.close()
            return {"failed": f"took over {timeout:.0f} s"}
        except BrokenPipeError:
            line = None
        if line is None:
            code = process.wait()
            self.process = None
            self.errors.seek(0)
            last_line = [line for line in self.errors.read().splitlines() if line.strip()][-1:]
            return {"failed": f"ended with {code}: {' '.join(last_line)}"[:200]}
        result = json.loads(line)
        if result.get("broken"):
            self.close()
        return result

    def close(self) -> None:
        """Stop the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None


def child(case: Case, provider: str, args: argparse.Namespace) -> dict:
    """Run one measurement."""
    job = {"case": asdict(case), "provider": provider, "device": args.device, "repeats": args.repeats,
           "threads": args.threads}  # fmt: skip
    timeout = min(args.timeout, max(args.deadline - time.monotonic(), 1.0))
    if args.device == "cuda":
        answer = args.server.ask(job, timeout)
        late = "failed" in answer and time.monotonic() > args.deadline
        return {"skipped": "time is over"} if late else answer
    command = [sys.executable, "-m", "bench.measure", json.dumps(job)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"took over {timeout:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[7:])
    return {"failed": f"ended with {done.returncode} (out of memory?)"}
