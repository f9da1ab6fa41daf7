"""Files are written whole or not at all, and drafts of killed processes go away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fastuda.errors import UserError
from fastuda.system import files
from fastuda.system.files import clean, written
from tests.program import TINY, environment, fastuda, untrained_run

WRITER = """
import os, pathlib, signal, sys
from fastuda.system.files import written
with written(pathlib.Path(sys.argv[1])) as draft:
    draft.write_text("half")
    print(draft.name, flush=True)
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "killed" else sys.stdin.read()
"""


def writer(path, how):
    command = [sys.executable, "-c", WRITER, str(path), how]
    process = subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


def test_the_draft_keeps_the_suffix(tmp_path):
    with written(tmp_path / "new" / "a.tar.gz") as draft:
        assert draft.suffix == ".gz" and draft.parent == tmp_path / "new" and draft.name[0] == "."
        draft.write_text("x")
    assert os.listdir(tmp_path / "new") == ["a.tar.gz"]


@pytest.mark.parametrize("fsync", [False, True])
def test_a_failed_write_leaves_the_file_before(fsync, tmp_path):
    (tmp_path / "a").write_text("before")
    with (
        pytest.raises(UserError, match="a: No space left on device"),
        written(tmp_path / "a", fsync=fsync) as draft,
    ):
        draft.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyError), written(tmp_path / "a", fsync=fsync) as draft:
        draft.write_text("half")
        raise KeyError
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "before"


def test_a_folder_in_the_way(tmp_path):
    with pytest.raises(UserError, match="Is a directory"), written(tmp_path):
        pass


def test_drafts_of_killed_processes_are_removed_and_no_other_file(tmp_path):
    kept = {".git", ".a.draft", "a.1.draft.png", ".a.x.draft.png", ".a.1.draft.png.orig.bak"}
    for name in kept:
        (tmp_path / name).write_text("")
    killed, draft = writer(tmp_path / "a.png", "killed")
    assert killed.wait() == -signal.SIGKILL and draft.endswith(".draft.png")
    alive, other = writer(tmp_path / "b.png", "alive")
    assert set(os.listdir(tmp_path)) == kept | {draft, other}
    clean(tmp_path)
    assert set(os.listdir(tmp_path)) == kept | {other}
    alive.communicate("")
    assert set(os.listdir(tmp_path)) == kept | {"b.png"}


def test_only_a_recursive_cleaning_goes_below(tmp_path):
    killed, draft = writer(tmp_path / "below" / "a.png", "killed")
    killed.wait()
    clean(tmp_path)
    assert os.listdir(tmp_path / "below") == [draft]
    clean(tmp_path, recursive=True)
    assert not os.listdir(tmp_path / "below")


@pytest.mark.parametrize("command", ["train", "predict", "data"])
def test_the_next_run_removes_the_drafts_of_a_killed_one(command, scenes_root, tmp_path):
    out = tmp_path / "out"
    if command == "train":
        args = ["--method", "source_only", "--data-root", scenes_root, "--steps", 1, "--out", out, *TINY]
        args += ["--resume", "auto"]
    elif command == "predict":
        image = np.full((32, 48, 3), 128, np.uint8)
        Image.fromarray(image).save(tmp_path / "a.png")
        args = [untrained_run(tmp_path / "run"), tmp_path / "a.png", "--out", out, "--save", "labels"]
    else:
        args = ["cache", f"scenes:{scenes_root / 'scenes'}", "--out", out, "--workers", 0, "--quiet"]
    last = {"train": "last.pt", "predict": "a.png", "data": "classes.yaml"}[command]
    child = os.fork()
    if child == 0:
        move = files._move

        def killed(draft, path, fsync):
            if path.name == last:
                os.kill(os.getpid(), signal.SIGKILL)
            move(draft, path, fsync)

        files._move = killed
        fastuda(command, *args)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert len(list(out.rglob(f".*.{child}.draft.*"))) == 1
    done = fastuda(command, *args)
    assert done.returncode == 0, done.stderr
    assert not list(out.rglob(".*.draft*")) and list(out.rglob(last))
