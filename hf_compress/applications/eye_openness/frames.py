"""Frames of videos, webcams and picture files, as RGB arrays."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ...errors import DataError

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".mjpeg")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class Video:
    """A video that can be read, once or again.

    Attributes:
        source: a path, or the number of a camera.
        fps: frames per second, as the file says or as given.
        width, height: of a frame.
        declared: number of frames by the file's header; None for a camera or where it says none.
    """

    source: Path | int
    fps: float
    width: int
    height: int
    declared: int | None

    def frames(self) -> Iterator[np.ndarray]:
        """RGB frames, uint8 [height, width, 3], one after another.

        Raises:
            DataError: when no frame at all can be decoded.

        Warns:
            UserWarning: when the file ends before its header says.
        """
        capture, count = _open(self.source), 0
        try:
            while True:
                ok, frame = capture.read()
                if not ok:
                    break
                count += 1
                yield frame[:, :, ::-1]
        finally:
            capture.release()
        if not count:
            raise DataError(f"{_name(self.source)}: no frame could be decoded; the video is empty or damaged.")
        if self.declared is not None and count < 0.95 * self.declared:
            warnings.warn(
                f"{_name(self.source)}: {count} of {self.declared} frames could be decoded; the rest is missing or damaged.",
                UserWarning,
                stacklevel=2,
            )


def open_video(source: str | Path | int, fps: float | None = None) -> Video:
    """Look at a video file or a camera.

    Args:
        source: a path, or the number of a camera.
        fps: in place of what the file says; a camera that says nothing counts as 30.

    Raises:
        DataError: when OpenCV is missing, the file does not exist, cannot be opened, or has no frame or rate.
    """
    if not isinstance(source, int):
        source = Path(source).expanduser()
        if not source.is_file():
            raise DataError(f"there is no file {source}.")
        if not source.stat().st_size:
            raise DataError(f"{source} is empty.")
    capture = _open(source)
    cv2 = _cv2()
    try:
        ok, frame = capture.read()
        rate, declared = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    finally:
        capture.release()
    if not ok or frame is None:
        raise DataError(f"{_name(source)}: no frame could be decoded; the video is empty or damaged.")
    if fps is None:
        fps = float(rate) if math.isfinite(rate) and 0 < rate < 1000 else 30.0 if isinstance(source, int) else math.nan
    if not (math.isfinite(fps) and fps > 0):
        raise DataError(f"{_name(source)} does not say its frames per second; give them with fps.")
    height, width = frame.shape[:2]
    is_known = not isinstance(source, int) and math.isfinite(declared) and declared > 0
    return Video(source, fps, int(width), int(height), int(declared) if is_known else None)


def record_camera(number: int = 0, seconds: float = 30.0) -> tuple[list[np.ndarray], float]:
    """Frames of a camera for some seconds, and the rate at which they came.

    Raises:
        DataError: when there is no such camera, or it gives nothing.
    """
    video = open_video(number)
    frames, start = [], time.monotonic()
    for frame in video.frames():
        frames.append(frame)
        if time.monotonic() - start >= seconds:
            break
    return frames, len(frames) / (time.monotonic() - start)


def write_video(path: Path, frames: Iterator[np.ndarray], fps: float) -> Path:
    """Write RGB frames as an MP4 file, beside and renamed when complete.

    Raises:
        DataError: when OpenCV is missing or cannot write it.
    """
    cv2 = _cv2()
    partial, writer = path.with_name(f".partial-{path.name}"), None
    try:
        for frame in frames:
            if writer is None:
                size = (frame.shape[1], frame.shape[0])
                writer = cv2.VideoWriter(str(partial), cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
                if not writer.isOpened():
                    raise DataError(f"{path}: OpenCV cannot write MP4 files here.")
            writer.write(np.ascontiguousarray(frame[:, :, ::-1]))
    finally:
        if writer is not None:
            writer.release()
    if writer is None:
        raise DataError(f"{path}: there are no frames to write.")
    partial.replace(path)
    return path


def read_picture(path: str | Path) -> Image.Image:
    """A picture file in RGB.

    Raises:
        DataError: when it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture ({type(error).__name__}: {error}).") from error


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder, by name.

    Raises:
        DataError: when there is none.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    if not found:
        raise DataError(f"{folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)}).")
    return found


def is_video(path: str | Path) -> bool:
    """Whether a file is a video, by its ending."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def _cv2() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise DataError("videos need OpenCV, which is not installed. Run `pip install 'hf-compress[eyes]'`.") from error
    return cv2


def _open(source: Path | int) -> Any:
    cv2 = _cv2()
    capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    if not capture.isOpened():
        what = (
            "there is no such camera, or it is in use" if isinstance(source, int) else "not a video that OpenCV reads"
        )
        raise DataError(f"{_name(source)} cannot be opened: {what}.")
    return capture


def _name(source: Path | int) -> str:
    return f"camera {source}" if isinstance(source, int) else str(source)


__all__ = ["Video", "is_video", "open_video", "pictures_in", "read_picture", "record_camera", "write_video"]
