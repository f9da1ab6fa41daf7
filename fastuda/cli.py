"""Shared parts of the command lines: parsers, flags and error handling."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import logging
import math
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastuda.errors import UserError
from fastuda.system.paths import at_home
from fastuda.system.settings import Bounds

if TYPE_CHECKING:
    import torch

    from fastuda.inference.windows import Inference


LESS_MEMORY = "slide a --window over each image, lower --scales or the size of the images, or take --amp"
"""Advice for images that are too large for the memory."""

AMP_CHOICES = ("off", "bf16", "fp16", "force-bf16", "force-fp16")
"""Values of --amp. Emulated half precision becomes float32 unless it is forced."""

FLAGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "method": ("method.name", "name of a method, several joined by +, or package.module:Class", {}),
    "source": ("data.source", "labelled domain: name or name:path[:split]; separate several by commas", {}),
    "target": ("data.target", "unlabelled domain: name or name:path[:split]; scenes is built in", {}),
    "data_root": ("data.data_root", "folder of the domains that have no path (default: data)", {}),
    "model": ("model.head", "segmentation head: deeplabv2, daformer, upernet, linear, light or auto; or a"
              " whole network: hf:PATH (Hugging Face) or package.module:function", {}),
    "backbone": ("model.backbone", "resnet18/34/50/101, mobilenet_v2, efficientnet_lite0, vgg16, mit_b0 to"
                 " mit_b5, small, hf:PATH or package.module:function", {}),
    "weights": ("model.weights", "imagenet (downloaded once), or a .pth or .safetensors file", {}),
    "crop": ("data.crop", "size of the training crop", {"nargs": 2, "type": int, "metavar": ("H", "W")}),
    "batch_size": ("data.batch_size", "images per domain, process and backward pass", {"type": int}),
    "steps": ("train.steps", "number of optimiser steps; with --stages, of each stage", {"type": int}),
    "lr": ("optim.lr", "learning rate", {"type": float}),
    "amp": ("train.amp", "mixed precision, unless float32 is faster here (--amp alone: bf16)",
            {"nargs": "?", "const": "bf16", "choices": AMP_CHOICES}),
    "device": ("train.device", "auto, cpu, cuda, cuda:N", {}),
    "seed": ("train.seed", "seed of weights, samples and augmentation", {"type": int}),
    "loader": ("data.loader", "auto, torch or dali", {}),
    "workers": ("data.workers", "number of loader processes", {"type": int}),
}  # fmt: skip
"""Flag to its setting, help text and arguments for argparse."""


class _Parser(argparse.ArgumentParser):
    """Reports an invalid argument as a one-line error."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument ") and ": is " in message:  # from number()
            raise UserError(message.removeprefix("argument ").replace(": is ", " is ", 1))
        raise UserError(f"{message}; see --help")


def parser(module: str, description: str, examples: str) -> argparse.ArgumentParser:
    """An argument parser whose help ends with examples."""
    return _Parser(
        prog=f"python -m {module}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def a_path(text: str) -> Path:
    """The type of a flag that takes a path. Rejects an empty string, for example an unset shell variable."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(at_home(text))


def number(kind: type[int] | type[float], least: float, most: float = math.inf) -> Callable[[str], float]:
    """The type of a flag that takes a number from ``least`` to ``most``."""
    bounds = Bounds(least, most)

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"is {text!r}; it must be {what}") from None
        if not bounds.holds(value):
            raise argparse.ArgumentTypeError(f"is {value}; it must be {bounds}")
        return value

    return read


def bare_amp(words: list[str]) -> list[str]:
    """The command line with ``--amp=bf16`` instead of every ``--amp`` that is not followed by a precision.
    Otherwise argparse would read the next word as its value."""
    out = []
    for word, after in zip(words, [*words[1:], ""], strict=False):
        out.append("--amp=bf16" if word == "--amp" and after not in AMP_CHOICES else word)
    return out


def setting_flag(p: argparse.ArgumentParser, name: str, help: str | None = None, **arguments: Any) -> None:
    """Add a flag of :data:`FLAGS`. ``help`` and ``arguments`` replace its own."""
    _, text, usual = FLAGS[name]
    p.add_argument(f"--{name.replace('_', '-')}", help=help or text, **(usual | arguments))


def flag_settings(args: argparse.Namespace, without: Collection[str] = ()) -> dict[str, Any]:
    """The settings of the given flags of :data:`FLAGS`."""
    values = {name: getattr(args, name) for name in FLAGS if name not in without}
    settings = {FLAGS[name][0]: value for name, value in values.items() if value is not None}
    if ":" in settings.get("model.head", ""):
        settings["model.network"] = settings.pop("model.head")
    elif {"model.head", "model.backbone"} & settings.keys():
        settings["model.network"] = None  # replaces a whole network of the configuration
    return settings


def inference_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags for windows, scales, mirroring and precision; :func:`inference` reads them."""
    p.add_argument("--window", nargs=2, type=int, metavar=("H", "W"), help="slide a window of this size")
    p.add_argument(
        "--overlap",
        type=float,
        default=1 / 3,
        help="overlap of neighbouring windows as a share of the window (default: 1/3)",
    )
    p.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], metavar="S",
        help="average the probabilities over these scales, e.g. 0.75 1 1.25",
    )  # fmt: skip
    p.add_argument("--flip", action="store_true", help="also average over the mirrored image")
    p.add_argument(
        "--amp", nargs="?", const="bf16", choices=AMP_CHOICES, default="off",
        help="mixed precision, unless float32 is faster here (default: off; --amp alone: bf16)",
    )  # fmt: skip


def inference(args: argparse.Namespace, device: torch.device) -> Inference:
    """The :class:`~fastuda.inference.windows.Inference` that the flags describe."""
    from fastuda.inference.windows import Inference
    from fastuda.system.precision import DTYPES, choose

    amp = DTYPES[choose(args.amp, device)]
    return Inference(args.window and tuple(args.window), args.overlap, tuple(args.scales), args.flip, amp)


def run(main: Callable[[], int]) -> None:
    """Run a command line. A :class:`UserError` or an error of the system becomes one line and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # names of files and classes may contain letters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
        if sys.stdout is not None:
            sys.stdout.flush()  # report a full disk here, not while the interpreter exits
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        _drop_output()  # the reader closed the pipe
        code = 1
    except OSError as error:
        if error.filename is None:
            _drop_output()
        print(f"error: {error.filename or 'the output'}: {error.strerror or error}", file=sys.stderr)
        code = 2
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        leave(code)
    sys.exit(code)


def _drop_output() -> None:
    """Discard output that could not be written, so that the interpreter does not retry at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave(code: int) -> NoReturn:
    """End one of several processes: run exit handlers, flush streams, and skip the interpreter's
    finalisation.

    DDP's reducer keeps Gloo's threads alive after ``destroy_process_group``. If such a thread waits for the
    GIL to free a tensor while Python finalises, it is unwound through C++ and aborts the process.
    """
    logging.shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
