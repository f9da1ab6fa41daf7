"""Loads finished runs: ``config.yaml`` and ``model.safetensors`` are enough to predict."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fastuda.config.resolve import load_yaml
from fastuda.config.schema import RunConfig
from fastuda.data.labels import ClassSet
from fastuda.errors import UserError
from fastuda.inference.scores import PROTOCOLS, Scores
from fastuda.methods import Method, get_method
from fastuda.models import Segmentor, build_model
from fastuda.models.normalization import Normalization
from fastuda.system.files import written
from fastuda.system.settings import build, merge, parse_overrides
from fastuda.system.yaml import read_yaml


def save_model(path: Path, model: Segmentor, classes: ClassSet, config: RunConfig | None = None) -> None:
    """Save the segmentor's weights, with the classes, the input normalisation and the configuration (if
    given) in the metadata."""
    about = {"classes": classes.names, "palette": classes.palette, "input": dataclasses.asdict(model.input)}
    if config is not None:
        about["config"] = config.to_yaml()
    weights: dict[str, torch.Tensor] = {}
    held: set[int] = set()
    for key, value in model.state_dict().items():
        whole = value.contiguous()
        place = whole.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory, for example of a module with two names
        weights[key] = whole.clone() if place in held else whole
        held.add(place)
    # not save_file, because it ignores the umask and makes the file private
    content = save(weights, {"fastuda": json.dumps(about)})
    with written(path, fsync=True) as draft:
        draft.write_bytes(content)


def load_config(run: Path) -> RunConfig:
    """Load the configuration of a run folder.

    Raises:
        UserError: there is none, or this version does not support it.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml")
    config = build(RunConfig, load_yaml(str(path)), "")
    if not isinstance(config.method.get("name"), str):
        raise UserError(f"{path} names no method: method.name is missing")
    return config


def read_result(path: Path) -> dict[str, Any]:
    """Read ``result.json`` of a run. Scores become floats, NaN for an absent class.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is damaged.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        means = {key: _score(value) for key, value in result.items() if key.startswith("mIoU")}
        per_class = {key: value for key, value in result.items() if key.partition("_")[0] == "iou"}
        scores = {key: {name: _score(v) for name, v in values.items()} for key, values in per_class.items()}
        result |= {**means, "iou": scores["iou"], **scores}
        if result.setdefault("protocol", PROTOCOLS[0]) not in PROTOCOLS:
            raise ValueError(f"protocol is {result['protocol']!r}")
        result |= {"step": int(result["step"]), "processes": int(result.get("processes", 1))}
        result["split"] = str(result["split"])
        if not means:
            raise KeyError("mIoU")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a result of a run: {error!r}") from error
    return result


def scores_of(result: dict[str, Any]) -> Scores:
    """The scores in a result of :func:`read_result`.

    Raises:
        KeyError: a class has no score.
    """
    classes = tuple(result.get("classes") or result["iou"])
    scores = Scores(classes, tuple(result["iou"][name] for name in classes), protocol=result["protocol"])
    other = result.get(f"iou_{scores.other_protocol}")
    if other is None:
        return scores
    return dataclasses.replace(scores, other_iou=tuple(other[name] for name in classes))


def _score(value: Any) -> float:
    return math.nan if value is None else float(value)


def load_run(run: Path, device: torch.device) -> tuple[RunConfig, Method, ClassSet]:
    """Load configuration, method in evaluation mode, and classes of a run folder or of a file written by
    ``fastuda export --format safetensors``.

    Raises:
        UserError: a file is missing, unreadable or does not fit the configuration.
    """
    alone = run.is_file()
    path = run if alone else run / "model.safetensors"
    config = None if alone else load_config(run)
    if not path.is_file():
        raise UserError(
            f"{run} has no model.safetensors; the run has not finished: continue it with --resume auto"
        )
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["fastuda"])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        palette = tuple((int(r), int(g), int(b)) for r, g, b in about["palette"])
        classes = ClassSet(tuple(about["classes"]), palette)
        if config is None:
            config = build(RunConfig, read_yaml(about["config"], str(path)), "")
        model = build_model(dataclasses.replace(config.model, weights=None), len(classes), pretrained=False)
        model.load_state_dict(state)
        model.input = Normalization.of(about["input"])
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        first = " ".join(str(error).split())[:200]
        beside = "without its run folder" if alone else f"with {run / 'config.yaml'}"
        raise UserError(f"{path} cannot be used {beside}: {first}") from error
    method = get_method(config.method["name"])(config.method_config(), model, len(classes))
    method.adjust(config.eval.logit_adjustment, config.eval.class_shares)
    return config, method.to(device).eval(), classes


def override(config: RunConfig, method: Method, items: list[str]) -> RunConfig:
    """Apply ``key=value`` settings to the configuration and to the method.

    Raises:
        UserError: a setting is unknown, not allowed, or not of the form ``key=value``.
    """
    config = build(RunConfig, merge(config.plain(), parse_overrides(items)), "")
    method.configure(config.method_config())
    method.adjust(config.eval.logit_adjustment, config.eval.class_shares)
    return config
