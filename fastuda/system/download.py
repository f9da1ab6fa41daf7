"""Downloads files atomically, and checks their SHA-256."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastuda.errors import UserError
from fastuda.system.files import written
from fastuda.system.log import progress

CHUNK = 1 << 18
"""Bytes per read."""
PATIENCE = 60.0
"""Seconds without an answer after which a download fails."""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download(url: str, path: Path, sha256: str, *, quiet: bool = False) -> None:
    """Download ``url`` to ``path``, with a progress bar. The file appears under its name only once it is
    complete and its checksum is right.

    Args:
        url: http or https; the proxies of the environment are used.
        path: the file to write.
        sha256: the SHA-256, or its first digits.
        quiet: no progress bar.

    Raises:
        UserError: the server cannot be reached, breaks off or sends another file, or ``path`` cannot be
            written.
    """
    digest = hashlib.sha256()
    with written(path, fsync=True) as draft, draft.open("wb") as file:
        for chunk in _chunks(url, path, quiet):
            digest.update(chunk)
            file.write(chunk)
        if not digest.hexdigest().startswith(sha256):
            raise UserError(
                f"{url} is not the published file: its SHA-256 begins with"
                f" {digest.hexdigest()[: len(sha256)]}, not with {sha256}; download it by hand and put it at"
                f" {path}"
            )


def _chunks(url: str, path: Path, quiet: bool) -> Iterator[bytes]:
    """The complete body of the response. ``path`` is its destination, for the bar and the message.

    Raises:
        UserError: it cannot be downloaded, or ends early.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "fastuda"})
    bar: Any = None
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            length = answer.headers.get("Content-Length")
            missing = total = int(length) if length else None
            bar = progress(total, 0, path.name, quiet, unit="B")
            while chunk := answer.read(CHUNK):
                yield chunk
                bar.update(len(chunk))
                missing = None if missing is None else missing - len(chunk)
            if missing:
                raise ConnectionError(f"the connection broke off {missing} bytes before the end")
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{url} cannot be downloaded: {reason}; download it by hand and put it at {path}"
        ) from error
    finally:
        if bar is not None:
            bar.close()
