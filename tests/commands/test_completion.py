"""The shells' completion offers what the parsers take."""

import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
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
    call = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_fastuda"
    asked = f'{script}\n{call}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def test_commands(script):
    assert set(COMMANDS) <= set(complete(script, ""))
    assert complete(script, "ev") == ["evaluate"]
    assert {"list", "check", "index", "cache", "synth"} <= set(complete(script, "data", ""))


def test_flags(script):
    assert complete(script, "train", "--se") == ["--seed", "--seeds"]
    assert complete(script, "predict", "runs/a", "--sc") == ["--scales"]
    assert sorted(complete(script, "data", "synth", "--he")) == ["--height", "--help"]


def test_values(script):
    assert complete(script, "train", "--method", "se") == ["self_training", "sepico"]
    assert "gta5_cityscapes_plca" in complete(script, "train", "--config", "gta5_")
    assert complete(script, "export", "run", "--format", "s") == ["safetensors"]
    assert "force-bf16" in complete(script, "train", "--amp", "force")


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
        typed(f"autoload -U compinit && compinit; source {tmp_path / 'script'}; echo load''ed\n", "loaded")
        typed("fastuda train --am\t", "train --amp")
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def test_without_shtab_the_package_is_named():
    code = "import sys; sys.modules['shtab'] = None; sys.argv = ['fastuda', 'completion', 'bash']\n"
    code += "from fastuda.__main__ import console; console()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and 'pip install "fastuda[completion]"' in done.stderr


def test_another_shell_is_refused():
    done = fastuda("completion", "csh")
    assert done.returncode == 2 and "invalid choice" in done.stderr
