"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path

import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plca_loss_in_your_trainer(capsys):
    losses = load("plca_loss_in_your_trainer").main(steps=3)
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert "cycles close in their class" in capsys.readouterr().out


def test_supervised_without_full_resolution_logits():
    first, last = load("supervised_without_full_resolution_logits").main()
    assert last < 0.8 * first


def test_aggregate_at_inference():
    labels = load("aggregate_at_inference").main()
    assert labels.shape == (1, 256, 512) and labels.dtype == torch.uint8 and labels.max() < 19


def test_every_example_has_a_test():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested
