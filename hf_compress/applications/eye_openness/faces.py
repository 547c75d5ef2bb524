"""Where the eyes are: given, or found by a face detector of another package.

A locator is any callable from a frame (RGB, uint8 [height, width, 3]) to a list of :class:`Face`. No detector is part of this
package, none is fetched: ``yuface`` brings libfacedetection with its weights inside; OpenCV's YuNet and MediaPipe's face
landmarks take the path of a model file that you have.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError

Point = tuple[float, float]
NOWHERE: Point = (math.nan, math.nan)
_TURNED = 0.25  # eyes nearer to each other than this share of the face's box belong to a face turned away
_LARGEST_SIDE = 960  # libfacedetection loses accuracy above


@dataclass(frozen=True)
class Face:
    """The eyes of a face, in pixels. ``left`` is the person's left eye, further to the right in the picture.

    Attributes:
        left, right: x and y of the eyes' centres; NaN for an eye that is hidden.
        box: left, top, width, height, where it is known.
        distance: between the centres; measured from them when not given. Needed where one eye is hidden.
        score: of the detector, 0 to 1.
    """

    left: Point = NOWHERE
    right: Point = NOWHERE
    box: tuple[float, float, float, float] | None = None
    distance: float | None = None
    score: float = 1.0

    @property
    def eye_distance(self) -> float:
        """In pixels; NaN when it cannot be known."""
        if self.distance is not None:
            return self.distance
        return math.hypot(self.left[0] - self.right[0], self.left[1] - self.right[1])

    @property
    def angle(self) -> float:
        """Of the line from the right to the left eye, radians, clockwise as seen; 0 where one is hidden."""
        angle = math.atan2(self.left[1] - self.right[1], self.left[0] - self.right[0])
        return angle if math.isfinite(angle) else 0.0

    @property
    def is_turned_away(self) -> bool:
        """Whether the eyes are so near to each other that neither can be judged."""
        return self.box is not None and self.eye_distance < _TURNED * self.box[2]


Locator = Callable[[np.ndarray], list[Face]]


class GivenEyes:
    """Eyes that are known: the same in every frame, or frame by frame. It counts the frames, so one object serves one video.

    Args:
        faces: a face (or several) for all frames, or frame number -> faces. A frame that is not there has no face.
    """

    def __init__(self, faces: Face | Sequence[Face] | Mapping[int, Sequence[Face]]):
        self.faces = [faces] if isinstance(faces, Face) else faces
        self._frame = 0

    def __call__(self, frame: np.ndarray) -> list[Face]:
        number, self._frame = self._frame, self._frame + 1
        if isinstance(self.faces, Mapping):
            return list(self.faces.get(number, ()))
        return list(self.faces)

    @classmethod
    def from_file(cls, path: str | Path) -> GivenEyes:
        """Read a CSV with the columns ``frame, left_x, left_y, right_x, right_y`` (empty: hidden), or the same as JSON rows.

        Raises:
            DataError: when the file cannot be read or lacks a column.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            rows = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
            found: dict[int, list[Face]] = {}
            for row in rows:
                values = [_number(row[name]) for name in ("left_x", "left_y", "right_x", "right_y")]
                distance = _number(row.get("distance"))
                face = Face(
                    (values[0], values[1]),
                    (values[2], values[3]),
                    distance=distance if math.isfinite(distance) else None,
                )
                found.setdefault(int(row["frame"]), []).append(face)
        except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: the eyes cannot be read ({type(error).__name__}: {error}). Expected rows with frame, left_x, left_y, "
                "right_x, right_y, and distance where an eye is hidden; as CSV with a header, or JSON."
            ) from error
        if not found:
            raise DataError(f"{path} names no eyes.")
        return cls(found)


def _number(value: Any) -> float:
    return math.nan if value in (None, "") else float(value)


class YuFace:
    """libfacedetection (Yu Shiqi and others, BSD) through the package ``yuface``, whose wheels hold the weights.

    Args:
        least_score: faces with a lower one are dropped, 0 to 1.

    Raises:
        DataError: when the package is missing.
    """

    def __init__(self, least_score: float = 0.6):
        self.least_score = least_score
        self._detect = _module("yuface", "pip install 'hf-compress[eyes]'").detect

    def __call__(self, frame: np.ndarray) -> list[Face]:
        from PIL import Image

        scale = min(1.0, _LARGEST_SIDE / max(frame.shape[:2]))
        if scale < 1:
            size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
            frame = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX))
        if min(frame.shape[:2]) < 16:  # smaller than any face that it finds
            return []
        scores, boxes, points = self._detect(np.ascontiguousarray(frame[:, :, ::-1]), self.least_score)
        return [
            _from_five(box / scale, marks / scale, float(score) / 100)
            for score, box, marks in zip(scores, boxes, points, strict=True)
        ]


class OpenCVYuNet:
    """OpenCV's ``FaceDetectorYN``.

    Args:
        model: path of ``face_detection_yunet_*.onnx`` (opencv_zoo, MIT), which OpenCV's packages do not hold.
        least_score: faces with a lower one are dropped, 0 to 1.

    Raises:
        DataError: when the file or OpenCV is missing.
    """

    def __init__(self, model: str | Path, least_score: float = 0.7):
        path = _file(model, "face_detection_yunet_*.onnx from opencv_zoo")
        cv2 = _module("cv2", "pip install 'hf-compress[eyes]'")
        try:
            self._detector = cv2.FaceDetectorYN.create(str(path), "", (320, 320), least_score)
        except Exception as error:  # cv2.error, or an AttributeError of a build without it
            raise DataError(f"{path} cannot be used as a YuNet model: {str(error).strip().splitlines()[0]}") from error

    def __call__(self, frame: np.ndarray) -> list[Face]:
        self._detector.setInputSize((frame.shape[1], frame.shape[0]))
        _, rows = self._detector.detect(np.ascontiguousarray(frame[:, :, ::-1]))
        return [_from_five(row[:4], row[4:14], float(row[14])) for row in (() if rows is None else rows)]


class MediaPipeFaces:
    """MediaPipe's face landmarks; an eye's centre is the middle of its corners.

    Args:
        model: path of ``face_landmarker.task`` (Apache-2.0), which the package does not hold.
        most_faces: so many at most.

    Raises:
        DataError: when the file or MediaPipe is missing.
    """

    _CORNERS = ((362, 263), (33, 133))  # of the left and of the right eye

    def __init__(self, model: str | Path, most_faces: int = 4):
        path = _file(model, "face_landmarker.task from MediaPipe's model page")
        self._package = _module("mediapipe", "pip install mediapipe")
        vision = import_module("mediapipe.tasks.python.vision")
        base = import_module("mediapipe.tasks.python").BaseOptions(model_asset_path=str(path))
        try:
            options = vision.FaceLandmarkerOptions(base_options=base, num_faces=most_faces)
            self._detector = vision.FaceLandmarker.create_from_options(options)
        except Exception as error:  # RuntimeError or ValueError, by version
            raise DataError(
                f"{path} cannot be used as a face landmarker: {str(error).strip().splitlines()[0]}"
            ) from error

    def __call__(self, frame: np.ndarray) -> list[Face]:
        image = self._package.Image(image_format=self._package.ImageFormat.SRGB, data=np.ascontiguousarray(frame))
        height, width = frame.shape[:2]
        faces = []
        for marks in self._detector.detect(image).face_landmarks:
            points = np.array([[mark.x * width, mark.y * height] for mark in marks])
            left, right = (points[list(pair)].mean(axis=0) for pair in self._CORNERS)
            low, high = points.min(axis=0), points.max(axis=0)
            faces.append(Face(_point(left), _point(right), (*_point(low), *_point(high - low))))
        return faces


def locator(kind: str = "auto", model: str | Path | None = None) -> Locator:
    """A face detector by name.

    Args:
        kind: ``yuface``, ``yunet``, ``mediapipe``, or ``auto``: by the ending of ``model`` (.onnx, .task), else yuface.
        model: file for yunet and mediapipe.

    Raises:
        DataError: for another name, and what the detectors raise.
    """
    if kind == "auto":
        kind = {".onnx": "yunet", ".task": "mediapipe"}.get(Path(model).suffix if model else "", "yuface")
    if kind == "yuface":
        return YuFace()
    if kind in ("yunet", "mediapipe"):
        if model is None:
            raise DataError(f"the detector {kind} needs its model file, which no package brings; give its path.")
        return OpenCVYuNet(model) if kind == "yunet" else MediaPipeFaces(model)
    raise DataError(f"there is no face detector {kind!r}. Possible: auto, yuface, yunet, mediapipe.")


def main_face(faces: Sequence[Face], before: Face | None = None) -> Face | None:
    """The face to follow: the one nearest to where it was, within two eye distances of it, else the one with the widest eyes."""
    if not faces:
        return None
    if before is not None:
        nearest = min(faces, key=lambda face: _apart(face, before))
        if _apart(nearest, before) <= 2 * before.eye_distance:
            return nearest
    return max(faces, key=lambda face: -1.0 if math.isnan(face.eye_distance) else face.eye_distance)


def _apart(a: Face, b: Face) -> float:
    pairs = [(p, q) for p, q in ((a.left, b.left), (a.right, b.right)) if math.isfinite(p[0] + q[0])]
    return min((math.hypot(p[0] - q[0], p[1] - q[1]) for p, q in pairs), default=math.inf)


def _from_five(box: np.ndarray, points: np.ndarray, score: float) -> Face:
    """From the five points of this family of detectors, of which the first two are the eyes, right one first."""
    left, top, width, height = (float(value) for value in box)
    return Face(_point(points[2:4]), _point(points[:2]), (left, top, width, height), score=score)


def _point(values: Any) -> Point:
    return float(values[0]), float(values[1])


def _module(name: str, install: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise DataError(f"this needs the package {name}, which is not installed. Run `{install}`.") from error


def _file(path: str | Path, what: str) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"there is no file {path}. It has to be {what}.")
    return path


__all__ = [
    "Face",
    "GivenEyes",
    "Locator",
    "MediaPipeFaces",
    "OpenCVYuNet",
    "YuFace",
    "locator",
    "main_face",
]
