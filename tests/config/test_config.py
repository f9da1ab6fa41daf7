"""Layers of settings, types, and messages."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
import torch

from fastuda.config.resolve import load_yaml, resolve
from fastuda.config.schema import RunConfig
from fastuda.engine.optim import build_optimizer, lr_factor
from fastuda.errors import UserError
from fastuda.system.settings import (
    Ascending,
    Bounds,
    Share,
    Size,
    build,
    check,
    convert,
    merge,
    nest,
    parse_overrides,
)
from fastuda.system.yaml import read_yaml, to_yaml


def test_defaults_give_way_to_file_to_flags_to_overrides(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {steps: 5, seed: 5}\noptim: {lr: 5}\n")
    (tmp_path / "run.yaml").write_text("extends: base.yaml\ntrain: {seed: 6}\noptim: {lr: 6}\n")
    config = resolve(str(tmp_path / "run.yaml"), {"optim.lr": 7.0, "train.accumulate": 7}, {})
    assert (config.train.steps, config.train.seed, config.optim.lr, config.train.accumulate) == (5, 6, 7.0, 7)
    config = resolve(str(tmp_path / "run.yaml"), {"optim.lr": 7.0}, parse_overrides(["optim.lr=8"]))
    assert config.optim.lr == 8.0 and config.optim.momentum == 0.9


def test_a_resolved_configuration_resolves_to_itself(tmp_path):
    config = resolve(None, {"method.name": "plca", "data.crop": [64, 96]}, {"method": {"lsr_gamma": 3}})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert resolve(str(tmp_path / "c.yaml"), {}, {}).plain() == config.plain()
    assert "&" not in config.to_yaml()


def test_another_method_does_not_inherit_the_files_method_settings(tmp_path):
    (tmp_path / "c.yaml").write_text("method: {name: plca, lsr_weight: 0.5}\n")
    config = resolve(str(tmp_path / "c.yaml"), {"method.name": "source_only"}, {})
    assert config.method == {"name": "source_only"}
    assert resolve(str(tmp_path / "c.yaml"), {}, {}).method_config().lsr_weight == 0.5


def test_scenes_bring_their_own_settings():
    assert resolve(None, {}, {}).model.backbone == "small"
    assert resolve(None, {"data.source": "gta5:x"}, {}).model.backbone == RunConfig().model.backbone


@dataclass(frozen=True)
class Section:
    number: float = 1.0
    count: int = 1
    pair: tuple[int, int] = (1, 2)
    many: tuple[str, ...] = ()
    maybe: int | None = None
    switch: bool = False
    word: str = "a"
    free: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("number", 2, 2.0), ("number", "1e-3", 1e-3), ("pair", [3, 4], (3, 4)), ("many", ["x"], ("x",)),
        ("maybe", None, None), ("maybe", 3, 3), ("switch", True, True), ("word", True, "on"),
        ("free", {"a": 1}, {"a": 1}),
    ],
)  # fmt: skip
def test_values_are_converted_without_surprise(key, value, wanted):
    found = getattr(build(Section, {key: value}, "s"), key)
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("number", "fast"), ("number", True), ("count", 1.0), ("count", "1"), ("count", True), ("pair", [1]),
        ("pair", 3), ("switch", 1), ("switch", "yes please"), ("word", 3), ("free", [1]), ("maybe", "x"),
    ],
)  # fmt: skip
def test_wrong_types_are_named(key, value):
    with pytest.raises(UserError, match=rf"s\.{key}.* must be .*, got "):
        build(Section, {key: value}, "s")


def test_a_list_is_asked_for_as_it_is_written():
    for key, shape in (("pair", r"\[int, int\]"), ("many", r"\[str, \.\.\.\]")):
        with pytest.raises(UserError, match=rf"s\.{key} must be a list {shape}, got 64"):
            build(Section, {key: 64}, "s")


@pytest.mark.parametrize(
    "items", [["data=3"], ["method=plca"], ["stages=3"], ["optim=1", "optim.lr=2"], ["train=[1]"]]
)
def test_a_section_is_no_value(items):
    with pytest.raises(UserError, match=r"must be a section|which is set as well"):
        resolve(None, {}, parse_overrides(items))


def test_unknown_keys_name_their_neighbours():
    with pytest.raises(UserError, match=r"unknown setting 's\.nunber'; did you mean number"):
        build(Section, {"nunber": 1}, "s")
    with pytest.raises(UserError, match="optim must be a section"):
        build(RunConfig, {"optim": 3}, "")


def test_small_pieces():
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}
    assert nest({"a.b": 1, "a.c": 2, "d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}
    assert parse_overrides(["a.b=[1, x]", "c="]) == {"a": {"b": [1, "x"]}, "c": None}
    assert convert([1, 2], tuple[int, ...], "x") == (1, 2)
    same = [1]
    assert read_yaml(to_yaml({"a": same, "b": same}), "x") == {"a": [1], "b": [1]}
    with pytest.raises(UserError, match="there is no configuration named 'sceens'; did you mean scenes"):
        load_yaml("sceens")


def test_networks_have_their_own_optimisers():
    config = resolve(
        None, {}, parse_overrides(["optim.networks={judge: {name: adam, lr: 1.0e-4, betas: [0.9, 0.99]}}"])
    )
    judge, model = config.optim.of("judge"), config.optim.of("model")
    assert (judge.name, judge.lr, judge.betas) == ("adam", 1e-4, (0.9, 0.99)) and model.name == "sgd"
    optimizer = build_optimizer(judge, torch.nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["fused"]
    with pytest.raises(UserError, match=r"unknown setting 'optim\.networks\.judge\.speed'"):
        resolve(None, {}, {"optim": {"networks": {"judge": {"speed": 1}}}})


def test_schedules():
    poly = resolve(
        None, {}, parse_overrides(["optim.schedule=poly", "optim.warmup=0", "optim.power=2"])
    ).optim
    assert [lr_factor(poly, step, 4) for step in range(5)] == [1, 0.75**2, 0.25, 0.0625, 0]
    warm = resolve(None, {}, parse_overrides(["optim.schedule=constant", "optim.warmup=4"])).optim
    assert [lr_factor(warm, step, 9) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    horizon = resolve(None, {}, parse_overrides(["optim.warmup=0", "optim.horizon=8", "optim.power=1"])).optim
    assert lr_factor(horizon, 4, 4) == 0.5


def test_apex_is_used_where_it_is_installed(monkeypatch):
    """With a stand-in for apex: the real one needs CUDA to build."""
    import sys
    import types

    made = []

    class FusedSGD(torch.optim.SGD):
        def __init__(self, groups, **kwargs):
            made.append(kwargs)
            super().__init__(groups, **kwargs)

    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedSGD, optimizers.FusedAdam = FusedSGD, torch.optim.Adam
    apex = types.ModuleType("apex")
    apex.optimizers = optimizers
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    config = resolve(None, {"optim.impl": "apex"}, {}).optim
    optimizer = build_optimizer(config.of("model"), torch.nn.Linear(2, 2))
    assert isinstance(optimizer, FusedSGD) and "fused" not in made[0] and made[0]["momentum"] == 0.9


def test_a_date_that_there_is_not_is_no_yaml():
    with pytest.raises(UserError, match=r"the value of optim\.lr is not valid YAML: month"):
        parse_overrides(["optim.lr=2020-13-45"])
    with pytest.raises(UserError, match=r"optim\.lr must be"):
        resolve(None, {}, parse_overrides(["optim.lr=2020-12-01"]))


@dataclass(frozen=True)
class Allowed:
    """Every kind of type that says which values are allowed."""

    word: Literal["a", "b", "off"] = "a"
    branches: Literal[2, 4] = 4
    share: Share = 0.5
    above: Annotated[float, Bounds(0, 1, open_below=True)] | None = None
    size: Size = (1, 1)
    edges: Annotated[tuple[int, int], Bounds(1), Ascending()] = (1, 2)
    more: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"word": "c"}, "x.word is 'c': choose a, b or off"),
        ({"branches": 3}, "x.branches is 3: choose 2 or 4"),
        ({"branches": "4"}, "x.branches is '4': choose 2 or 4"),
        ({"share": 1.5}, "x.share is 1.5; it must be from 0 to 1"),
        ({"share": math.nan}, "x.share is nan; it must be a finite number"),
        ({"share": 10**400}, "x.share must be float"),
        ({"above": 0}, "x.above is 0.0; it must be above 0 and at most 1"),
        ({"size": [0, 3]}, "x.size is [0, 3]; each number must be at least 1"),
        ({"edges": [3, 2]}, "x.edges is [3, 2]; the smaller number comes first"),
        ({"more": {"a": {"lr": math.inf}}}, "x.more.a.lr is inf; it must be a finite number"),
    ],
)
def test_what_a_type_does_not_allow_is_refused(values, message):
    with pytest.raises(UserError) as error:
        build(Allowed, values, "x")
    assert message in str(error.value)


def test_a_dataclass_made_in_code_is_checked_too():
    with pytest.raises(UserError, match=r"x\.word is 'c': choose a, b or off"):
        check(Allowed(word="c"), "x")
    with pytest.raises(UserError, match="each number must be at least 1"):
        check(Allowed(size=(0, 3)), "x")


def test_what_a_type_allows_is_taken():
    built = build(Allowed, {"word": False, "above": "1e-1", "edges": [2, 2], "branches": 2}, "x")
    assert (built.word, built.above, built.edges, built.branches) == ("off", 0.1, (2, 2), 2)
    check(built, "x")
