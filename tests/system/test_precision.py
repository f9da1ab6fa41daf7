"""Mixed precision is taken where it is faster than float32, and a resumed run keeps what it began with."""

import logging
import typing

import pytest
import torch
import yaml

from fastuda.cli import AMP_CHOICES, bare_amp
from fastuda.config.resolve import resolve
from fastuda.config.schema import TrainConfig
from fastuda.engine.setup import with_precision
from fastuda.errors import UserError
from fastuda.system import precision
from fastuda.system.distributed import World
from fastuda.system.precision import Support, choose, measure
from tests.program import TINY, fastuda, state

CPU = torch.device("cpu")
WORLD = World(0, 1, CPU)


@pytest.fixture
def emulated(monkeypatch):
    """A machine that emulates half precision."""
    precision._warn_once.cache_clear()
    monkeypatch.setattr(
        precision, "support", lambda name, *_: Support(False, f"{name} is emulated on this CPU")
    )


@pytest.fixture
def native(monkeypatch):
    monkeypatch.setattr(precision, "support", lambda name, *_: Support(True, "native"))


def test_half_precision_that_is_emulated_becomes_float32_and_is_said_once(emulated, caplog):
    with caplog.at_level(logging.WARNING, "fastuda"):
        assert choose("bf16", CPU) == choose("bf16", CPU) == "off"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "bf16 is emulated on this CPU: running in float32 (--amp=force-bf16 to insist)"
    assert choose("force-bf16", CPU) == "bf16" and choose("force-fp16", CPU) == "fp16"
    assert choose("off", CPU) == "off"


def test_half_precision_that_pays_is_taken(native):
    assert [choose(amp, CPU) for amp in ("off", "bf16", "fp16")] == ["off", "bf16", "fp16"]


def test_other_words_are_refused():
    for word in ("bf-16", "force-off", "force-", ""):
        with pytest.raises(UserError, match="choose off, bf16, fp16, force-bf16 or force-fp16"):
            resolve(None, {"train.amp": word}, {})
    assert set(AMP_CHOICES) == set(typing.get_args(typing.get_type_hints(TrainConfig)["amp"]))


def test_a_bare_amp_takes_no_other_word_for_its_precision():
    assert bare_amp([]) == []
    assert bare_amp(["run", "--amp", "a.png"]) == ["run", "--amp=bf16", "a.png"]
    assert bare_amp(["--amp", "fp16", "--amp"]) == ["--amp", "fp16", "--amp=bf16"]


def begun(asked, used):
    return {"asked_amp": asked, "config": {"train": {"amp": used}}}


def config(amp):
    return resolve(None, {"train.amp": amp}, {})


def test_a_resumed_run_keeps_its_precision_on_a_machine_that_judges_otherwise(emulated):
    assert with_precision(config("bf16"), WORLD, begun("bf16", "bf16")).train.amp == "bf16"
    assert with_precision(config("bf16"), WORLD).train.amp == "off"
    assert with_precision(config("force-bf16"), WORLD).train.amp == "force-bf16"


def test_another_precision_may_be_asked_of_a_resumed_run(native):
    assert with_precision(config("bf16"), WORLD, begun("bf16", "off")).train.amp == "off"
    assert with_precision(config("off"), WORLD, begun("bf16", "off")).train.amp == "off"
    assert with_precision(config("off"), WORLD, begun("bf16", "bf16")).train.amp == "off"
    assert with_precision(config("bf16"), WORLD, begun("off", "off")).train.amp == "bf16"


def test_the_measurement_compares_both_precisions():
    assert measure(torch.bfloat16, seconds=0.0) > 0


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"), reason="no oneDNN")
def test_a_run_in_float32_says_so_and_resumes_in_float32(scenes_root, tmp_path):
    """oneDNN held to AVX2, which has no bf16; then the same command without that limit."""
    out = tmp_path / "run"
    args = ["train", "--method", "source_only", "--amp", "--data-root", scenes_root, "--out", out, *TINY]
    done = fastuda(*args, "--steps", 2, "--quiet", env={"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("running in float32 (train.amp=force-bf16 to insist)") == 1
    assert yaml.safe_load((out / "config.yaml").read_text())["train"]["amp"] in ("off", False)
    done = fastuda(*args, "--steps", 4, "--resume", "auto", "--quiet", env={})
    assert done.returncode == 0 and "float32" not in done.stderr, done.stderr
    after = state(out)
    assert after["step"] == 4 and after["config"]["train"]["amp"] == "off" and after["asked_amp"] == "bf16"
    shown = fastuda("evaluate", out, "--amp=force-bf16", "--quiet")
    assert shown.returncode == 0 and shown.stderr == "", shown.stderr
