"""The soak of tests/soak: what it calls flat, and a short one with a kill."""

import importlib.util
import json
import os
import random
import subprocess
import sys

import pytest

from tests.program import ROOT, environment

SCRIPT = ROOT / "tests" / "soak" / "soak.py"


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("hourly", "found"), [(0, True), (10, True), (24, False)])
def test_a_leak_is_told_from_noise_and_peaks(soak, hourly, found):
    draw = random.Random(0)
    samples = [
        {"seconds": t, "mib": 260 + hourly * t / 3600 + draw.uniform(-3, 3) + (90 if t % 300 == 0 else 0)}
        for t in range(0, 3600, 5)
    ]
    rate, is_flat = soak.flat(samples, "mib", 16, 4)
    assert is_flat == found and rate == pytest.approx(hourly, abs=2)


def test_a_few_samples_are_not_judged_and_a_short_span_is_judged_by_noise(soak):
    samples = [{"seconds": 10 * k, "mib": 260 + k / 10} for k in range(20)]
    assert soak.flat(samples[:7], "mib", 16, 4) is None
    assert soak.flat(samples, "mib", 16, 4) == (pytest.approx(36), True)
    assert not soak.flat(samples, "mib", 16, 1)[1]


def test_children_are_found_and_memory_is_read(soak):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    try:
        assert soak.session(child.pid) == [child.pid] and soak.resident(os.getpid()) > 10
    finally:
        child.communicate(b"\n")
    assert soak.session(child.pid) == [] and soak.resident(child.pid) == 0


@pytest.mark.slow
def test_a_short_soak_is_killed_and_ends_as_the_undisturbed_run(tmp_path):
    out = tmp_path / "soak"
    args = ["--steps", 30, "--save-steps", 5, "--kill-every", 0.5, "--sample-every", 0.1, "--crop", 32, 64]
    args += [
        "--most-kills",
        1,
        "--workers",
        1,
        "--together",
        "--out",
        out,
        "log.tensorboard=false",
        "log.report=false",
    ]
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, args)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["kills"] == 1 and report["lives"] == 2, report
    assert report["same_end"] is True and report["orphans"] == 0, report
    assert report["memory_flat"] == report["files_flat"] == "not judged"  # all of it is warm-up
    assert (out / "samples.csv").read_text().startswith("run,life,seconds,trainer_mib")
