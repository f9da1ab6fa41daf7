"""What the command lines share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from fastuda.errors import UserError


def parser(module: str, description: str, examples: str) -> argparse.ArgumentParser:
    """An argument parser whose help ends with examples."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


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
    sys.exit(code)
