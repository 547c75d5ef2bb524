"""Faces in, crops of eyes out, as the eye openness model takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import ViTImageProcessor
from transformers.image_processing_base import BatchFeature

from hf_compress.errors import DataError

CROP_WIDTH = 0.65
"""Width of a crop over the distance of the eyes' centres; its height is two thirds of it at 32x48."""
SMALLEST_CROP = 8
"""Pixels of the picture across a crop; below that an eye cannot be judged."""
_LARGEST_REDUCTION = 16


def crop_eye(
    image: Image.Image,
    center: tuple[float, float],
    distance: float,
    angle: float = 0.0,
    *,
    mirror: bool = False,
    size: tuple[int, int] = (32, 48),
) -> Image.Image:
    """One eye, upright, in the orientation of a left eye, averaged down by area.

    Args:
        image: the picture.
        center: x and y of the eye's centre in pixels.
        distance: between the centres of both eyes, in pixels.
        angle: of the line from the person's right eye to the left one, in radians, growing from x to y (clockwise as seen).
        mirror: True for the person's right eye.
        size: height and width of the crop.

    Raises:
        DataError: when the crop would be smaller than 8 pixels of the picture, or its centre is outside.
    """
    height, width = size
    x, y = center
    if not all(map(math.isfinite, (x, y, distance, angle))):
        raise DataError(f"the eye at {center} with distance {distance} has no place; leave eyes that are hidden out.")
    crop_width = CROP_WIDTH * distance
    if crop_width < SMALLEST_CROP:
        raise DataError(
            f"an eye {crop_width:.1f} pixels wide is too small to be judged: at least {SMALLEST_CROP} are needed. Use a "
            "larger picture."
        )
    if not (0 <= x < image.width and 0 <= y < image.height):
        raise DataError(f"the eye at ({x:.0f}, {y:.0f}) is outside of the picture of {image.width}x{image.height}.")
    if mirror:  # the picture, so that a right eye takes the very same way as the left eye that it becomes
        image, x, angle = ImageOps.mirror(image), image.width - x, -angle
    fold = min(_LARGEST_REDUCTION, max(1, math.ceil(crop_width / width)))
    step = crop_width / (width * fold)  # pixels of the picture for one of the sampled crop
    along, across = (step * math.cos(angle), step * math.sin(angle)), (-step * math.sin(angle), step * math.cos(angle))
    columns, rows = width * fold, height * fold
    start = (
        x - along[0] * columns / 2 - across[0] * rows / 2,
        y - along[1] * columns / 2 - across[1] * rows / 2,
    )
    sampled = image.transform(
        (columns, rows),
        Image.Transform.AFFINE,
        (along[0], across[0], start[0], along[1], across[1], start[1]),
        resample=Image.Resampling.BILINEAR,
    )
    return sampled.reduce(fold) if fold > 1 else sampled


class EyeOpennessImageProcessor(ViTImageProcessor):
    """Crops of eyes as float images in 0..1; the model standardises them itself.

    Without ``eyes`` the images are crops already, and are resized and rescaled. With ``eyes`` they are pictures of faces,
    and every eye becomes a crop: 0.65 of the eyes' distance wide, turned upright, right eyes mirrored, averaged by area.
    """

    size = {"height": 32, "width": 48}  # noqa: RUF012
    do_resize = True
    do_rescale = True
    do_normalize = False
    do_convert_rgb = True
    model_input_names = ["pixel_values"]  # noqa: RUF012

    def preprocess(self, images: Any, eyes: Any = None, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """Images -> ``pixel_values`` float [crops, 3, height, width] in 0..1.

        Args:
            images: a picture or a list of them.
            eyes: per picture [faces, 2, 2]: x and y of the left and of the right eye of each face, in pixels; of the
                person, whose left eye is further to the right in the picture. Crops come in the order picture, face,
                left, right.

        Raises:
            DataError: for pictures with NaN, crops too small to be judged, and eyes without a place.
        """
        pictures = images if isinstance(images, (list, tuple)) else [images]
        if eyes is not None:
            given = eyes if isinstance(images, (list, tuple)) else [eyes]
            if len(given) != len(pictures):
                raise DataError(f"eyes has {len(given)} entries for {len(pictures)} pictures; give one for each.")
            pictures = [
                crop
                for picture, faces in zip(pictures, given, strict=True)
                for face in np.asarray(faces, dtype=float).reshape(-1, 2, 2)
                for crop in self.crop_eyes(as_picture(picture), face[0], face[1])
            ]
            if not pictures:
                raise DataError("eyes names no face in any picture, so there is nothing to look at.")
        for picture in pictures:
            _check(picture)
        return super().preprocess(pictures, **kwargs)

    def crop_eyes(
        self, image: Image.Image, left: Sequence[float], right: Sequence[float], distance: float | None = None
    ) -> list[Image.Image]:
        """The crops of a face's left and right eye; see :func:`crop_eye` for what is refused.

        Args:
            image: the picture.
            left, right: centres in pixels.
            distance: of the centres; measured when not given.
        """
        offset = float(left[0]) - float(right[0]), float(left[1]) - float(right[1])
        distance = math.hypot(*offset) if distance is None else distance
        angle, size = math.atan2(offset[1], offset[0]), self._shape
        return [
            crop_eye(image, (float(center[0]), float(center[1])), distance, angle, mirror=mirror, size=size)
            for center, mirror in ((left, False), (right, True))
        ]

    @property
    def _shape(self) -> tuple[int, int]:
        """Height and width of a crop."""
        return int(self.size["height"]), int(self.size["width"])


def as_picture(image: Any) -> Image.Image:
    """A picture in RGB from a PIL image or an array [height, width, 3] of bytes.

    Raises:
        DataError: for anything else.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = np.asarray(image)
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 3 and array.size:
        return Image.fromarray(array)
    raise DataError(
        f"a picture is a PIL image or an array [height, width, 3] of uint8, not {array.dtype} {list(array.shape)}."
    )


def _check(picture: Any) -> None:
    if isinstance(picture, Image.Image):
        width, height = picture.size
    else:
        shape = tuple(getattr(picture, "shape", ()))
        if len(shape) != 3:
            raise DataError(f"a crop of an eye has three dimensions, not {list(shape)}.")
        sides = shape[1:] if shape[0] in (1, 3) else shape[:2]
        height, width = int(sides[0]), int(sides[1])
        if not np.isfinite(np.asarray(picture, dtype=np.float64)).all():
            raise DataError("a crop of an eye holds NaN or infinity.")
    if width < SMALLEST_CROP or height < SMALLEST_CROP // 2:
        raise DataError(
            f"a crop of {width}x{height} pixels is too small to be judged: at least {SMALLEST_CROP}x{SMALLEST_CROP // 2} "
            "are needed."
        )


__all__ = ["CROP_WIDTH", "SMALLEST_CROP", "EyeOpennessImageProcessor", "as_picture", "crop_eye"]
