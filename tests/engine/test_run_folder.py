"""The run folder when it is not ours alone: read-only, held open elsewhere, wanted by two runs, without
room."""

import ctypes
import fcntl
import os
import resource
import shutil
import subprocess
import sys
import time

import pytest

from tests.engine.runs import arguments, refused, wait_for_checkpoint
from tests.program import TINY, command, curves, environment, equal, fastuda, state, without_clocks

DAC_OVERRIDE = 1
DROP_FROM_BOUNDING_SET = 24


def obey_modes():
    """In a child before exec: root, too, may not write where a file's mode says no."""
    if os.getuid() == 0:
        ctypes.CDLL(None).prctl(DROP_FROM_BOUNDING_SET, DAC_OVERRIDE, 0, 0, 0)


def start(*args, said=subprocess.PIPE, **kwargs):
    return subprocess.Popen(
        command("train", *args), env=environment(), stdout=said, stderr=said, text=True, **kwargs
    )


def finish(process):
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, scenes_root):
    out = tmp_path_factory.mktemp("run_folder") / "run"
    done = fastuda("train", *arguments(scenes_root, out, "checkpoint.keep=9", "log.every=1"))
    assert done.returncode == 0, done.stderr
    return out


def resumable(whole, out):
    """A run that was killed after its first step."""
    (out / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / "step_0000001.pt", out / "checkpoints" / "last.pt")
    shutil.copy(whole / "metrics.csv", out)
    return out


@pytest.mark.parametrize("place", ["", "checkpoints"])
def test_a_read_only_run_folder(place, whole, scenes_root, tmp_path):
    out = resumable(whole, tmp_path / "run")
    before = (out / "checkpoints" / "last.pt").read_bytes()
    os.chmod(out / place, 0o555)
    try:
        process = start(*arguments(scenes_root, out, "--resume", "auto"), preexec_fn=obey_modes)
        refused(finish(process), "cannot write", str(out), "Permission denied")
    finally:
        os.chmod(out / place, 0o755)
    assert (out / "checkpoints" / "last.pt").read_bytes() == before


def test_curves_that_another_process_reads_and_keeps_open(whole, scenes_root, tmp_path):
    out = resumable(whole, tmp_path / "run")
    with open(out / "metrics.csv") as reader:
        reader.read(10)
        more = arguments(scenes_root, out, "--resume", "auto", "checkpoint.keep=9", "log.every=1")
        done = fastuda("train", *more)
        assert done.returncode == 0, done.stderr
    assert curves(whole) == curves(out)
    assert equal(without_clocks(state(whole)), without_clocks(state(out)))


def test_a_second_run_into_the_same_folder_is_refused(scenes_root, tmp_path):
    out = tmp_path / "run"
    first = start(*arguments(scenes_root, out, "--steps", 5000, "--workers", 1), said=subprocess.DEVNULL)
    try:
        wait_for_checkpoint(out, first)
        second = fastuda("train", *arguments(scenes_root, out, "--steps", 5000, "--resume", "auto"))
        refused(second, "another process is training into", str(out))
        step = state(out)["step"]
        deadline = time.monotonic() + 60
        while state(out)["step"] == step and time.monotonic() < deadline:
            time.sleep(0.02)
        assert first.poll() is None and state(out)["step"] > step
    finally:
        first.kill()
        first.wait()
    # its loader process is still there for some seconds; the lock is gone with the trainer
    with open(out / "log.txt", "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_a_write_that_the_system_cuts_short(whole, scenes_root, tmp_path):
    """A real failure in the middle of torch's own writer, as on a full disk."""
    out = resumable(whole, tmp_path / "run")
    before = (out / "checkpoints" / "last.pt").read_bytes()
    assert len(before) > 200_000
    process = start(*arguments(scenes_root, out, "--resume", "auto"), preexec_fn=limit_file_size)
    refused(finish(process), "cannot write", "last.pt: File too large")
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["last.pt"]
    assert (out / "checkpoints" / "last.pt").read_bytes() == before


HUNGRY = """
import torch
from fastuda.methods.source_only import SourceOnly

class Torch(SourceOnly):
    def phases(self, batch, step):
        torch.empty(1 << 50).sum()
        yield from super().phases(batch, step)

class Python(SourceOnly):
    def phases(self, batch, step):
        bytearray(1 << 60)
        yield from super().phases(batch, step)
"""


@pytest.mark.parametrize("who", ["Torch", "Python"])
def test_no_memory_left_on_the_cpu(who, scenes_root, tmp_path, monkeypatch):
    (tmp_path / "hungry.py").write_text(HUNGRY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hungry", raising=False)
    done = fastuda("train", *arguments(scenes_root, tmp_path / "run", "--method", f"hungry:{who}"))
    refused(done, "out of memory on cpu", "--batch-size", "train.accumulate", "--crop", "--amp")


def test_a_domain_of_your_own_with_a_bomb_for_its_classes(tmp_path):
    """Nine lines that stand for 10^9 strings: refused before they are expanded."""
    (tmp_path / "images").mkdir()
    lines = ["a0: &a0 [" + ", ".join(["lol"] * 10) + "]"]
    lines += [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]" for i in range(1, 9)]
    (tmp_path / "classes.yaml").write_text("\n".join([*lines, "names: *a8", ""]))
    done = fastuda("train", "--source", f"folder:{tmp_path}", "--out", tmp_path / "run", *TINY)
    refused(done, "classes.yaml is not valid YAML", "aliases")


def test_lists_that_are_nested_too_deep(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "classes.yaml").write_text("names: [road, car]\n")
    (tmp_path / "splits.json").write_text("[" * 100_000)
    done = fastuda("train", "--source", f"folder:{tmp_path}:train", "--out", tmp_path / "run", *TINY)
    refused(done, "splits.json cannot be read as JSON")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "images/../../secret.png"])
def test_a_list_that_leads_out_of_the_folder(name, scenes_root, tmp_path):
    root = tmp_path / "mine"
    shutil.copytree(scenes_root / "scenes" / "gta5" / "images", root / "images")
    shutil.copy(next((root / "images").iterdir()), tmp_path / "secret.png")
    (root / "classes.yaml").write_text("names: [road, car]\n")
    (root / "train.txt").write_text(f"{name}\n")
    (root / "val.txt").write_text("00000\n")
    done = fastuda(
        "train", "--data-root", scenes_root, "--target", f"folder:{root}", "--out", tmp_path / "run", *TINY
    )
    refused(done, "train.txt", name, "leads out of the data set")


@pytest.mark.parametrize("place", ["images: ../other/{path}.png", "labels: /etc/{path}.png"])
def test_patterns_that_lead_out_of_the_folder(place, scenes_root, tmp_path):
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "classes.yaml").write_text(f"names: [road, car]\n{place}\n")
    done = fastuda("train", "--data-root", scenes_root, "--target", f"folder:{tmp_path / 'mine'}", *TINY)
    refused(done, "patterns inside the folder")
