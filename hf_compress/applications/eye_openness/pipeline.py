"""``transformers.pipeline("eye-openness", model=...)``: a picture, a list of them, or a video."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Pipeline

from ...errors import DataError, ModelError
from ...models.eye_openness.image_processing_eye_openness import EyeOpennessImageProcessor, as_picture
from .faces import Face, Locator, YuFace
from .frames import is_video, open_video, read_picture
from .predicting import EyeReader, model_predictor
from .tracks import EyeTracks, analyse

TASK = "eye-openness"


class EyeOpennessPipeline(Pipeline):
    """How far eyes are open.

    Call it with a picture (PIL image, RGB array, path), a list of pictures, or the path of a video.

    - A picture gives a list of faces, the largest first, each ``{"left": ..., "right": ..., "openness": ..., "box": ...,
      "score": ...}``: the openness of the person's eyes, the smaller one of both, and the face's place. NaN for an eye that
      cannot be judged. No face gives an empty list.
    - With ``crops=True`` a picture is one left eye (or a mirrored right one) already: ``{"openness": ...,
      "aperture_ratio": ..., "open_probability": ...}``.
    - A video gives :class:`~.tracks.EyeTracks`.

    Args:
        locate: finds faces in a frame, see :mod:`~.faces`; libfacedetection when not given.
    """

    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = None
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    def __init__(self, *args: Any, locate: Locator | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if getattr(self.model.config, "model_type", None) != "eye_openness":
            raise ModelError(
                f"{type(self.model).__name__} gives no openness of eyes; an EyeOpennessForRegression is needed."
            )
        if not isinstance(self.image_processor, EyeOpennessImageProcessor):
            height, width = self.model.config.image_size
            self.image_processor = EyeOpennessImageProcessor(size={"height": height, "width": width})
        self.locate = locate

    def _sanitize_parameters(
        self, crops: bool | None = None, faces: Any = None, fps: float | None = None, **tracking: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        unknown = sorted(set(tracking) - {"how", "rules", "window", "exclude_blinks"})
        if unknown:
            raise DataError(f"the pipeline does not know {', '.join(unknown)}.")
        given = {"crops": crops, "faces": faces}
        return {name: value for name, value in given.items() if value is not None}, {}, {}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """See the class.

        Args:
            inputs: a picture, a list of pictures, or the path of a video.
            crops: pictures are crops of eyes.
            faces: of one picture, in place of what the detector finds.
            fps, how, rules, window, exclude_blinks: of a video, see :func:`~.tracks.analyse`.

        Raises:
            DataError: when a picture or a video cannot be read.
        """
        if isinstance(inputs, (str, Path)) and is_video(inputs):
            return self.video(inputs, **kwargs)
        return super().__call__(inputs, **kwargs)

    def preprocess(self, inputs: Any, crops: bool = False, faces: Any = None) -> dict[str, Any]:  # type: ignore[override]
        image = read_picture(inputs) if isinstance(inputs, (str, Path)) else as_picture(inputs)
        processor: Any = self.image_processor
        if crops:
            return {"pixel_values": processor(image, return_tensors="pt")["pixel_values"], "faces": None, "seen": None}
        found: list[Face] = list(faces) if faces is not None else self._locator()(np.asarray(image))
        found = sorted(found, key=lambda face: -face.eye_distance)
        images = [crop for face in found for crop in self._reader().crops(image, face)]
        known = [crop for crop in images if crop is not None]
        pixels = processor(known, return_tensors="pt")["pixel_values"] if known else None
        return {"pixel_values": pixels, "faces": found, "seen": [crop is not None for crop in images]}

    def _forward(self, inputs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        pixels = inputs["pixel_values"]
        output = None if pixels is None else self.model(pixel_values=pixels)
        return {"output": output, "faces": inputs["faces"], "seen": inputs["seen"]}

    def postprocess(self, outputs: dict[str, Any]) -> Any:  # type: ignore[override]
        output = outputs["output"]
        if outputs["faces"] is None:
            names = ("openness", "aperture_ratio", "open_probability")
            values = {name: getattr(output, name) for name in names}
            return {name: float(value[0, 0]) for name, value in values.items() if value is not None}
        openness = np.full(len(outputs["seen"]), np.nan)
        if output is not None:
            openness[np.array(outputs["seen"], dtype=bool)] = output.openness[:, 0].float().cpu().numpy()
        rows = []
        for face, (left, right) in zip(outputs["faces"], openness.reshape(-1, 2).tolist(), strict=True):
            known = [value for value in (left, right) if not math.isnan(value)]
            least = min(known, default=math.nan)
            rows.append({"left": left, "right": right, "openness": least, "box": face.box, "score": face.score})
        return rows

    def video(self, path: str | Path, *, fps: float | None = None, **tracking: Any) -> EyeTracks:
        """The tracks of a video; see :meth:`__call__`."""
        source = open_video(path, fps)
        rows = [values for _, values in self._reader().frames(source.frames(), self._locator())]
        return analyse(np.array(rows).reshape(-1, 2), source.fps, **tracking)

    def _reader(self) -> EyeReader:
        processor: Any = self.image_processor
        return EyeReader(model_predictor(self.model), processor)

    def _locator(self) -> Locator:
        if self.locate is None:
            self.locate = YuFace()
        return self.locate


def register() -> None:
    """Let ``transformers.pipeline`` know the task; it is done by importing ``hf_compress``."""
    from transformers import AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY

    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(TASK, EyeOpennessPipeline, pt_model=AutoModel, type="image")


__all__ = ["TASK", "EyeOpennessPipeline", "register"]
