"""Several processes are one: gradients, statistics, evaluation, and coming back after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fastuda.engine.parallel import SyncedBatchNorm2d, sync_batch_norm
from fastuda.errors import UserError
from fastuda.methods import METHODS
from fastuda.models import ModelConfig, build_model
from fastuda.models.frozen import FrozenBatchNorm2d
from fastuda.system.distributed import World, fresh_store
from tests.engine.ddp_worker import steps
from tests.program import ROOT, TINY, curves, environment, equal, fastuda, state, without_clocks

SINGLE = World(0, 1, torch.device("cpu"))
# Lovasz-Softmax sorts the pixels of one process, as the published multi-GPU runs do: it has no joint value
CASES = {name: (name, {"lovasz_weight": 0.0}, 3) for name in ("source_only", "plca")}
CASES["fada"] = ("fada", {"width": 16, "adversarial_weight": 0.1}, 3)
CASES["asanet"] = ("asanet", {"width": 8, "adversarial_weight": 0.1}, 3)
CASES["asanet asc"] = ("asanet", {"strategy": "asc"}, 3)
CASES["weakseg"] = (
    "weakseg",
    {"dropout": 0.0, "category_width": 16, "category_weight": 0.1, "classification_weight": 0.2},
    3,
)
CASES["weakseg points"] = ("weakseg", {**CASES["weakseg"][1], "weak_labels": "points"}, 2)
CASES["fada hard"] = ("fada", {**CASES["fada"][1], "hard_threshold": 0.3}, 2)
# every class is pasted, and nothing is jittered: what is drawn at random has no joint value
PLAIN = {"mix_share": 1.0, "jitter_share": 0.0, "blur_share": 0.0, "threshold": 0.25}
CASES["self_training"] = ("self_training", PLAIN, 3)
OPTIONS = {"mask_ratio": 1e-9, "feature_distance": 0.3, "feature_classes": [1, 4]}  # the masks hide nothing
CASES["self_training with its options"] = ("self_training", {**PLAIN, **OPTIONS}, 3, True)
# the detail crop is as large as the image, so that both processes draw the same one
HRDA = {"model": {"hrda": (32, 64)}}
CASES["source_only with hrda"] = ("source_only", HRDA, 3, True)
for name in ("plca", "fada", "weakseg"):
    CASES[f"{name} with hrda"] = (name, {**CASES[name][1], **HRDA}, 2)
CASES["self_training with its options and hrda"] = ("self_training", {**PLAIN, **OPTIONS, **HRDA}, 3)
SMALL = {"width": 16, "contrast_start": 1, "tau": 0.1, "regularizer_weight": 0.5}
for variant in ("dist", "bank", "proto"):
    CASES[f"sepico {variant}"] = ("sepico", {**PLAIN, **SMALL, "variant": variant}, 3)
    CASES[f"sepico {variant} lopsided"] = (*CASES[f"sepico {variant}"], True)
PARTS = {"plca": {"lovasz_weight": 0.0}, "fada": CASES["fada"][1], "self_training": PLAIN}
CASES["composition"] = ("plca+fada+self_training", {**PARTS, "weights": {"plca": 0.5}}, 2)
PARTS = {"plca": {"lovasz_weight": 0.0}, "sepico": {**PLAIN, **SMALL}}
CASES["composition with a head"] = ("plca+sepico", PARTS, 2)
CASES["uneven"] = ("tests.engine.ddp_worker:Uneven", {}, 4)


def torchrun(*args: object, ranks: int = 2, restarts: int = 0) -> list[str]:
    port = 29500 + os.getpid() % 2000
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--max-restarts", str(restarts), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}",
        "--rdzv-id", str(port), "-m", *map(str, args),
    ]  # fmt: skip


def run(*args: object, **kwargs) -> subprocess.CompletedProcess:
    done = subprocess.run(
        torchrun(*args, **kwargs), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    torch.save(CASES, folder / "cases.pt")
    run("tests.engine.ddp_worker", folder / "cases.pt", folder / "results.pt")
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_gradients_of_the_joint_batch(two_ranks, case):
    name, settings, count, *lopsided = CASES[case]
    method, gradients = steps(name, settings, SINGLE, count, *lopsided)
    found = two_ranks[case]
    assert found["ranks_agree"]
    assert found["gradients"].keys() == gradients.keys()
    for key, truth in gradients.items():
        error = (found["gradients"][key] - truth).abs().max().item()
        assert error <= 1e-5 * max(truth.abs().max().item(), 1e-2), f"{key}: {error:.2e}"
    for key, truth in method.state_dict().items():
        torch.testing.assert_close(found["state"][key], truth, rtol=1e-5, atol=1e-7, msg=key)


def test_ranks_that_log_other_names_meet(two_ranks):
    assert two_ranks["means"] == {"both": 1.5, "of 0": 2.0, "of 1": 2.0, "another": 3.0}


def test_every_method_is_tried():
    assert set(METHODS) <= {name for name, *_ in CASES.values()} | {"third party"}


def arguments(root, out):
    return ["--method", "plca", "--data-root", root, "--out", out, "--steps", 5, *TINY, "checkpoint.every=1",
            "log.every=2", "eval.every=2"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, scenes_root):
    out = tmp_path_factory.mktemp("whole") / "run"
    run("fastuda.train", *arguments(scenes_root, out))
    return out


def test_a_run_of_two_processes_scores_as_one_process_does(whole):
    alone = fastuda("evaluate", whole, "--json")
    assert alone.returncode == 0, alone.stderr
    assert json.loads(alone.stdout)["iou"] == json.loads((whole / "result.json").read_text())["iou"]
    assert len(state(whole)["ranks"]) == 2


def test_two_processes_evaluate_as_one_and_one_of_them_speaks(whole):
    alone = json.loads(fastuda("evaluate", whole, "--json", "--ccd").stdout)
    both = json.loads(run("fastuda.evaluate", whole, "--json", "--ccd").stdout)
    assert both["iou"] == alone["iou"] and both["mean_ccd"] == pytest.approx(alone["mean_ccd"], rel=1e-4)
    assert both["ccd"] == {
        name: value if value is None else pytest.approx(value, rel=1e-4)
        for name, value in alone["ccd"].items()
    }


def test_another_number_of_processes_is_refused_with_the_reason(whole, scenes_root, tmp_path):
    last = whole / "checkpoints" / "last.pt"
    done = fastuda("train", *arguments(scenes_root, tmp_path / "run"), "--resume", last)
    assert done.returncode == 2 and "was written by 2 processes and this run has 1" in done.stderr


@pytest.mark.slow
def test_a_killed_rank_comes_back_by_itself(whole, scenes_root, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        torchrun("fastuda.train", *arguments(scenes_root, out), "--resume", "auto", restarts=2),
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "last.pt").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    ranks = [int(pid) for pid in subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()]  # fmt: skip
    assert ranks
    os.kill(ranks[-1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr[-3000:]
    assert equal(without_clocks(state(whole)), without_clocks(state(out)))
    assert curves(whole) == curves(out)


HANG = """
import sys, time, torch
from fastuda.methods import source_only
class Sleepy(source_only.SourceOnly):
    def after_step(self, step):
        import torch.distributed as dist
        if step == 1 and dist.get_rank() == 1:
            time.sleep(20)
"""


@pytest.mark.slow
def test_two_machines_meet_at_the_rendezvous(whole, scenes_root, tmp_path):
    """Two torchrun agents of one process each, as on two machines."""
    out = tmp_path / "run"
    agent = torchrun("fastuda.train", *arguments(scenes_root, out), ranks=1)
    agent[3:3] = ["--nnodes", "2", "--local-addr", "localhost"]
    agents = [
        subprocess.Popen(agent, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    for process in agents:
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said.decode()[-3000:]
    assert equal(without_clocks(state(whole)), without_clocks(state(out)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", ["none", "affine", "frozen"])
def test_frozen_batch_norm_is_not_joined(device, mode):
    model = build_model(ModelConfig(backbone="resnet18", freeze_bn=mode), 4)
    names = list(model.state_dict())
    model = sync_batch_norm(model, torch.device(device)).train()
    assert list(model.state_dict()) == names
    kinds = {(type(m), m.training) for m in model.modules() if isinstance(m, _BatchNorm)}
    joined = torch.nn.SyncBatchNorm if device == "cuda" else SyncedBatchNorm2d
    assert kinds == {(FrozenBatchNorm2d, False) if mode == "frozen" else (joined, True)}
    trained = [p for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters()]
    assert {p.requires_grad for p in trained} == {mode == "none"}


def test_a_restarted_group_shares_a_prefix_whatever_the_store_still_holds():
    store = torch.distributed.HashStore()
    for rank in (1, 2):
        store.set(f"fastuda/hello/{rank}", "of a dead rank")
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda rank: fresh_store(store, rank, 3, 20), range(3)))
    stores[0].set("said", "now")
    assert [s.get("said") for s in stores] == [b"now"] * 3
    with ThreadPoolExecutor(3) as pool:
        again = list(pool.map(lambda rank: fresh_store(store, rank, 3, 20), range(3)))
    assert not any(s.check(["said"]) for s in again)


def test_a_rank_that_never_joins_is_named():
    with pytest.raises(UserError, match=r"rank 1 did not join within 0\.1 s"):
        fresh_store(torch.distributed.HashStore(), 0, 2, 0.1)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(scenes_root, tmp_path):
    (tmp_path / "sleepy.py").write_text(HANG)
    args = ["--method", "sleepy:Sleepy", "--data-root", scenes_root, "--out", tmp_path / "run", "--steps", 4]
    done = subprocess.run(
        torchrun("fastuda.train", *args, *TINY, "train.timeout=4"), cwd=ROOT, capture_output=True, text=True,
        env=environment({"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}), timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "rank 0 waited train.timeout=4 s; nothing came from rank 1 (after step 1)" in done.stderr


@pytest.mark.parametrize("code", [0, 3])
def test_a_process_of_many_leaves_without_finalising_the_interpreter(code):
    program = (
        "import atexit, sys\n"
        "from fastuda import cli\n"
        "class Late:\n"
        "    def __del__(self): print('finalised', flush=True)\n"
        "sys.kept = Late()\n"
        "atexit.register(print, 'handler')\n"
        f"cli.run(lambda: print('main') or {code})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment({"WORLD_SIZE": "2"}), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split()) == (code, ["main", "handler"]), done.stderr


def test_three_stages_of_two_processes(scenes_root, tmp_path):
    out = tmp_path / "run"
    args = ["--method", "fada", "--data-root", scenes_root, "--out", out, "--steps", 1, "--stages", *TINY]
    done = run("fastuda.train", *args, "method.width=8")
    assert done.stdout.count("mIoU19") == 1
    labels, images = (
        {p.name for p in (out / "3_labels" / part).rglob("*.png")} for part in ("labels", "images")
    )
    assert labels == images and len(labels) == 8
    assert json.loads((out / "3_distill" / "result.json").read_text())["processes"] == 2
