"""Reads the configuration and the image normalisation of a Hugging Face folder or a name on its hub."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastuda.errors import UserError
from fastuda.models.normalization import Normalization
from fastuda.system.files import reading

PREFIX = "hf:"

T = TypeVar("T")
log = logging.getLogger("fastuda")


def describe(spec: str, whole: bool = False) -> dict[str, Any]:
    """Everything that is needed to build the network of ``hf:PATH`` without the folder, as plain types.

    The keys are ``spec`` (with an absolute path), ``config`` (that of transformers) and ``input``, the image
    normalisation of ``preprocessor_config.json`` (ImageNet's if there is none). For a whole model also
    ``classes``, the names of its classes in order.

    Args:
        spec: ``hf:`` followed by a local folder or a name on the hub. The files of a name are read from the
            local cache, and downloaded only if they are not there.
        whole: whether it is a whole model, not a backbone.

    Raises:
        UserError: transformers is missing, or there is no model of a known family.
    """
    transformers = transformers_for(spec)
    name = _place(spec)
    with hushed():
        try:
            config = local_first(
                lambda **how: transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **how),
                name,
            )
        except Exception as error:
            raise UserError(reason_of(spec, error)) from error
        normalization = _input_of(name)
    plain = config.to_dict()
    for key in ("id2label", "label2id", "transformers_version"):
        plain.pop(key, None)
    about = {"spec": PREFIX + name, "config": plain, "input": dataclasses.asdict(normalization)}
    if whole:
        about["classes"] = [str(label) for _, label in sorted(config.id2label.items())]
    return about


def _input_of(name: str) -> Normalization:
    """The normalisation of the image processor of a folder or hub name; ImageNet's if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    for file in ("processor_config.json", "preprocessor_config.json"):
        path = _file(name, file)
        if path is None:
            continue
        with reading(path, "settings of an image processor"):
            image = json.loads(path.read_text(encoding="utf-8"))
            if file == "processor_config.json":  # written for models of several modalities
                image = image.get("image_processor")
            if image is not None:
                return normalization_of(image)
    log.info("no preprocessor_config.json of %s%s: images are normalised as ImageNet's", PREFIX, name)
    return Normalization()


def _file(name: str, file: str) -> Path | None:
    """A file of a folder, or of a name on the hub; None if there is none."""
    from transformers.utils import cached_file

    if Path(name).is_dir():
        path = Path(name, file)
        return path if path.is_file() else None
    try:
        return Path(local_first(lambda **how: str(cached_file(name, file, **how)), name))
    except OSError:  # neither in the cache nor on the hub
        return None


def normalization_of(image: dict[str, Any]) -> Normalization:
    """The normalisation that a ``preprocessor_config.json`` describes.

    Raises:
        ValueError, TypeError, AttributeError: a value is of another type, or not one or three numbers.
    """
    default = Normalization()
    normalized = image.get("do_normalize", True)
    mean, std = (
        _of_channels(f"image_{key}", image.get(f"image_{key}") or getattr(default, key))
        for key in ("mean", "std")
    )
    return Normalization(
        mean if normalized else (0.0, 0.0, 0.0),
        std if normalized else (1.0, 1.0, 1.0),
        "bgr" if image.get("do_flip_channel_order") else "rgb",
        1.0 if image.get("do_rescale", True) else 255.0,
    )


def _of_channels(key: str, value: Any) -> tuple[float, float, float]:
    """One number for all channels, or one for each."""
    numbers = [float(value)] * 3 if isinstance(value, (int, float)) else [float(v) for v in value]
    if len(numbers) != 3:
        raise ValueError(f"{key} has {len(numbers)} numbers, not 3")
    return numbers[0], numbers[1], numbers[2]


def transformers_for(spec: str) -> Any:
    """The module transformers.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
        import transformers.models.auto.modeling_auto
    except ImportError as error:
        raise UserError(
            f"{spec} needs the transformers package ({error}): pip install 'fastuda[transformers]'"
        ) from error
    return transformers


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


def local_first(load: Callable[..., T], name: str) -> T:
    """The result of ``load`` from local files; asks the hub for a name only if the cache lacks it."""
    try:
        return load(local_files_only=True)
    except OSError:
        if Path(name).is_dir():
            raise
        return load()


def reason_of(spec: str, error: Exception) -> str:
    """A one-line message: what went wrong with ``spec``, and what to do."""
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


@contextmanager
def hushed() -> Iterator[None]:
    """Suppress the warnings and progress bars of transformers; fastuda logs in one line what was loaded."""
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
