"""The shells' completion offers what the parsers take."""

import os
import pty
import select
import shlex
import shutil
import subprocess
import time

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
    assert sorted(complete(script, "train", "--amp", "")) == [
        "bf16",
        "force-bf16",
        "force-fp16",
        "fp16",
        "off",
    ]
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


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish_offers_the_same(tmp_path):
    (tmp_path / "fastuda.fish").write_text(fastuda("completion", "fish").stdout)

    def offered(line):
        asked = f"source {tmp_path / 'fastuda.fish'}; complete -C {shlex.quote(line)}"
        done = subprocess.run(["fish", "--private", "-c", asked], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return [row.partition("\t")[0] for row in done.stdout.splitlines()]

    assert sorted(offered("fastuda ")) == sorted(COMMANDS)
    assert offered("fastuda train --se") == ["--seed", "--seeds"]
    assert sorted(offered("fastuda train --amp ")) == ["bf16", "force-bf16", "force-fp16", "fp16", "off"]
    assert offered("fastuda data ") == ["cache", "check", "index", "list", "synth"]
    assert offered("fastuda data synth --he") == ["--height", "--help"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_offers_the_same(tmp_path):
    (tmp_path / "script").write_text(fastuda("completion", "zsh").stdout)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="dumb", COLUMNS="200", HOME=str(tmp_path))
        os.execvp("zsh", ["zsh", "-f", "-i"])

    def typed(keys, awaited):
        os.write(terminal, keys.encode())
        seen, end = b"", time.monotonic() + 30
        while awaited not in seen.decode(errors="replace") and time.monotonic() < end:
            if select.select([terminal], [], [], 0.2)[0]:
                seen += os.read(terminal, 65536)
        assert awaited in seen.decode(errors="replace"), seen

    try:
        # split, so that the echo of what is typed is not taken for its answer
        typed(f"source {tmp_path / 'script'}; echo load''ed\n", "loaded")
        typed("fastuda train --am\t", "train --amp")
        typed("\x15fastuda train --amp \t\t", "force-bf16")
        typed("\x15fastuda data s\t", "data synth")
        typed("\x15fastuda data synth --he\t\t", "--height  --help")
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def test_another_shell_is_refused():
    done = fastuda("completion", "csh")
    assert done.returncode == 2 and "invalid choice" in done.stderr
