"""The command lines of python -m fastuda.data."""

import json
import os
import resource
import subprocess
import sys
import threading

import pytest

from fastuda.system.files import written
from tests.program import environment, fastuda


def run(*args, **kwargs):
    return fastuda("data", *args, **kwargs)


def test_command_check(gta5, tmp_path):
    done = run("check", f"gta5:{gta5}", "--workers", 0, "--quiet", cwd=tmp_path)
    assert done.returncode == 0 and "nothing wrong" in done.stdout, done.stderr
    assert (tmp_path / "check_gta5_all.png").is_file()
    (gta5 / "images" / "00001.png").write_bytes(b"x")
    done = run("check", f"gta5:{gta5}", "--workers", 0, "--no-sheet", cwd=tmp_path)
    assert done.returncode == 1 and "00001.png cannot be read" in done.stdout
    done = run("check", f"gta5:{tmp_path}/nowhere", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: no folder") and not done.stdout


def test_command_index_writes_weak_labels(gta5, tmp_path):
    weak = tmp_path / "weak.json"
    env = {"FASTUDA_CACHE": str(tmp_path / "cache")}
    done = run("index", f"gta5:{gta5}", "--workers", 0, "--quiet", "--weak", weak, cwd=tmp_path, env=env)
    assert done.returncode == 0 and "bicycle" in done.stdout, done.stderr
    said = json.loads(weak.read_text())
    assert said["classes"][0] == "road" and set(said["images"]) == {f"images/{i:05d}.png" for i in range(5)}
    assert len(list((tmp_path / "cache").glob("gta5-*.jsonl"))) == 1


def test_command_synth_and_list(tmp_path):
    size = ("--source", 2, "--target", 2, "--evaluation", 1, "--height", 32, "--width", 64, "--quiet")
    done = run("synth", "--out", tmp_path / "s", *size, cwd=tmp_path)
    assert done.returncode == 0 and "source: 2 images" in done.stdout, done.stderr
    assert (tmp_path / "s" / "target.png").is_file()
    listed = run("list", cwd=tmp_path)
    assert "cityscapes" in listed.stdout and "folder" in listed.stdout


def test_what_the_commands_write_is_whole_or_one_line_says_why(gta5, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTUDA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("")
    for command, flag in (("check", "--sheet"), ("index", "--weak")):
        args = [command, f"gta5:{gta5}", "--workers", 0, "--quiet", flag]
        out = tmp_path / "file" / command
        done = fastuda("data", *args, out)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.splitlines() == [f"error: cannot write {out.parent}: File exists"]
        out = tmp_path / "limited" / command
        done = fastuda(
            "data", *args, out,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400)),
        )  # fmt: skip
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.splitlines() == [f"error: cannot write {out}: File too large"]
        assert list(out.parent.iterdir()) == []
    done = fastuda("data", *args, tmp_path / "weak.csv")
    assert done.returncode == 2 and "--weak writes JSON" in done.stderr


@pytest.mark.parametrize("command", ["list", "check", "index", "cache", "synth"])
def test_help_of_a_command_says_what_it_does_and_how(command):
    text = fastuda("data", command, "--help").stdout
    about, examples = text.partition("\n\n")[2], text.partition("\nexamples:\n")[2]
    assert about[0].isupper() and f"python -m fastuda.data {command}" in examples


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("check gta5 --workers -1", "--workers is -1; it must be at least 0"),
        ("cache gta5 --out copy --edge 0", "--edge is 0; it must be at least 1"),
        ("cache gta5 --out copy --quality 101", "--quality is 101; it must be from 1 to 100"),
        ("cache gta5 --out copy --workers -1", "--workers is -1; it must be at least 0"),
        ("index gta5 --min-share nan", "--min-share is nan; it must be from 0 to 1"),
        ("index gta5 --tag-share -1", "--tag-share is -1.0; it must be from 0 to 1"),
        ("index gta5 --weak weak.CSV", "--weak writes JSON: give weak.CSV another suffix than .csv"),
        ("synth --out s --source 0", "--source is 0; it must be at least 1"),
        ("synth --out s --height 0", "--height is 0; it must be at least 1"),
        ("synth --out s --seed -1", "--seed is -1; it must be at least 0"),
        (f"check gta5:{'a' * 300}", "File name too long"),
        ("index gta5 --weak /", "cannot write /: Is a directory"),
        ("cache gta5 --out=", "argument --out: the path is empty; see --help"),
        ("check", "the following arguments are required: DOMAIN; see --help"),
        ("check gta5 --no-sheet --role target", None),
    ],
)
def test_wrong_numbers_and_places_are_named_before_anything_is_written(
    gta5, words, message, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTUDA_CACHE", str(tmp_path / "cache"))
    words = [word.replace("gta5", f"gta5:{gta5}") if word == "gta5" else word for word in words.split()]
    done = fastuda("data", *words, "--quiet")
    assert done.returncode == (2 if message else 0), done.stderr
    assert [line.startswith("error: ") and message in line for line in done.stderr.splitlines()] == [True] * (
        message is not None
    )
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", gta5.name}


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    with written(tmp_path / "pipe") as place:
        place.write_text("x")
    reader.join(10)
    assert read == ["x"] and (tmp_path / "pipe").is_fifo()


def test_a_reader_that_has_gone_away_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    env = {key: value for key, value in environment().items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "fastuda.data", "list"]
    done = subprocess.run(command, env=env, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


def test_a_file_named_in_another_encoding(gta5, tmp_path):
    for kind in ("images", "labels"):
        os.rename(gta5 / kind / "00000.png", os.fsencode(gta5 / kind) + b"/\xfc.png")
    with open(os.fsencode(gta5 / "images") + b"/\xfc.png", "wb") as file:
        file.write(b"x")
    env = {"PYTHONIOENCODING": "utf-8:strict"}
    done = run("check", f"gta5:{gta5}", "--workers", 0, "--no-sheet", "--quiet", cwd=tmp_path, env=env)
    assert done.returncode == 1 and r"\udcfc.png cannot be read" in done.stdout, done.stderr
