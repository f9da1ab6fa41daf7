"""The logit adjustment: its formula, the shares it takes, and that every command line predicts with it."""

import json

import numpy as np
import pytest
import torch
import yaml

from fastuda.errors import UserError
from fastuda.inference.saved import load_run
from fastuda.inference.windows import Inference
from tests.program import TINY, fastuda, state, untrained_run

CPU = torch.device("cpu")
IMAGES = torch.linspace(-2, 2, 3 * 32 * 48).reshape(1, 3, 32, 48)


@pytest.mark.parametrize("method", ["source_only", "plca", "plca+self_training"])
def test_scores_are_those_of_a_source_with_equal_classes(method, tmp_path):
    loaded = load_run(untrained_run(tmp_path / "run", method), CPU)[1]
    shares = [0.0, *(k / 171 for k in range(1, 19))]
    with torch.no_grad():
        plain = loaded.predict(IMAGES)
        loaded.adjust(0.5, shares)
        adjusted = Inference()(loaded, IMAGES)
    factor = torch.tensor([1.0, *(share**-0.5 for share in shares[1:])])[:, None, None]
    p = plain.scores if plain.are_probabilities else plain.scores.softmax(1)
    wanted = p * factor / (p * factor).sum(1, keepdim=True)
    assert adjusted.are_probabilities == plain.are_probabilities == (method != "source_only")
    found = adjusted.scores if adjusted.are_probabilities else adjusted.scores.softmax(1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    loaded.adjust(0, None)
    assert torch.equal(Inference()(loaded, IMAGES).scores, plain.scores)


def test_shares_that_are_missing_or_do_not_fit_are_refused(tmp_path):
    loaded = load_run(untrained_run(tmp_path / "run"), CPU)[1]
    with pytest.raises(UserError, match=r"give eval\.class_shares"):
        loaded.adjust(1, None)
    with pytest.raises(UserError, match=r"eval\.class_shares has 2 entries for 19 classes"):
        loaded.adjust(1, [0.5, 0.5])


@pytest.fixture(scope="module")
def run(tmp_path_factory, scenes_root):
    out = tmp_path_factory.mktemp("runs") / "adjusted"
    done = fastuda(
        "train", "--method", "self_training", "--data-root", scenes_root, "--out", out, "--steps", 2, *TINY,
        "eval.logit_adjustment=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_counts_the_shares_of_its_source_and_keeps_them(run, scenes_root):
    from fastuda.data.domains.run import open_run
    from fastuda.data.tools.index import build_index

    config, _, classes = load_run(run, CPU)
    counts = build_index(open_run(config.data).sources[0], workers=0).counts.sum(0)
    assert len(classes) == 19 and (counts > 0).sum() > 10
    np.testing.assert_allclose(config.eval.class_shares, counts / counts.sum(), rtol=1e-12)
    resumed = fastuda(
        "train", "--config", run / "config.yaml", "--out", run, "--resume", "auto", "--steps", 3
    )
    assert resumed.returncode == 0, resumed.stderr
    assert state(run)["step"] == 3
    kept = yaml.safe_load((run / "config.yaml").read_text())["eval"]["class_shares"]
    assert tuple(kept) == config.eval.class_shares


def test_evaluation_predicts_with_it_unless_told_otherwise(run):
    own = fastuda("evaluate", run, "--json")
    off = fastuda("evaluate", run, "--json", "eval.logit_adjustment=0")
    assert own.returncode == off.returncode == 0, own.stderr + off.stderr
    trained = json.loads((run / "result.json").read_text())["iou"]
    assert json.loads(own.stdout)["iou"] == pytest.approx(trained, abs=0.01, nan_ok=True)
    assert json.loads(off.stdout)["iou"] != json.loads(own.stdout)["iou"]


def test_the_exported_network_contains_it(run, tmp_path):
    from fastuda.inference.exporting import Deployed

    image = (IMAGES + 2) * 63
    file = tmp_path / "adjusted.pt2"
    done = fastuda("export", run, "--out", file)
    assert done.returncode == 0, done.stderr
    method = load_run(run, CPU)[1]
    with torch.no_grad():
        wanted = Deployed(method)(image)[1]
        torch.testing.assert_close(torch.export.load(file).module()(image)[1], wanted, rtol=1e-4, atol=1e-5)
        method.adjust(0, None)
        assert not torch.allclose(Deployed(method)(image)[1], wanted, atol=1e-3)
