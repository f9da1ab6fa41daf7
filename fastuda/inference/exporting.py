"""Exports a finished run as one file for other programs: ONNX, torch.export's .pt2, or safetensors."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fastuda.config.schema import RunConfig
from fastuda.data.labels import ClassSet
from fastuda.errors import UserError
from fastuda.inference.saved import save_model
from fastuda.inference.windows import probabilities
from fastuda.methods import Method
from fastuda.models.hrda import HRSegmentor
from fastuda.models.huggingface import no_export
from fastuda.ops._backends import default_backend
from fastuda.system.files import written
from fastuda.system.settings import Size

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
"""Format to file suffix."""
TOLERANCE = 1e-3
"""Largest allowed difference of a probability between the file and the run."""


class Deployed(nn.Module):
    """``image [B, 3, H, W] -> (labels int64 [B, H, W], probabilities float32 [B, K, H, W])``.

    The image is float32 RGB in 0..255. The module contains the normalisation, the method's test-time
    steps, the upsampling and the softmax.
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(self, method: Method):
        super().__init__()
        self.method = method
        expected = method.model.input
        self.reverse = expected.channel_order == "bgr"
        self.scale = expected.scale / 255.0
        # not named mean and std, because an ONNX operation of the network has such a name
        self.register_buffer("input_mean", torch.tensor(expected.mean)[:, None, None])
        self.register_buffer("input_std", torch.tensor(expected.std)[:, None, None])

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = image * self.scale
        x = ((x.flip(1) if self.reverse else x) - self.input_mean) / self.input_std
        align = self.method.model.align_corners
        p = probabilities(self.method.segment(x), (image.shape[2], image.shape[3]), align)
        return p.argmax(1), p


def about(config: RunConfig, classes: ClassSet, size: Size | None = None) -> str:
    """JSON for readers of the file: classes, palette, and the image size: the only one that it takes, or the
    evaluation size, if any."""
    size = size or config.data.eval_size
    return json.dumps({"classes": classes.names, "palette": classes.palette, "size": size})


def trace(method: Method, size: Size | None = None) -> torch.export.ExportedProgram:
    """Trace the method's prediction with dynamic batch, and dynamic height and width unless ``size`` is
    given.

    Raises:
        UserError: the method computes something that torch.export cannot follow.
    """
    if size is None and isinstance(method.model, HRSegmentor):
        raise UserError(
            "a network with model.hrda cannot be exported for images of any size, on which the number of its"
            " windows depends: give --size H W, or take --format safetensors"
        )
    reason = no_export(getattr(method.model.backbone, "network", method.model.backbone))
    if reason:
        raise UserError(f"{reason}: take --format safetensors")
    free = torch.export.Dim.DYNAMIC
    axes = {0: free} if size else {0: free, 2: free, 3: free}
    try:
        with default_backend("reference"), _hushed(), torch.no_grad():
            return torch.export.export(
                Deployed(method).eval(), (pictures(2, *(size or (64, 96))),), dynamic_shapes=(axes,)
            )
    except Exception as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"{type(method).__name__} cannot be exported, torch.export says: {first}") from error


def export_torch(path: Path, method: Method, described: str, size: Size | None = None) -> float:
    """Write a .pt2 file of torch.export, for images of any size or of a single one. Returns the largest
    difference of a probability from the method's.

    ``torch.export.load(path).module()`` loads it; its extra file ``fastuda.json`` is :func:`about`.

    Raises:
        UserError: see :func:`trace`; or the file's results differ; or it cannot be written.
    """
    program = trace(method, size)
    graph = program.module()
    worst = check(method, lambda image: graph(image), size)
    extra = {"fastuda.json": described}

    whole = io.BytesIO()  # torch's writer ends the process if the disk is full
    with _hushed():
        torch.export.save(program, whole, extra_files=extra)
    with written(path, fsync=True) as draft:
        draft.write_bytes(whole.getbuffer())
    return worst


def export_onnx(path: Path, method: Method, described: str, size: Size | None = None) -> float:
    """Write an ONNX file with dynamic batch, and dynamic height and width unless ``size`` is given. Returns
    the largest difference of a probability between onnxruntime and torch.

    The metadata entry ``fastuda`` is :func:`about`.

    Raises:
        UserError: onnx, onnxscript or onnxruntime is missing; see :func:`trace`; or the file's results
            differ; or it cannot be written.
    """
    onnx, runtime = (_needed(name) for name in ("onnx", "onnxruntime"))
    _needed("onnxscript")
    program = trace(method, size)
    try:
        with _hushed(), torch.no_grad():
            # not optimised: onnxscript 0.7 treats the 1e-10 inside logarithms as zero and drops it;
            # onnxruntime optimises the file when it loads it
            made = torch.onnx.export(
                program, (), dynamo=True, verbose=False, optimize=False,
                input_names=["image"], output_names=["labels", "probabilities"],
            )  # fmt: skip
        assert made is not None
        model = made.model_proto
    except Exception as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"{type(method).__name__} cannot be written as ONNX: {first}") from error
    _name_dimensions(model)
    onnx.helper.set_model_props(model, {"fastuda": described})
    data = model.SerializeToString()
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> tuple[Tensor, Tensor]:
        labels, p = session.run(None, {"image": image.numpy()})
        return torch.from_numpy(labels), torch.from_numpy(p)

    worst = check(method, run, size)
    with written(path, fsync=True) as draft:
        draft.write_bytes(data)
    return worst


def export_safetensors(path: Path, config: RunConfig, method: Method, classes: ClassSet) -> None:
    """Write the segmentor's weights with classes, normalisation and configuration. ``load_run`` reads the
    file."""
    save_model(path, method.model, classes, config)


def check(method: Method, run: Any, size: Size | None = None) -> float:
    """The largest difference of a probability between ``run`` and the method, on images of three sizes, or in
    two batches of one size.

    Raises:
        UserError: the difference is larger than :data:`TOLERANCE`.
    """
    worst = 0.0
    shapes = [(1, *size), (3, *size)] if size else [(1, 64, 96), (1, 97, 131), (2, 128, 72)]
    for shape in shapes:
        image = pictures(*shape)
        with torch.no_grad(), default_backend("reference"):
            truth = Deployed(method).eval()(image)[1]
            labels, p = run(image)
        if not torch.equal(p.argmax(1), labels):
            raise UserError("the exported model's labels are not those of the largest probabilities")
        worst = max(worst, (p - truth).abs().max().item())
    if not worst <= TOLERANCE:
        raise UserError(
            f"the exported model differs from the run: a probability by {worst:.3g}; nothing written"
        )
    return worst


def pictures(count: int, height: int, width: int) -> Tensor:
    """Smooth random images in 0..255, deterministic for each size."""
    coarse = np.random.default_rng(count * height * width).uniform(0, 255, (count, 3, 5, 7))
    x = torch.from_numpy(coarse.astype(np.float32))
    return nnf.interpolate(x, (height, width), mode="bilinear")


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"exporting to ONNX needs {package} ({error}): pip install 'fastuda[export]',"
            " or export with --format torch"
        ) from error


def _name_dimensions(model: Any) -> None:
    """Name the dynamic dimensions: batch, and height and width if they are dynamic."""
    shape = model.graph.input[0].type.tensor_type.shape
    traced = [dim.dim_param for dim in shape.dim]
    names = {old: new for old, new in zip(traced, ("batch", "", "height", "width"), strict=True) if old}
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = pattern.sub(lambda match: names[match[1]], dim.dim_param)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Suppress the exporter's notes on packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
