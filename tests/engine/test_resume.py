"""N steps are k steps, a stop of any kind, and N - k more: bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch

from fastuda.engine import checkpoint
from fastuda.errors import UserError
from fastuda.methods import METHODS
from fastuda.models import ModelConfig, build_model
from fastuda.system.files import written
from fastuda.system.random import rng_state, seed_everything, set_rng_state
from tests.program import TINY, command, curves, environment, equal, fastuda, state, without_clocks

STEPS = 6


def arguments(root, out, method="plca", *more):
    return ["--method", method, "--data-root", root, "--out", out, "--steps", STEPS, "--quiet", *TINY,
            "log.every=4", "checkpoint.every=1", *more]  # fmt: skip


def same_end(a, b):
    assert equal(without_clocks(state(a)), without_clocks(state(b)))
    assert curves(a) == curves(b)
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, scenes_root):
    out = tmp_path_factory.mktemp("whole") / "run"
    done = fastuda("train", *arguments(scenes_root, out))
    assert done.returncode == 0, done.stderr
    return out


def wait_for_step(out, step, process):
    path = out / "metrics.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if state(out)["step"] >= step:
                return
        except (OSError, RuntimeError):
            pass
        time.sleep(0.05)
    assert process.poll() is None or path.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_is_undisturbed(whole, scenes_root, tmp_path, number):
    out = tmp_path / "run"
    args = arguments(scenes_root, out)
    process = subprocess.Popen(
        command("train", *args), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_step(out, 2, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    if number != signal.SIGKILL:
        assert process.returncode == 0 and "Traceback" not in stderr, stderr
    again = fastuda("train", *args, "--resume", "auto")
    assert again.returncode == 0, again.stderr
    same_end(whole, out)


SIGNALLED = """
import os
import signal
from fastuda.methods.source_only import SourceOnly

class Signalled(SourceOnly):
    def predict(self, images):
        if os.environ.get("ARMED"):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().predict(images)
"""


@pytest.mark.parametrize("last", [False, True])
def test_a_signal_does_not_wait_for_the_evaluation(last, scenes_root, tmp_path, monkeypatch):
    """It ends after the image that is in work; the resumed run evaluates that step first."""
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    monkeypatch.syspath_prepend(tmp_path)
    more = [
        "signalled:Signalled",
        "eval.every=2",
        "--steps",
        2 if last else 5,
        "log.every=3",
        "checkpoint.every=3",
    ]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert fastuda("train", *arguments(scenes_root, whole, *more)).returncode == 0
    monkeypatch.setenv("ARMED", "1")
    stopped = fastuda("train", *arguments(scenes_root, out, *more))
    assert stopped.returncode == 0 and "stopped at step 2; continue with" in stopped.stdout, stopped.stderr
    assert not any("val/" in name for _, name, _ in curves(out)) and state(out)["step"] == 2
    monkeypatch.delenv("ARMED")
    again = fastuda("train", *arguments(scenes_root, out, *more), "--resume", "auto")
    assert again.returncode == 0, again.stderr
    same_end(whole, out)


def test_an_interrupted_evaluation_is_made_up_for_with_any_interval(scenes_root, tmp_path, monkeypatch):
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "run"
    args = arguments(scenes_root, out, "signalled:Signalled", "--steps", 4)
    monkeypatch.setenv("ARMED", "1")
    assert fastuda("train", *args, "eval.every=2").returncode == 0 and state(out)["owed"]
    monkeypatch.delenv("ARMED")
    again = fastuda("train", *args, "eval.every=3", "--resume", "auto")
    assert again.returncode == 0, again.stderr
    assert sorted({step for step, name, _ in curves(out) if name.startswith("val/")}) == [2, 3, 4]


OPTIONS = ["self_training with its options", "self_training with its options and hrda"]


@pytest.mark.parametrize("method", [*sorted(METHODS), *OPTIONS])
def test_every_method_resumes_bit_for_bit(method, scenes_root, tmp_path):
    more = ["checkpoint.keep=9", "eval.every=2", "train.accumulate=2"]
    if " " in method:
        weights = tmp_path / "small.pth"
        torch.save(build_model(ModelConfig(backbone="small"), 19).state_dict(), weights)
        more += ["--weights", weights, "method.mask_ratio=0.7", "method.mask_block=8"]
        more += ["method.mask_images=both", "method.feature_distance=0.1", "method.feature_target=0.1"]
        more += ["model.hrda=[16, 32]"] if "hrda" in method else []
        method = method.split()[0]
    whole, out = tmp_path / "whole", tmp_path / "run"
    done = fastuda("train", *arguments(scenes_root, whole, method, *more, "--steps", 5))
    assert done.returncode == 0, done.stderr
    (out / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / "step_0000003.pt", out / "checkpoints" / "last.pt")
    shutil.copy(whole / "metrics.csv", out)
    torch.manual_seed(99)  # nothing may depend on what was drawn before
    resumed = fastuda("train", *arguments(scenes_root, out, method, *more, "--steps", 5, "--resume", "auto"))
    assert resumed.returncode == 0, resumed.stderr
    same_end(whole, out)


def test_resuming_needs_no_settings_again(scenes_root, tmp_path):
    out = tmp_path / "run"
    done = fastuda("train", *arguments(scenes_root, out, "plca", "method.lsr_weight=0.5", "--steps", 2))
    assert done.returncode == 0, done.stderr
    (out / "result.json").unlink()
    again = fastuda("train", "--resume", "auto", "--out", out, "--steps", 3, "--quiet")
    assert again.returncode == 0 and state(out)["step"] == 3, again.stderr
    assert state(out)["config"]["method"]["lsr_weight"] == 0.5


def test_resuming_a_finished_run_changes_nothing(whole, scenes_root):
    before = (whole / "metrics.csv").read_bytes()
    done = fastuda("train", *arguments(scenes_root, whole), "--resume", "auto")
    assert done.returncode == 0 and "mIoU19" in done.stdout
    assert (whole / "metrics.csv").read_bytes() == before


def test_a_finished_run_goes_on_when_more_steps_are_asked_for(scenes_root, tmp_path):
    out = tmp_path / "run"
    done = fastuda("train", *arguments(scenes_root, out, "source_only", "--steps", 2))
    assert done.returncode == 0, done.stderr
    first = state(out, "best.pt")["best"]
    again = fastuda("train", "--resume", "auto", "--out", out, "--steps", 3, "--quiet")
    assert again.returncode == 0 and state(out)["step"] == 3, again.stderr
    assert json.loads((out / "result.json").read_text())["step"] == 3
    # what the first end scored is still known: a worse one does not take its place
    second = next(float(value) for _, name, value in curves(out) if name == "val/mIoU19")
    assert state(out)["best"] == state(out, "best.pt")["best"] == max(first, second)


def test_a_resumed_run_takes_the_rates_that_it_is_given(scenes_root, tmp_path):
    out, constant = tmp_path / "run", ("optim.schedule=constant", "optim.warmup=0", "log.every=1")
    done = fastuda("train", *arguments(scenes_root, out, "fada", *constant, "--steps", 2))
    assert done.returncode == 0, done.stderr
    more = ("optim.lr=0.5", "optim.weight_decay=0.25", "optim.networks.discriminator.lr=0.125")
    again = fastuda("train", "--resume", "auto", "--out", out, "--steps", 3, "--quiet", *more)
    assert again.returncode == 0, again.stderr
    rates = {name: float(value) for step, name, value in curves(out) if step == 3 and name.startswith("lr/")}
    assert rates == {"lr/model": 0.5, "lr/discriminator": 0.125}
    saved = state(out)["optimizers"]
    assert [group["weight_decay"] for group in saved["model"]["param_groups"]] == [0.25, 0.25]
    assert saved["discriminator"]["state"][0]["step"] == 3  # its moments went on


def test_a_damaged_result_is_scored_again(scenes_root, tmp_path):
    out = tmp_path / "run"
    args = arguments(scenes_root, out, "source_only", "--steps", 2)
    assert fastuda("train", *args).returncode == 0
    whole = (out / "result.json").read_text()
    (out / "result.json").write_text(whole[:40])
    done = fastuda("train", *args, "--resume", "auto")
    assert done.returncode == 0 and "result.json is damaged" in done.stderr, done.stderr
    assert (out / "result.json").read_text() == whole


def test_same_seed_same_run_other_seed_another(whole, scenes_root, tmp_path):
    assert fastuda("train", *arguments(scenes_root, tmp_path / "a")).returncode == 0
    same_end(whole, tmp_path / "a")
    assert fastuda("train", *arguments(scenes_root, tmp_path / "b"), "--seed", 1).returncode == 0
    assert curves(whole) != curves(tmp_path / "b")


def test_how_often_a_run_is_evaluated_changes_nothing_in_it(scenes_root, tmp_path):
    for every in (0, 1):
        args = arguments(scenes_root, tmp_path / str(every), "self_training", f"eval.every={every}")
        assert fastuda("train", *args, "--steps", 3).returncode == 0
    one, two = (tmp_path / str(every) / "model.safetensors" for every in (0, 1))
    assert one.read_bytes() == two.read_bytes()


def test_a_checkpoint_of_another_method_is_refused(whole, scenes_root, tmp_path):
    args = arguments(scenes_root, tmp_path / "run", "source_only")
    done = fastuda("train", *args, "--resume", whole / "checkpoints" / "last.pt")
    assert done.returncode == 2 and "is of method 'plca', this run is 'source_only'" in done.stderr


def test_a_truncated_checkpoint_is_named(whole, scenes_root, tmp_path):
    cut = tmp_path / "cut.pt"
    data = (whole / "checkpoints" / "last.pt").read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    done = fastuda("train", *arguments(scenes_root, tmp_path / "run"), "--resume", cut)
    assert done.returncode == 2 and "cut.pt cannot be read as a checkpoint" in done.stderr


def test_a_run_whose_last_checkpoint_is_truncated_says_how_to_go_on(scenes_root, tmp_path):
    out = tmp_path / "run"
    args = arguments(scenes_root, out, "source_only", "--steps", 2, "eval.every=1")
    assert fastuda("train", *args).returncode == 0
    (out / "result.json").unlink()
    last, best = out / "checkpoints" / "last.pt", out / "checkpoints" / "best.pt"
    last.write_bytes(last.read_bytes()[:4000])
    done = fastuda("train", *args, "--resume", "auto")
    assert done.returncode == 2 and f"continue from the best with --resume {best}" in done.stderr
    assert fastuda("train", *args, "--resume", best).returncode == 0
    (out / "result.json").unlink()
    best.unlink()
    done = fastuda("train", *args, "--resume", "auto")
    assert done.returncode == 2 and f"start again without {out / 'checkpoints'}" in done.stderr


def test_a_write_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})

    with pytest.raises(UserError, match="No space left on device"), written(path, fsync=True) as draft:
        draft.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert checkpoint.load(path)["step"] == 1 and os.listdir(tmp_path) == ["last.pt"]


def test_random_states_come_back():
    seed_everything(3)
    saved = rng_state()
    drawn = torch.rand(3), random.random()
    set_rng_state(saved)
    assert torch.equal(torch.rand(3), drawn[0]) and random.random() == drawn[1]


def test_checkpoints_with_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('executed')",))

    torch.save({"format": 1, "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt cannot be read as a checkpoint"):
        checkpoint.load(tmp_path / "evil.pt")


def test_tensorboard_keeps_the_points_of_the_checkpointed_step(scenes_root, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    more = ("source_only", "log.tensorboard=true", "log.every=1", "checkpoint.keep=9")
    assert fastuda("train", *arguments(scenes_root, out, *more), "--steps", 4).returncode == 0
    older = out / "checkpoints" / "step_0000002.pt"
    done = fastuda("train", *arguments(scenes_root, out, *more), "--steps", 4, "--resume", older)
    assert done.returncode == 0, done.stderr
    events = accumulator.EventAccumulator(str(out / "tb")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
