"""The shells' completion offers what the parsers take."""

import shlex
import shutil
import subprocess

import pytest

from fastuda.__main__ import COMMANDS
from tests.program import fastuda


@pytest.fixture(scope="module")
def script():
    done = fastuda("completion", "bash")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def complete(script, *words):
    """What bash offers for the last of the words after ``fastuda``."""
    line = " ".join(shlex.quote(word) for word in ("fastuda", *words))
    call = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _fastuda"
    asked = f'{script}\n{call}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split("\n")[:-1]


def test_commands(script):
    assert complete(script, "") == list(COMMANDS)
    assert complete(script, "ev") == ["evaluate"]
    assert complete(script, "data", "") == ["list", "check", "index", "cache", "synth"]


def test_flags(script):
    assert complete(script, "train", "--se") == ["--seed", "--seeds"]
    assert complete(script, "predict", "runs/a", "--sc") == ["--scales"]
    assert complete(script, "data", "synth", "--he") == ["--help", "--height"]
    assert {"--format", "--out", "--json"} <= set(complete(script, "export", "-"))


def test_values(script):
    assert complete(script, "train", "--amp", "") == ["bf16", "fp16", "off"]
    assert complete(script, "train", "--method", "se") == ["self_training", "sepico"]
    assert "gta5_cityscapes_plca" in complete(script, "train", "--config", "gta5_")
    assert complete(script, "export", "run", "--format", "s") == ["safetensors"]
    assert complete(script, "completion", "") != []  # files, for want of anything better


def test_files(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert complete(script, "evaluate", "ru") == ["runs"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_itself_reads_it(shell, tmp_path):
    text = fastuda("completion", shell).stdout
    assert "fastuda" in text and all(command in text for command in COMMANDS)
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    (tmp_path / "script").write_text(text)
    done = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_another_shell_is_refused():
    done = fastuda("completion", "csh")
    assert done.returncode == 2 and "invalid choice" in done.stderr
