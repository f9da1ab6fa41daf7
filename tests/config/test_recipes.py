"""Every published configuration builds its network and its method, without memory for either."""

import dataclasses
import functools

import pytest
import torch

from fastuda.config.resolve import load_yaml, resolve, shipped
from fastuda.methods import METHODS, get_method
from fastuda.models import build_model

network = functools.cache(build_model)
DATASETS = ("gta5_", "synthia_", "cityscapes_")


@pytest.mark.parametrize("name", [name for name in sorted(shipped()) if name.startswith(DATASETS)])
def test_builds(name, tmp_path):
    config = resolve(name, {}, {})
    if config.model.backbone.startswith("hf:"):  # of the same size, and without a network
        transformers = pytest.importorskip("transformers")
        transformers.Dinov2Config(patch_size=14, image_size=518).save_pretrained(tmp_path)
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, backbone=f"hf:{tmp_path}")
        )
    classes = 19 if config.data.classes is None else len(config.data.classes)
    with torch.device("meta"):
        model = network(dataclasses.replace(config.model, weights=None), classes)
        method = get_method(config.method["name"])(config.method_config(), model, classes)
    networks = method.networks()
    clipped = {net: config.optim.of(net).clip_norm for net in networks}
    assert clipped == {net: 1.0 if "weakseg" in name and net == "model" else None for net in networks}
    assert "model" in networks
    assert all(sum(p.numel() for p in net.parameters()) for net in networks.values())
    cubic = any(method in name for method in ("fada", "asanet", "weakseg"))
    assert config.data.resampling == ("bicubic" if cubic else "bilinear")
    if config.data.pairs:
        assert method.class_weight is not None and len(method.class_weight) == classes
    if name == "gta5_cityscapes_vfm":  # 86.6 and 1.81 million, as published
        parts = [sum(p.numel() for p in part.parameters()) for part in (model.backbone, model.head)]
        assert parts == [86_580_480, 1_811_520]
    if name.startswith("gta5_cityscapes_sepico"):  # 2048 - 2048 - 512 and 1024 - 256 - 512, as published
        widths = [p.shape[:2] for p in method.student.projection.parameters() if p.dim() == 4]
        published = [(256, 1024), (512, 256)] if "daformer" in name else [(2048, 2048), (512, 2048)]
        assert widths == published


@pytest.mark.parametrize("method", [*sorted(METHODS), "plca+self_training"])
@pytest.mark.parametrize("name", ["camvid_dusk_day", "idda_cityscapes", "scenes"])
def test_a_recipe_of_many_methods_builds_each(name, method):
    config = resolve(name, {"method.name": method}, {})
    with torch.device("meta"):
        model = network(dataclasses.replace(config.model, weights=None), 11)
        get_method(method)(config.method_config(), model, 11)
    sections = load_yaml(name)["methods"]
    plain = config.plain()["method"]
    for part in method.split("+"):
        own = plain[part] if "+" in method else plain
        assert {key: own[key] for key in sections.get(part, {})} == sections.get(part, {})
