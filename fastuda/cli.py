"""What the command lines share."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from fastuda.errors import UserError

if TYPE_CHECKING:
    from fastuda.inference import Inference


def parser(module: str, description: str, examples: str) -> argparse.ArgumentParser:
    """An argument parser whose help ends with examples."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def inference_flags(p: argparse.ArgumentParser) -> None:
    """Flags of how an image goes through the network; :func:`inference` reads them."""
    p.add_argument("--window", nargs=2, type=int, metavar=("H", "W"), help="slide a window of this size")
    p.add_argument("--overlap", type=float, default=1 / 3, help="share of it that the next one covers (1/3)")
    p.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], metavar="S",
        help="mean of the probabilities over these scales, e.g. 0.75 1 1.25",
    )  # fmt: skip
    p.add_argument("--flip", action="store_true", help="and over the mirrored image")
    p.add_argument("--amp", action="store_true", help="bf16 autocast")


def inference(args: argparse.Namespace) -> Inference:
    """The :class:`~fastuda.inference.Inference` that the flags ask for."""
    import torch

    from fastuda.inference import Inference

    amp = torch.bfloat16 if args.amp else None
    return Inference(args.window and tuple(args.window), args.overlap, tuple(args.scales), args.flip, amp)


def run(main: Callable[[], int]) -> None:
    """Run a command line: a :class:`UserError` becomes one clear message and exit code 2."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # the reader of our output went away; keep the interpreter from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        leave(code)
    sys.exit(code)


def leave(code: int) -> NoReturn:
    """End a process of many: exit handlers and flushed streams, then no finalisation of the interpreter.

    DDP's reducer keeps Gloo's threads past ``destroy_process_group``; one that still wants the GIL to drop
    a tensor while Python finalises is unwound through C++ and aborts the process.
    """
    logging.shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
