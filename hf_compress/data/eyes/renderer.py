"""Pictures of eyes with exact labels: the openness, the lids' places, and what else was drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any, Literal

import numpy as np
from PIL import Image

from ...errors import DataError
from . import drawing, geometry, shading, traits

Style = Literal["a", "b"]
Shift = Literal["mild", "hard"]
_BATCH = 64  # pictures that are rendered together; larger batches leave the processor's cache
_REPORTED = ("glasses", "melanin", "gaze_x", "gaze_y", "yaw", "blur", "grey", "gain", "noise")


class EyeRenderer:
    """Renders left eyes (the nose is at the left of the picture) at any openness.

    Style "a" shades pixel by pixel and is meant for training. Style "b" draws polygons; it shares neither code nor shapes
    with "a" and stands for pictures from elsewhere in tests, never for real ones. Sample ``i`` of a seed depends on
    ``(seed, i)`` alone: on no batch, order or worker.

    Args:
        style: "a" or "b".
        shift: of style "b". "hard" adds a coarse, grey, noisy camera that sits askew.
        image_size: height and width in pixels.
        misplacement: of style "a": how far the middle of the eye is from that of the picture. 1 is up to a tenth of the
            picture's half width, as careful marks give; eye detectors miss by more.
        jpeg: lowest and highest quality, 1 to 95, of the JPEG that every picture goes through; none when not given.

    Raises:
        DataError: for another style or shift, an image size below 8, or such a quality.
    """

    def __init__(
        self,
        style: Style = "a",
        shift: Shift = "mild",
        image_size: tuple[int, int] = (32, 48),
        *,
        misplacement: float = 1.0,
        jpeg: tuple[int, int] | None = None,
    ):
        if style not in ("a", "b") or shift not in ("mild", "hard") or (style == "a" and shift != "mild"):
            raise DataError(
                f"style={style!r} with shift={shift!r} is not possible; give 'a', or 'b' with mild or hard."
            )
        if len(image_size) != 2 or min(image_size) < 8 or max(image_size) > 2048:
            raise DataError(f"image_size={image_size} is not possible; give height and width, from 8 to 2048.")
        if jpeg is not None and not (len(jpeg) == 2 and 1 <= jpeg[0] <= jpeg[1] <= 95):
            raise DataError(f"jpeg={jpeg} is not possible; give the lowest and the highest quality, from 1 to 95.")
        self.style: Style = style
        self.shift: Shift = shift
        self.image_size = (int(image_size[0]), int(image_size[1]))
        if not 0 <= misplacement <= 4:
            raise DataError(f"misplacement={misplacement} is not possible; give 0 to 4.")
        self.misplacement, self.jpeg = misplacement, jpeg

    def render(
        self,
        seed: int = 0,
        count: int | None = None,
        openness: float | Sequence[float] | np.ndarray | None = None,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        label: Callable[[np.ndarray], np.ndarray] = traits.sample_openness,
    ) -> dict[str, np.ndarray]:
        """Some pictures of a seed.

        Args:
            seed: 0 or more.
            count: how many; sample 0 to ``count - 1``. Not needed when ``openness`` is an array or ``indices`` are given.
            openness: in 0..1, one for all or one each; drawn when not given. All else stays as it is.
            indices: which samples, in place of the first ``count``. The same index twice is the same picture.
            label: uniform draws [samples] in 0..1 -> openness; 15 % are 0, 10 % are 1, the rest uniform when not given.

        Returns:
            ``images`` uint8 [samples, height, width, 3], ``openness`` and ``aperture_ratio`` (distance of the lids in the
            middle over that of the corners, as seen) float32 [samples], ``landmarks`` float32 [samples, 8, 2] (x, y in
            pixels: inner corner, upper lid at one and two thirds, outer corner, lower lid at two thirds and one, middle of
            the upper and the lower lid), and ``glasses``, ``melanin`` (0 light, 1 dark), ``gaze_x``, ``gaze_y`` (half eye
            widths), ``yaw`` (radians), ``blur`` (pixels), ``grey``, ``gain``, ``noise``, [samples] each.

        Raises:
            DataError: when numbers do not fit together, or an openness is outside of 0..1 or NaN.
        """
        indices = _chosen(seed, count, openness, indices)
        given = None if openness is None else _checked(openness, len(indices))
        return self._render_all(seed, indices, given, label)

    def sequence(self, seed: int = 0, count: int = 1, steps: int = 15) -> dict[str, np.ndarray]:
        """Eyes that open in even steps while all else stands still, the noise too.

        No eye looks down: who holds the lids wide open, as in the last step, cannot.

        Args:
            seed: 0 or more.
            count: number of eyes.
            steps: pictures of each, from openness 0 to 1.

        Returns:
            What :meth:`render` returns, with [count, steps, ...] in place of [samples, ...].
        """
        traits.check_seed(seed)
        if steps < 2 or count < 1:
            raise DataError(f"count={count} and steps={steps} are not possible; give at least 1 and 2.")
        openness = np.tile(np.linspace(0, 1, steps), count)
        indices = np.repeat(np.arange(count), steps)
        found = self._render_all(seed, indices, openness.astype(np.float32), traits.sample_openness, widest=1.0)
        return {name: values.reshape(count, steps, *values.shape[1:]) for name, values in found.items()}

    def _render_all(
        self, seed: int, indices: np.ndarray, openness: np.ndarray | None, label: Any, widest: float = 0.0
    ) -> dict[str, np.ndarray]:
        parts = []
        for start in range(0, len(indices), _BATCH):
            place = slice(start, start + _BATCH)
            parts.append(
                self._render(seed, indices[place], None if openness is None else openness[place], label, widest)
            )
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if self.jpeg is not None:
            found["images"] = _through_jpeg(found["images"], seed, indices, self.jpeg)
        return found

    def _render(
        self, seed: int, indices: np.ndarray, openness: np.ndarray | None, label: Any, widest: float
    ) -> dict[str, np.ndarray]:
        """At most a batch. ``widest`` is an openness up to which the gaze has to stay the same."""
        if self.style == "b":
            return drawing.render(seed, indices, openness, label, self.image_size, self.shift)
        generators = traits.generators(seed, indices)
        width = len(traits.IDENTITY) + len(traits.VIEW)
        uniform = np.stack([draw.random(width + 1, dtype=np.float32) for draw in generators])
        eyes = traits.eyes(uniform[:, :-1])
        for name in ("shift_x", "shift_y"):
            eyes[name] = eyes[name] * np.float32(self.misplacement)
        if openness is None:
            openness = label(uniform[:, -1]).astype(np.float32)
        eyes = geometry.couple_gaze(eyes, np.maximum(openness, np.float32(widest)))
        images = shading.shade(eyes, openness, generators, self.image_size)
        points = geometry.to_pixels(geometry.landmarks(openness, eyes), eyes, self.image_size).astype(np.float32)
        return {
            "images": images,
            "openness": openness,
            "aperture_ratio": geometry.aperture_ratio(points),
            "landmarks": points,
            **{name: eyes[name] for name in _REPORTED},
        }


def _through_jpeg(images: np.ndarray, seed: int, indices: np.ndarray, quality: tuple[int, int]) -> np.ndarray:
    """What JPEG leaves of the pictures, at a quality drawn for each."""
    read = np.empty_like(images)
    for place, index in enumerate(indices.tolist()):
        draw = np.random.default_rng(np.random.SeedSequence((seed, index, 4)))  # apart from the renderers' draws
        file = BytesIO()
        Image.fromarray(images[place]).save(file, "JPEG", quality=int(draw.integers(quality[0], quality[1] + 1)))
        with Image.open(file) as image:
            read[place] = np.asarray(image)
    return read


def _chosen(seed: int, count: int | None, openness: Any, indices: Any) -> np.ndarray:
    traits.check_seed(seed)
    if indices is not None:
        indices = np.asarray(indices)
        if count is not None or indices.ndim != 1 or not len(indices) or indices.min() < 0:
            raise DataError("indices are a list of numbers, 0 or more, and come without count.")
        return indices.astype(np.int64)
    if count is None:
        if openness is None or np.ndim(openness) == 0:
            raise DataError("how many pictures? Give count, indices, or an openness for each.")
        count = len(np.asarray(openness))
    if count < 1:
        raise DataError(f"count={count} is not possible; give at least 1.")
    return np.arange(count)


def _checked(openness: Any, count: int) -> np.ndarray:
    values = np.asarray(openness, dtype=np.float32)
    if values.ndim > 1 or (values.ndim == 1 and len(values) != count):
        raise DataError(f"openness has the shape {values.shape} for {count} pictures; give one number, or one each.")
    if not ((values >= 0) & (values <= 1)).all():  # NaN is neither
        raise DataError("an openness is outside of 0..1, or NaN.")
    return np.broadcast_to(values, (count,))


__all__ = ["EyeRenderer", "Shift", "Style"]
