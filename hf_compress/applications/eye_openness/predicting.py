"""Openness of the eyes of faces: from frames and eye centres, through crops, to numbers; by PyTorch or by an ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import DataError, ModelError
from ...models.eye_openness.image_processing_eye_openness import EyeOpennessImageProcessor, crop_eye
from .faces import Face, Locator, main_face

Predictor = Callable[[Tensor], Tensor]
"""Crops, float [n, 3, height, width] in 0..1 -> openness [n]."""

_BATCH = 64  # crops that are judged at once
_LEAST_CONTRAST = 1.0  # standard deviation of a colour in grey levels, below which a crop shows nothing


class EyeReader:
    """A model with its preprocessing: faces in frames to the openness of their eyes.

    Args:
        predict: see :data:`Predictor`.
        processor: makes the crops.
    """

    def __init__(self, predict: Predictor, processor: EyeOpennessImageProcessor | None = None):
        self.predict = predict
        self.processor = processor if processor is not None else EyeOpennessImageProcessor()

    @classmethod
    def from_pretrained(cls, place: str | Path) -> EyeReader:
        """A folder or Hub id of an :class:`EyeOpennessForRegression`, or a ``.onnx`` file that was exported from one.

        Raises:
            ModelError: when it is not there, or is another kind of model.
        """
        path = Path(place).expanduser()
        if path.suffix == ".onnx":
            return cls(_onnx_predictor(path))
        from transformers import AutoImageProcessor, AutoModel

        from ...models.eye_openness import EyeOpennessForRegression

        if str(place).startswith((".", "/", "~")) and not path.is_dir():
            raise ModelError(
                f"there is no folder {place}. Give one that hf-compress or save_pretrained wrote, or a .onnx file."
            )
        try:
            model = AutoModel.from_pretrained(path if path.is_dir() else str(place)).eval()
        except Exception as error:  # a missing folder, the network, a damaged file: no common class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{place} cannot be loaded: {reason}") from error
        if not isinstance(model, EyeOpennessForRegression):
            raise ModelError(f"{place} is a {type(model).__name__}; an EyeOpennessForRegression is needed.")
        if model.config.num_eyes != 1:
            raise ModelError(
                f"{place} judges {model.config.num_eyes} eyes in one crop; crops of one eye are made here."
            )
        try:
            processor = AutoImageProcessor.from_pretrained(path if path.is_dir() else str(place))
        except Exception:  # a checkpoint without one; its errors have no common class
            processor = None
        if not isinstance(processor, EyeOpennessImageProcessor):
            size: Any = model.config.image_size
            height, width = size
            processor = EyeOpennessImageProcessor(size={"height": height, "width": width})
        return cls(model_predictor(model), processor)

    def crops(self, image: Image.Image, face: Face) -> list[Image.Image | None]:
        """The crops of the left and the right eye; None for one that cannot be judged: hidden, outside of the picture, fewer
        than 8 pixels wide, without any contrast, or of a face turned away."""
        found: list[Image.Image | None] = []
        for center, mirror in ((face.left, False), (face.right, True)):
            crop: Image.Image | None = None
            if not face.is_turned_away:
                try:
                    size: Any = self.processor.size
                    crop = crop_eye(
                        image,
                        center,
                        face.eye_distance,
                        face.angle,
                        mirror=mirror,
                        size=(int(size["height"]), int(size["width"])),
                    )
                except DataError:
                    crop = None
            if crop is not None and np.asarray(crop, dtype=np.float32).std(axis=(0, 1)).max() < _LEAST_CONTRAST:
                crop = None
            found.append(crop)
        return found

    def read(self, crops: Sequence[Image.Image | None]) -> np.ndarray:
        """Openness of crops, [n]; NaN for None."""
        found = np.full(len(crops), np.nan)
        places = [place for place, crop in enumerate(crops) if crop is not None]
        for start in range(0, len(places), _BATCH):
            part = places[start : start + _BATCH]
            pixels = np.stack([np.asarray(crops[place]) for place in part]).transpose(0, 3, 1, 2)
            found[part] = self.predict(torch.from_numpy(pixels).float() / 255).detach().cpu().numpy()
        return found

    def picture(self, image: Image.Image, faces: Sequence[Face]) -> np.ndarray:
        """Openness of the eyes of faces in a picture, [faces, 2], left and right; NaN for an eye that cannot be judged."""
        crops = [crop for face in faces for crop in self.crops(image, face)]
        return self.read(crops).reshape(len(faces), 2)

    def frames(self, frames: Iterable[np.ndarray], locate: Locator) -> Iterator[tuple[Face | None, np.ndarray]]:
        """The followed face of every frame and its openness [2]; NaN in a frame without a face.

        Args:
            frames: RGB, uint8 [height, width, 3].
            locate: finds faces in a frame.
        """
        waiting: list[tuple[Face | None, list[Image.Image | None]]] = []
        last: Face | None = None
        for frame in frames:
            face = main_face(locate(frame), last)
            last = face or last
            waiting.append((face, [None, None] if face is None else self.crops(Image.fromarray(frame), face)))
            if len(waiting) >= _BATCH // 2:
                yield from self._read(waiting)
                waiting = []
        yield from self._read(waiting)

    def _read(
        self, waiting: Sequence[tuple[Face | None, list[Image.Image | None]]]
    ) -> Iterator[tuple[Face | None, np.ndarray]]:
        found = self.read([crop for _, crops in waiting for crop in crops]).reshape(len(waiting), 2)
        yield from ((face, values) for (face, _), values in zip(waiting, found, strict=True))


def model_predictor(model: Any) -> Predictor:
    """A PyTorch model as a :data:`Predictor`."""

    def predict(pixels: Tensor) -> Tensor:
        parameter = next(model.parameters())
        with torch.inference_mode():
            return model(pixel_values=pixels.to(parameter.device, parameter.dtype)).openness[:, 0].float()  # type: ignore[no-any-return]

    return predict


def _onnx_predictor(path: Path) -> Predictor:
    from ...export.onnx import onnx_outputs

    if not path.is_file():
        raise ModelError(f"there is no file {path}.")
    run = onnx_outputs(path)

    def predict(pixels: Tensor) -> Tensor:
        found = run(pixels)
        if "openness" not in found or found["openness"].shape[-1] != 1:
            raise ModelError(f"{path} gives {', '.join(found)}; the openness of one eye is needed. Export it again.")
        return found["openness"][:, 0]

    return predict


def best_frame(openness: Sequence[np.ndarray] | np.ndarray) -> int | None:
    """Which of several pictures to keep: the one whose most closed eye is most open.

    Args:
        openness: per picture [faces, 2]. Eyes that cannot be judged (NaN) are passed over; a picture without any does not count.

    Returns:
        Its place; None when no picture has an eye that can be judged.
    """
    least = [float(np.nanmin(eyes)) if np.isfinite(np.asarray(eyes, dtype=float)).any() else -1.0 for eyes in openness]
    best = int(np.argmax(least)) if least else -1
    return best if best >= 0 and least[best] >= 0 else None


def closed_eyes(openness: np.ndarray, threshold: float = 0.25) -> np.ndarray:
    """Which faces have a closed eye, bool [faces]; an eye that cannot be judged is not called closed.

    Args:
        openness: [faces, 2].
        threshold: an openness below this is closed.
    """
    values = np.asarray(openness, dtype=float).reshape(-1, 2)
    return np.asarray((np.where(np.isfinite(values), values, 1.0) < threshold).any(axis=1))


__all__ = ["EyeReader", "Predictor", "best_frame", "closed_eyes", "model_predictor"]
