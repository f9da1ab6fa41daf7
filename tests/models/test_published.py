"""Weights by name, from a server of this machine."""

import hashlib
import http.server
import io
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from fastuda.errors import UserError
from fastuda.models import ModelConfig, build_model, published
from fastuda.models.published import DINOV2, IMAGENET, WeightsFile
from fastuda.system import download
from tests.program import ROOT, TINY, environment, fastuda


class Answers(http.server.BaseHTTPRequestHandler):
    """Sends the server's ``content``, or half of it, after which it closes the connection or falls silent."""

    def do_GET(self):
        self.server.asked.append(self.path)
        kind, content = self.path.split("/")[1], self.server.content
        if kind == "absent":
            self.send_error(404)
            return
        self.send_response(200)
        if kind != "unsized":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if kind in ("whole", "unsized") else content[: len(content) // 2])
        self.wfile.flush()
        if kind == "silent":
            self.server.halfway.set()
            self.server.go_on.wait(60)

    def log_message(self, *_):
        pass


def content_of(model):
    file = io.BytesIO()
    torch.save({key: value for key, value in model.backbone.state_dict().items()}, file)
    return file.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of the weights of a small network, an empty cache, and no proxy."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    torch.manual_seed(7)
    model = build_model(ModelConfig(backbone="small"), 4)
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    web.content, web.asked = content_of(model), []
    web.halfway, web.go_on = threading.Event(), threading.Event()
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()

    def offer(kind, sha256=None):
        """Make the answer ``kind`` what ``imagenet`` is for the small network."""
        digest = hashlib.sha256(web.content).hexdigest()
        url = f"http://127.0.0.1:{web.server_address[1]}/{kind}/small-{digest[:8]}.pth"
        file = WeightsFile(url, digest[:8] if sha256 is None else sha256, "a test's", "none")
        monkeypatch.setitem(published.IMAGENET, "small", file)
        return file

    yield SimpleNamespace(offer=offer, web=web, model=model, folder=tmp_path / "cache/hub/checkpoints")
    web.go_on.set()
    web.shutdown()
    web.server_close()


def left(folder):
    """Names of all files in the cache, hidden ones included."""
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def loaded(backbone="small", **settings):
    return build_model(ModelConfig(backbone=backbone, weights="imagenet", **settings), 4)


@pytest.mark.parametrize("kind", ["whole", "unsized"])
def test_a_file_is_downloaded_once_and_then_needs_no_network(server, kind):
    file = server.offer(kind)
    for _ in range(2):
        model = loaded()
        for key, value in server.model.backbone.state_dict().items():
            assert torch.equal(model.backbone.state_dict()[key], value), key
        server.web.shutdown()
    assert server.web.asked == [f"/{kind}/{file.name}"]
    assert left(server.folder) == [file.name] and file.path == server.folder / file.name


@pytest.mark.parametrize(
    ("kind", "sha256", "reason"),
    [
        ("whole", "0123abcd", "is not the published file: its SHA-256 begins with .{8}, not with 0123abcd;"),
        ("half", None, r"cannot be downloaded: the connection broke off \d+ bytes before the end;"),
        ("absent", None, "cannot be downloaded: Not Found;"),
    ],
)
def test_what_is_not_the_file_leaves_nothing(server, kind, sha256, reason):
    file = server.offer(kind, sha256)
    with pytest.raises(UserError, match=reason) as refusal:
        loaded()
    assert f"download it by hand and put it at {file.path}" in str(refusal.value)
    assert left(server.folder) == []


def test_without_a_network_the_place_of_the_file_is_named(server):
    file = server.offer("whole")
    server.web.shutdown()
    server.web.server_close()
    with pytest.raises(UserError, match=r"cannot be downloaded: .*Connection refused; download it by hand"):
        loaded()
    server.folder.mkdir(parents=True, exist_ok=True)
    file.path.write_bytes(server.web.content)
    assert torch.equal(loaded().backbone.stem[0].weight, server.model.backbone.stem[0].weight)


def test_a_silent_server_is_given_up(server, monkeypatch):
    server.offer("silent")
    monkeypatch.setattr(download, "PATIENCE", 0.2)
    with pytest.raises(UserError, match=r"cannot be downloaded: .*timed out"):
        loaded()
    assert left(server.folder) == []


def test_a_file_in_the_cache_that_is_damaged_is_refused(server):
    file = server.offer("whole")
    loaded()
    content = bytearray(file.path.read_bytes())
    content[len(content) // 2] ^= 1
    file.path.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged: its SHA-256 begins .*; delete it, and it is"):
        loaded()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_leaves_nothing_under_the_name(server, number):
    file = server.offer("silent")
    code = "import sys; from pathlib import Path; from fastuda.system.download import download;"
    code += "download(sys.argv[1], Path(sys.argv[2]), sys.argv[3], quiet=True)"
    command = [sys.executable, "-c", code, file.url, str(file.path), file.sha256]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
    assert server.web.halfway.wait(60)
    deadline = time.monotonic() + 60
    while not left(server.folder) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) != 0
    assert file.name not in left(server.folder)
    if number != signal.SIGKILL:
        assert left(server.folder) == []
    server.offer("whole")
    loaded()


def test_a_full_disk_is_named_as_such(server, monkeypatch):
    file = server.offer("whole")
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(download.hashlib, "sha256", lambda: SimpleNamespace(update=lambda _: raised(full)))
    with pytest.raises(UserError, match=rf"cannot write {file.path}: No space left on device"):
        loaded()
    assert left(server.folder) == []


def raised(error):
    raise error


def test_a_run_trains_from_the_name_and_shows_the_progress(server, tmp_path):
    file = server.offer("whole")
    words = ("--method", "source_only", "--steps", 1, "--weights", "imagenet", "--out", tmp_path / "run")
    words += ("data.eval_split=none", "eval.pictures=0")
    done = fastuda("train", *TINY, *words)
    assert done.returncode == 0, done.stderr
    assert f"{file.name}: 100%" in done.stderr and "B/s]" in done.stderr
    assert f"weights {file.path}" in done.stderr
    assert "weights: imagenet" in (tmp_path / "run" / "config.yaml").read_text()
    server.web.shutdown()
    again = fastuda("train", *TINY, *words, "--resume", "auto", "--quiet")
    assert again.returncode == 0 and again.stderr == ""
    assert server.web.asked == [f"/whole/{file.name}"]


def test_a_run_that_gets_no_weights_ends_in_one_line(server, tmp_path):
    server.offer("absent")
    done = fastuda("train", *TINY, "--weights", "imagenet", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: http://127.0.0.1")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "small"}, "model.weights imagenet: no file is known for small; there are efficient"),
        ({"backbone": "resnet50", "caffe": True}, "does not fit a Caffe-style ResNet: set model.caffe=false"),
        ({"backbone": "vgg16", "input": "caffe_vgg"}, "expects images as imagenet, and model.input is caffe"),
        ({"backbone": "efficientnet_lite0", "input": "imagenet"}, "expects images as half"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_not_downloaded(settings, message):
    with pytest.raises(UserError, match=message):
        loaded(**settings)


def test_a_misspelt_name_is_told_from_a_path(tmp_path):
    with pytest.raises(UserError, match=r"no weights file at imagnet; did you mean imagenet\?"):
        build_model(ModelConfig(backbone="small", weights="imagnet"), 4)


def test_file_names_hold_the_digits_of_their_sums():
    for file in IMAGENET.values():
        assert file.name.removesuffix(".pth").endswith(f"-{file.sha256}") and len(file.sha256) == 8
    for name, file in DINOV2.items():
        assert file.name == f"{name}_pretrain.pth" and len(file.sha256) == 64
    every = [*IMAGENET.values(), *DINOV2.values()]
    assert all(file.url.startswith("https://") for file in every)
    assert len({file.sha256 for file in every}) == len(every)


def test_the_cache_is_torchs(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    file = IMAGENET["resnet50"]
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert file.path == tmp_path / "torch/hub/checkpoints/resnet50-0676ba61.pth"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "own"))
    assert file.path == tmp_path / "own/hub/checkpoints/resnet50-0676ba61.pth"
