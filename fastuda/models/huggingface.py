"""Networks of Hugging Face's transformers: backbones and whole segmentation models, by folder or name."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fastuda.errors import UserError
from fastuda.models.foreign import ForeignBackbone, Geometry, listed, size_of, survey
from fastuda.models.normalization import Normalization

PREFIX = "hf:"
WEIGHTS = ("*.safetensors", "*.bin")
SLOW_TO_TRACE = ("swin", "swinv2", "maskformer-swin")
"""Families whose padded, shifted windows keep torch.export busy for longer than anyone waits."""
RANDOM_POSITIONS = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
"""Settings of DINOv3 that move positions at random in training mode: a teacher would label at random."""

T = TypeVar("T")
log = logging.getLogger("fastuda")


def describe(spec: str) -> dict[str, Any]:
    """What is needed to build the network of ``hf:PATH`` without the folder, as plain types.

    ``spec`` with an absolute path, ``config`` (of transformers) and ``input``, the normalisation of images of
    ``preprocessor_config.json`` (ImageNet's if there is none).

    Args:
        spec: ``hf:`` and a local folder, or a name on the hub; its files are taken from the local cache, and
            fetched only if they are not there.

    Raises:
        UserError: transformers is missing, or there is no model of a known family.
    """
    transformers = _transformers(spec)
    name = _place(spec)
    with _hushed():
        try:
            config = _local_first(
                lambda **how: transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **how),
                name,
            )
        except Exception as error:
            raise UserError(_why(spec, error)) from error
        try:
            read = transformers.ImageProcessingMixin.get_image_processor_dict
            image = _local_first(lambda **how: read(name, **how)[0], name)
        except Exception:  # many models have none
            image = {}
    plain = config.to_dict()
    for key in ("id2label", "label2id", "transformers_version"):
        plain.pop(key, None)
    return {"spec": PREFIX + name, "config": plain, "input": dataclasses.asdict(normalization_of(image))}


def normalization_of(image: dict[str, Any]) -> Normalization:
    """The normalisation that a ``preprocessor_config.json`` asks for."""
    default = Normalization()
    normalized = image.get("do_normalize", True)
    mean, std = (
        tuple(map(float, image.get(f"image_{key}") or getattr(default, key))) for key in ("mean", "std")
    )
    return Normalization(
        mean if normalized else (0.0, 0.0, 0.0),  # type: ignore[arg-type]
        std if normalized else (1.0, 1.0, 1.0),  # type: ignore[arg-type]
        "bgr" if image.get("do_flip_channel_order") else "rgb",
        1.0 if image.get("do_rescale", True) else 255.0,
    )


def hf_backbone(described: dict[str, Any], pretrained: bool, quarters: bool, enlarge: float) -> nn.Module:
    """A backbone of transformers' ``AutoBackbone``.

    A network of several resolutions gives the last map of each; one of a single resolution its last map, or
    those after each quarter of its blocks.

    Args:
        described: see :func:`describe`.
        pretrained: load the weights of the folder.
        quarters: take four maps of a network of a single resolution.
        enlarge: see :class:`~fastuda.models.foreign.ForeignBackbone`.

    Raises:
        UserError: the family is no backbone, needs a package, or gives no feature map.
    """
    spec = described["spec"]
    transformers = _transformers(spec)
    config = _config(transformers, described)
    family = transformers.models.auto.modeling_auto.MODEL_FOR_BACKBONE_MAPPING
    if type(config) not in family:
        whole = type(config) in transformers.models.auto.modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING
        hint = f"; it is a whole segmentation model: --model {spec}" if whole else ""
        raise UserError(f"{spec} is a {config.model_type}, which transformers has no backbone of{hint}")
    if not hasattr(config, "stage_names"):
        raise UserError(f"{spec} wraps another library's network: give that by package.module:function")
    for key in ("apply_layernorm", "reshape_hidden_states"):
        if hasattr(config, key):
            setattr(config, key, True)
    for key in RANDOM_POSITIONS:
        if hasattr(config, key):
            setattr(config, key, None)
    stages = [name for name in config.stage_names if name != "stem"]
    config.out_features = stages
    cls = family[type(config)]
    geometry = _survey(cls, config, spec)
    chosen = [i for i, s in enumerate(geometry.strides) if s not in geometry.strides[i + 1 :]]
    if len(chosen) == 1 and quarters:
        chosen = sorted({-(-len(stages) * part // 4) - 1 for part in (1, 2, 3, 4)})
    config.out_features = [stages[i] for i in chosen]
    built = _build(cls, config, spec, pretrained)
    return ForeignBackbone(built, listed, geometry.of(chosen), enlarge)


def no_export(network: nn.Module) -> str:
    """Why torch.export is not asked to follow a network of transformers; empty where it is."""
    config = getattr(network, "config", None)
    kinds = [getattr(c, "model_type", "") for c in (config, getattr(config, "backbone_config", None))]
    slow = next((kind for kind in kinds if kind in SLOW_TO_TRACE), None)
    return (
        f"torch.export does not finish on the shifted windows of {slow} for images of any size"
        if slow
        else ""
    )


def _survey(cls: Any, config: Any, spec: str) -> Geometry:
    """The geometry of a network's maps, measured without weights, and with random ones where that fails.

    Raises:
        UserError: the network needs a package, or gives no feature map.
    """
    size = size_of(config)
    try:
        with torch.device("meta"), _hushed():
            return survey(cls(config), listed, spec, size)
    except Exception as error:
        if isinstance(error, ImportError):
            raise UserError(_why(spec, error)) from error
    with _hushed():
        return survey(cls(config), listed, spec, size)


def hf_model(described: dict[str, Any], num_classes: int, pretrained: bool) -> Any:
    """A whole ``AutoModelForSemanticSegmentation`` for ``num_classes`` classes. The classifier of a model
    with another number starts from scratch.

    Raises:
        UserError: the family has no such model, or needs a package.
    """
    spec = described["spec"]
    transformers = _transformers(spec)
    config = _config(transformers, described)
    auto = transformers.models.auto.modeling_auto
    family = auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING
    if type(config) not in family:
        backbone = type(config) in auto.MODEL_FOR_BACKBONE_MAPPING
        hint = f"; it is a backbone: --backbone {spec}" if backbone else ""
        raise UserError(f"{spec} is a {config.model_type}, which has no model of semantic segmentation{hint}")
    config.num_labels = num_classes
    if hasattr(config, "use_auxiliary_head"):
        config.use_auxiliary_head = False
    return _build(family[type(config)], config, spec, pretrained)


def _build(cls: Any, config: Any, spec: str, pretrained: bool) -> nn.Module:
    """The network with the folder's weights, or with random ones.

    Raises:
        UserError: a file cannot be read, or holds none of the network's weights.
    """
    name = spec.removeprefix(PREFIX)
    folder = Path(name)
    missing = folder.is_dir() and not any(path for kind in WEIGHTS for path in folder.glob(kind))
    if pretrained and missing:
        log.warning("%s has no weights (model.safetensors): it starts from scratch", spec)
    try:
        with _hushed():
            if not pretrained or missing:
                return cls(config)
            load = dict(
                config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
            network, info = _local_first(lambda **how: cls.from_pretrained(name, **load, **how), name)
    except Exception as error:
        raise UserError(_why(spec, error)) from error
    fresh = sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])})
    total = len(network.state_dict())
    if len(fresh) >= total:
        raise UserError(f"the weights of {spec} are of another network: none of its {total} keys is there")
    unused = sorted(info["unexpected_keys"])
    log.info(
        "weights %s: %d of %d keys loaded, from scratch: %s, unused: %s",
        spec, total - len(fresh), total, _few(fresh), _few(unused),
    )  # fmt: skip
    return network


def _transformers(spec: str) -> Any:
    try:
        import transformers
        import transformers.models.auto.modeling_auto
    except ImportError as error:
        raise UserError(
            f"{spec} needs the transformers package ({error}): pip install 'fastuda[transformers]'"
        ) from error
    return transformers


def _config(transformers: Any, described: dict[str, Any]) -> Any:
    values = {key: value for key, value in described["config"].items() if key != "num_labels"}
    try:
        return transformers.AutoConfig.for_model(**values)
    except Exception as error:
        raise UserError(_why(described["spec"], error)) from error


def _place(spec: str) -> str:
    """The folder, absolute, or the name on the hub.

    Raises:
        UserError: the folder does not exist or holds no model.
    """
    name = spec.removeprefix(PREFIX)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is no Hugging Face model: it has no config.json")
        return str(folder.resolve())
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise UserError(f"there is no folder {name} with a Hugging Face model")
    return name


def _local_first(load: Callable[..., T], name: str) -> T:
    """What ``load`` gives of local files; a name is asked of the hub only if the cache lacks it."""
    try:
        return load(local_files_only=True)
    except OSError:
        if Path(name).is_dir():
            raise
        return load()


def _why(spec: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if isinstance(error, ImportError):
        package = re.search(r"requires the (\S+) library", reason)
        need = package[1] if package else reason[:200]
        return f"{spec} needs the package {need}, which is not installed: pip install {need}"
    if "trust_remote_code" in reason:
        return f"{spec} comes with code of its own, which is never run; write it as package.module:function"
    if isinstance(error, OSError) and not Path(spec.removeprefix(PREFIX)).is_dir():
        return (
            f"{spec} is neither a folder nor in the cache of Hugging Face, and cannot be fetched: download it"
            f" to a folder and give hf:FOLDER ({reason[:120]})"
        )
    return f"{spec} cannot be used: {reason[:200]}"


def _few(keys: Sequence[str], count: int = 4) -> str:
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more if keys else "none"


@contextmanager
def _hushed() -> Iterator[None]:
    """Without transformers' own warnings and bars: what was loaded is logged in one line."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
