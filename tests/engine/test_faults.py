"""What can go wrong around a run, done for real: each ends in one clear line, and nothing good is lost."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastuda.engine import checkpoint
from fastuda.engine.state import newest
from fastuda.errors import UserError
from fastuda.system.files import written
from tests.engine.runs import arguments, refused, wait_for_checkpoint
from tests.program import command, curves, environment, equal, fastuda, state, without_clocks


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_weights_with_code_are_refused_and_not_run(scenes_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    done = fastuda("train", *arguments(scenes_root, tmp_path / "run", "--weights", tmp_path / "evil.pth"))
    refused(done, "evil.pth")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()


def test_a_checkpoint_with_code_is_refused_and_not_run(scenes_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, tmp_path / "evil.pt")
    done = fastuda("train", *arguments(scenes_root, tmp_path / "run", "--resume", tmp_path / "evil.pt"))
    refused(done, "evil.pt cannot be read as a checkpoint")
    assert not (tmp_path / "executed").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, scenes_root):
    out = tmp_path_factory.mktemp("faults") / "run"
    done = fastuda("train", *arguments(scenes_root, out, "checkpoint.keep=2"))
    assert done.returncode == 0, done.stderr
    return out


def test_older_checkpoints_are_kept_and_resumed_from_when_the_last_is_broken(whole, scenes_root, tmp_path):
    folder = whole / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [
        "best.pt", "last.pt", "step_0000002.pt", "step_0000003.pt",
    ]  # fmt: skip
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:5000])
    (out / "checkpoints" / "step_0000002.pt").write_bytes((folder / "step_0000002.pt").read_bytes())
    (out / "metrics.csv").write_bytes((whole / "metrics.csv").read_bytes())
    assert newest(out / "checkpoints").name == "step_0000002.pt"
    done = fastuda("train", *arguments(scenes_root, out, "--resume", "auto", "checkpoint.keep=2"))
    assert done.returncode == 0 and "last.pt cannot be read" in done.stderr, done.stderr
    assert equal(without_clocks(state(whole)), without_clocks(state(out)))
    assert curves(whole) == curves(out)


def test_checkpoints_of_another_network_or_version_are_refused(whole, scenes_root, tmp_path):
    last = whole / "checkpoints" / "last.pt"
    args = arguments(scenes_root, tmp_path / "run", "--resume", last, "--backbone", "resnet18")
    refused(fastuda("train", *args), "last.pt does not fit this configuration")
    torch.save({"format": 99}, tmp_path / "new.pt")
    args = arguments(scenes_root, tmp_path / "run", "--resume", tmp_path / "new.pt")
    refused(fastuda("train", *args), "new.pt is not a checkpoint of this version")
    assert not (tmp_path / "run").exists()


def test_an_empty_checkpoint_is_named(tmp_path):
    (tmp_path / "last.pt").touch()
    with pytest.raises(UserError, match=r"last\.pt cannot be read as a checkpoint: it is empty"):
        checkpoint.load(tmp_path / "last.pt")


def test_another_run_is_not_written_over(whole, scenes_root, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    last = whole / "checkpoints" / "last.pt"
    args = arguments(scenes_root, tmp_path / "other", "--resume", last)
    refused(fastuda("train", *args), "holds another run")


def test_a_full_disk_keeps_the_checkpoint_before(scenes_root, tmp_path, monkeypatch):
    real, calls = torch.save, []

    def save(value, file):
        calls.append(file)
        if len(calls) == 3:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(value, file)

    monkeypatch.setattr(torch, "save", save)
    out = tmp_path / "run"
    refused(fastuda("train", *arguments(scenes_root, out)), "last.pt: No space left on device")
    assert state(out)["step"] == 2 and [p.name for p in (out / "checkpoints").iterdir()] == ["last.pt"]


def test_weights_are_readable_as_every_file_is(whole):
    modes = {path.name: path.stat().st_mode for path in whole.iterdir() if path.is_file()}
    assert set(modes.values()) == {modes["config.yaml"]}


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with written(tmp_path / "pipe", fsync=True) as place:
        place.write_bytes(b"whole")
    assert os.read(reader, 10) == b"whole" and os.listdir(tmp_path) == ["pipe"]
    os.close(reader)


def test_curves_on_a_full_disk(scenes_root, tmp_path):
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "metrics.csv").symlink_to("/dev/full")
    done = fastuda("train", *arguments(scenes_root, out, "--resume", "auto", "log.every=1"))
    refused(done, "cannot write", "No space left on device")


def test_tensorboard_on_a_full_disk(tmp_path, capsys, monkeypatch):
    """Its writing thread fails, which is said once: by the call that follows."""
    from tensorboard.compat.tensorflow_stub.io import gfile

    from fastuda.engine.curves import TensorBoardLogger

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gfile.LocalFileSystem, "_write", full)
    hook = threading.excepthook
    with pytest.raises(OSError, match="No space left on device"):
        TensorBoardLogger(tmp_path)
    assert threading.excepthook is hook and capsys.readouterr().err == ""


WRITERS = {"torch": lambda file: torch.save(torch.zeros(99999), file),
           "numpy": lambda file: np.save(file, np.zeros(99999))}  # fmt: skip


@pytest.mark.parametrize("library", WRITERS)
def test_a_library_that_hides_why_a_write_failed(library):
    full = Path("/dev/full")
    with pytest.raises(OSError, match="No space left on device"), checkpoint.open_for_library(full) as file:
        WRITERS[library](file)


def test_the_log_on_a_full_disk(scenes_root, tmp_path):
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "log.txt").symlink_to("/dev/full")
    done = fastuda("train", *arguments(scenes_root, out, "--resume", "auto"))
    refused(done, f"cannot write {out / 'log.txt'}: No space left on device")
    assert len(done.stderr.splitlines()) == 1


def test_a_crop_that_batch_norm_cannot_take(scenes_root, tmp_path):
    for size, batch, code in ((8, 1, 2), (8, 2, 0), (16, 1, 0)):
        size_flags = ("--crop", size, size, "--batch-size", batch, "--method", "source_only")
        done = fastuda("train", *arguments(scenes_root, tmp_path / f"{size} {batch}", *size_flags))
        assert done.returncode == code, done.stderr
        if code:
            refused(
                done, "crops of 8 x 8", "data.crop and data.target_crop to 16 x 16", "data.batch_size to 2"
            )


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_a_folder_that_cannot_be_made(scenes_root, tmp_path, place):
    (tmp_path / "file").write_text("")
    refused(fastuda("train", *arguments(scenes_root, tmp_path / place)), "cannot write")


FAILING = """
import torch
from fastuda.methods.source_only import SourceOnly
from fastuda.methods import Phase

class Memory(SourceOnly):
    def phases(self, batch, step):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

class Broken(SourceOnly):
    value = float("nan")
    def phases(self, batch, step):
        for phase in super().phases(batch, step):
            good = phase.losses["ce"]
            yield Phase("model", {"ce": good, "extra": good * (self.value if step == 2 else 0.0)})

class Inf(Broken):
    value = float("-inf")

class Root(SourceOnly):
    def phases(self, batch, step):
        for phase in super().phases(batch, step):
            good = phase.losses["ce"]
            yield Phase("model", {"ce": good, "root": (good * 0).sqrt() if step == 2 else good * 0})
"""


@pytest.fixture
def failing(tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)


def test_out_of_memory_names_the_knobs(failing, scenes_root, tmp_path):
    done = fastuda("train", *arguments(scenes_root, tmp_path / "run", "--method", "failing:Memory"))
    refused(done, "out of memory", "--batch-size", "train.accumulate", "--crop", "--amp")


@pytest.mark.parametrize(("method", "said"), [("Broken", "nan"), ("Inf", "-inf")])
def test_a_loss_that_is_not_finite_is_named_and_dumped(method, said, failing, scenes_root, tmp_path):
    out = tmp_path / "run"
    done = fastuda("train", *arguments(scenes_root, out, "--method", f"failing:{method}"))
    refused(done, f"step 2: the loss is not finite (extra = {said})", ".png")
    found = json.loads((out / "not_finite.json").read_text())
    assert found["step"] == 2 and found["losses"]["extra"] == said and len(found["source_files"]) == 2
    last = state(out)
    assert last["step"] == 2 and all(torch.isfinite(v).all() for v in last["method"].values())


def test_weights_that_are_not_finite_are_no_checkpoint(failing, scenes_root, tmp_path):
    """The root of 0 is finite, its gradient is not; the step is the last."""
    out = tmp_path / "run"
    done = fastuda("train", *arguments(scenes_root, out, "--method", "failing:Root"))
    refused(done, "step 3: the weights of model are not finite", "The last checkpoint is untouched")
    assert state(out)["step"] == 2 and not (out / "model.safetensors").exists()
    assert all(torch.isfinite(v).all() for v in state(out)["method"].values())


BAD_YAML = {
    "bomb": "a: &a [x, x, x]\nb: &b [*a, *a, *a]\noptim: {networks: {x: *b}}\n",
    "aliases": "optim: {networks: &n {m: 1}}\ntrain: *n\n",
    "deep": "[" * 5000,
    "tag": "train: !!python/object/apply:os.system ['touch executed']\n",
    "list": "- a\n- b\n",
    "open": "train: {steps: 3\n",
    "extends": "extends: 3\n",
    "bytes": "\udcff",
    "methods": "methods: {plca: 3}\n",
}


@pytest.mark.parametrize("kind", BAD_YAML)
def test_bad_yaml(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(BAD_YAML[kind], errors="surrogateescape")
    named = "plca must be a section" if kind == "methods" else "c.yaml"
    refused(fastuda("train", "--config", "c.yaml", "--print-config"), named)
    assert not (tmp_path / "executed").exists()


def test_configurations_that_extend_each_other(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    refused(fastuda("train", "--config", tmp_path / "a.yaml", "--print-config"), ", which extends it")


@pytest.mark.parametrize(
    "setting",
    ["train.steps=0", "data.batch_size=0", "log.every=0", "optim.lr=-1", "optim.lr=.nan", "train.seed=-1",
     "optim.momentum=-1", "optim.weight_decay=-1", "optim.clip_norm=-1", "optim.horizon=0",
     "model.aspp_init_std=-1"],
)  # fmt: skip
def test_senseless_numbers(setting):
    refused(fastuda("train", setting, "--print-config"), setting.partition("=")[0], "must be ")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (f"train.seed={10**20}", "must be from 0 to 1e+16"),
        ("data.flip=2", "must be from 0 to 1"),
        ("data.rare_temperature=0", "must be above 0"),
        ("optim.betas=[0.9, 1]", "must be at least 0 and below 1"),
        ("optim.lr=.inf", "must be a finite number"),
        ("optim.networks={model: {lr: .nan}}", "optim.networks.model.lr is nan; it must be a finite number"),
        ("method.lsr_weight=.inf", "must be a finite number"),
        ("method.aggregation_alpha=2", "is 2.0; it must be from 0 to 1"),
    ],
)
def test_numbers_out_of_range(setting, message):
    refused(fastuda("train", setting, "--print-config"), setting.partition("=")[0], message)


@pytest.mark.parametrize(
    ("method", "setting"),
    [("fada", "clip=0"), ("fada", "temperature=-1"), ("asanet", "width=0"), ("weakseg", "dropout=7"),
     ("weakseg", "smooth_max=0"), ("self_training", "ema_decay=7"), ("sepico", "jitter_strength=-1")],
)  # fmt: skip
def test_numbers_of_a_method_out_of_range(method, setting):
    done = fastuda("train", "--method", method, f"method.{setting}", "--print-config")
    refused(done, f"method.{setting.partition('=')[0]} is", "must be")
    part = f"method.{method}.{setting}"
    refused(fastuda("train", "--method", f"plca+{method}", part, "--print-config"), part.partition("=")[0])


def test_settings_of_one_network(scenes_root, tmp_path):
    args = arguments(scenes_root, tmp_path / "run")
    refused(
        fastuda("train", *args, "optim.networks={model: {lr: -1}}"),
        "optim.networks.model.lr is -1.0; it must be at least 0",
    )
    refused(fastuda("train", *args, "optim.networks={model: 3}"), "optim.networks.model must be a section")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "setting",
    ["data.source_resize=[9, 8]", "data.target_resize=[0, 8]", "data.source_size=[0, 8]",
     "data.target_size=[8, -1]", "data.eval_size=[0, 0]"],
)  # fmt: skip
def test_senseless_sizes(setting, tmp_path):
    refused(fastuda("train", setting, "--print-config"), setting.partition("=")[0])
    args = ("--stages", f"stages.distill.{setting}", "--out", tmp_path / "run")
    refused(fastuda("train", *args), setting.partition("=")[0])
    assert not (tmp_path / "run").exists()


def test_a_resampling_that_there_is_not():
    done = fastuda("train", "data.resampling=cubic", "--print-config")
    refused(done, "data.resampling is 'cubic': choose bilinear or bicubic")


def started(*args):
    return subprocess.Popen(
        command("train", *args), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def test_a_signal_to_the_whole_group_stops_with_a_checkpoint(scenes_root, tmp_path):
    out = tmp_path / "run"
    process = started(*arguments(scenes_root, out, "--steps", 5000, "--workers", 2))
    wait_for_checkpoint(out, process)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and "continue with --resume auto" in stdout, stderr
    assert "Traceback" not in stderr and state(out)["step"] >= 1


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_a_loader_process_that_is_killed_anywhere(where, scenes_root, tmp_path, monkeypatch):
    """torch notices in its handler of SIGCHLD, which raises wherever the main thread is."""
    from fastuda.engine import trainer
    from fastuda.inference import evaluation

    def kill_a_worker():
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        for _ in range(500):
            time.sleep(0.01)  # the handler runs between two instructions of this thread

    def killing(function):
        def replaced(*args, **kwargs):
            kill_a_worker()
            return function(*args, **kwargs)

        return replaced

    if where == "step":
        monkeypatch.setattr(trainer, "jitter_source", killing(trainer.jitter_source))
    else:
        monkeypatch.setattr(evaluation.F, "upsample_confusion", killing(evaluation.F.upsample_confusion))
    done = fastuda("train", *arguments(scenes_root, tmp_path / "run", "--workers", 1))
    refused(done, "a loader process died (DataLoader worker (pid", "Try fewer data.workers")
    assert len(done.stderr.splitlines()) == 1


KILLS = 18
"""Of every method: over 50 in all."""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plca", "fada", "sepico"])
def test_kills_at_random_moments(method, scenes_root, tmp_path):
    """SIGKILL at any instant, every other one while a checkpoint is being written: the newest checkpoint
    reads, no step is lost twice, and the end is the same."""
    args = ["--method", method, "--steps", 40, "checkpoint.keep=1", "eval.every=7", "log.every=3"]
    if method == "sepico":
        args.append("method.contrast_start=5")
    whole = tmp_path / "whole"
    assert fastuda("train", *arguments(scenes_root, whole, *args)).returncode == 0
    generator, kills, runs, writing = random.Random(method), 0, 0, 0
    while kills < KILLS:
        out = tmp_path / f"run{runs}"
        more = arguments(scenes_root, out, *args, "--resume", "auto")
        while kills < KILLS and not (out / "result.json").exists():
            before = step_of(newest(out / "checkpoints"))
            seconds = generator.uniform(0.05, 0.6)
            drafts = out / "checkpoints" if kills % 2 else None
            kills += killed_after(seconds, drafts, *more)
            writing += any(out.glob("checkpoints/.*.draft.pt"))
            assert step_of(newest(out / "checkpoints")) >= before
        done = fastuda("train", *more)
        assert done.returncode == 0, done.stderr
        assert equal(without_clocks(state(whole)), without_clocks(state(out)))
        assert curves(whole) == curves(out)
        assert (whole / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
        assert not list(out.rglob(".*.draft*"))
        runs += 1
    assert writing >= KILLS // 4, f"only {writing} of {kills} kills met a half-written checkpoint"


def step_of(path: Path | None) -> int:
    return checkpoint.load(path)["step"] if path else 0


def killed_after(seconds: float, drafts: Path | None, *args) -> bool:
    """Train in a forked process and kill it after ``seconds``, or as soon as there is a draft of a checkpoint
    in ``drafts`` from then on; whether it was still alive."""
    child = os.fork()
    if child == 0:
        try:
            fastuda("train", *args)
        finally:
            os._exit(0)
    time.sleep(seconds)
    while drafts and not any(drafts.glob(".*.draft.pt")):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(1e-4)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
