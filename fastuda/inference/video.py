"""Reads and writes video files through OpenCV (the extra ``video``)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastuda.errors import UserError, cannot_write
from fastuda.system.files import written

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")


def opencv(path: Path) -> Any:
    """Import cv2 for the video ``path``.

    Raises:
        UserError: it is not installed.
    """
    # errors are reported by this module, in one line
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            f"{path} is a video, and videos need OpenCV: pip install 'fastuda[video]'"
            " (or opencv-python-headless)"
        ) from error
    return cv2


class Video:
    """The frames of a video file.

    Raises:
        UserError: OpenCV is missing, or cannot read the file.
    """

    def __init__(self, path: Path):
        cv2 = opencv(path)
        self.path = path
        self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise UserError(
                f"{path} cannot be read as a video; it may be truncated, or OpenCV may lack its codec"
            )
        self.fps = float(self._capture.get(cv2.CAP_PROP_FPS)) or 25.0
        self.count = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        """Number of frames in the header, 0 if unknown. Fewer may be readable."""

    def __iter__(self) -> Iterator[np.ndarray]:
        """RGB frames ``uint8 [H, W, 3]``, upright."""
        while True:
            there, frame = self._capture.read()
            if not there:
                return
            yield frame[..., ::-1]

    def count_frames(self) -> int:
        """Count the remaining frames, and close the file."""
        count = 0
        while self._capture.grab():
            count += 1
        self.close()
        return count

    def close(self) -> None:
        """Close the file."""
        self._capture.release()


class VideoWriter:
    """Writes frames to a draft of an MP4 file; see :func:`new_video`."""

    def __init__(self, path: Path, draft: Path, fps: float):
        self.path, self.draft, self.fps = path, draft, fps
        self._writer: Any = None
        self.frames = 0

    def write(self, frame: np.ndarray) -> None:
        """Append an RGB frame ``uint8 [H, W, 3]``.

        Raises:
            UserError: the file cannot be written.
        """
        if self._writer is None:
            cv2 = opencv(self.path)
            code = cv2.VideoWriter_fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self.draft), code, self.fps, (frame.shape[1], frame.shape[0]))
            if not self._writer.isOpened():
                raise cannot_write(self.path, "OpenCV cannot open it for writing")
        self._writer.write(np.ascontiguousarray(frame[..., ::-1]))
        self.frames += 1

    def close(self) -> None:
        """Flush and close the draft."""
        if self._writer is not None:
            self._writer.release()
            self._writer = None

    def check(self) -> None:
        """Read the frames back: OpenCV does not report a failed write.

        Raises:
            OSError: the system refuses to write more to the file.
            UserError: frames are missing for another reason.
        """
        try:
            count = Video(self.draft).count_frames()
        except UserError:
            count = 0
        if count < self.frames:
            with open(self.draft, "ab") as file:
                file.write(bytes(1 << 20))
                file.flush()
                os.fsync(file.fileno())
            raise UserError(f"cannot write {self.path}: it holds {count} of {self.frames} frames")


@contextmanager
def new_video(path: Path, fps: float) -> Iterator[VideoWriter]:
    """Write an MP4 file, which replaces ``path`` if the block succeeds and every frame was written.

    Args:
        path: ends in .mp4.
        fps: frames per second.

    Raises:
        UserError: the file cannot be written, or frames are missing from it.
    """
    with written(path) as draft:
        writer = VideoWriter(path, draft, fps)
        try:
            yield writer
        finally:
            writer.close()
        writer.check()
