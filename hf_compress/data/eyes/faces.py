"""Faces and videos of faces with known eyes, to test what finds blinks without any detector or real person.

A face is an ellipse with two rendered eyes (style "a"), brows, nose and mouth. Nobody would take it for a photograph; the
eyes are those of the renderer, and their places, openness and blinks are exact. A design of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ...errors import DataError
from . import shading, traits
from .geometry import Traits

FRAMES_PER_SECOND = 30.0
_PATCH = 0.84  # width of the rendered eye region over the distance of the eyes; two of them do not touch
_CROP = 0.65  # width of the picture that a network is given, over the same distance; sets the size of the eye


@dataclass(frozen=True)
class Blink:
    """One closure that was put into a video.

    Attributes:
        start, end: first and last frame in which the lids are below the baseline.
        minimum: the smallest openness.
        is_complete: whether it was meant to close the eye: minimum at most 0.1.
        eye: "both", "left" or "right", the person's own.
    """

    start: int
    end: int
    minimum: float
    is_complete: bool
    eye: str = "both"


@dataclass(frozen=True)
class Faces:
    """Pictures of one face, in order, and what is true about them.

    Attributes:
        frames: uint8 [frames, height, width, 3].
        eye_centres: float32 [frames, 2, 2]: x, y in pixels, middle of the eye's corners; the eye at the left of the picture
            (the person's right) first. 0 is the outer edge of the first pixel.
        openness: float32 [frames, 2], in the same order.
        blinks: sorted by start.
        frames_per_second: for times.
    """

    frames: np.ndarray
    eye_centres: np.ndarray
    openness: np.ndarray
    blinks: tuple[Blink, ...] = ()
    frames_per_second: float = FRAMES_PER_SECOND

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def eyes(self) -> np.ndarray:
        """The centres as ``EyeOpennessImageProcessor`` takes them, [frames, 1 face, 2, 2]: the person's left eye first."""
        return self.eye_centres[:, None, ::-1]


def blink_track(
    seed: int = 0,
    frames: int = 300,
    *,
    frames_per_second: float = FRAMES_PER_SECOND,
    mean_interval: float = 4.0,
    incomplete_share: float = 0.15,
    wink_share: float = 0.0,
    baseline: float = 0.8,
    jitter: float = 0.03,
) -> tuple[np.ndarray, tuple[Blink, ...]]:
    """The openness of two eyes over time, with blinks at random times.

    Intervals are exponential. At 30 frames a second a blink closes in 3 frames, stays for 1 to 2 and opens in 5. A
    complete one goes down to 0..0.1, an incomplete one to 0.35..0.55.

    Args:
        seed: 0 or more.
        frames: length.
        frames_per_second: durations are scaled to it.
        mean_interval: seconds between two blinks, in the mean.
        incomplete_share, wink_share: shares of blinks that stay half open, and that one eye alone makes.
        baseline, jitter: the openness between blinks: mean and standard deviation.

    Returns:
        Openness float32 [frames, 2] (as in :class:`Faces`), and the blinks.
    """
    possible = frames >= 1 and frames_per_second > 0 and mean_interval > 0 and 0 <= jitter < 1
    shares = (incomplete_share, wink_share, baseline)
    if not (possible and all(0 <= share <= 1 for share in shares)):
        raise DataError(
            f"frames={frames}, frames_per_second={frames_per_second}, mean_interval={mean_interval}, "
            f"incomplete_share={incomplete_share}, wink_share={wink_share}, baseline={baseline} and jitter={jitter} make no "
            "track; lengths are positive, shares in 0..1."
        )
    traits.check_seed(seed)
    draw = np.random.default_rng(np.random.SeedSequence((seed, 2)))
    common = baseline + jitter * draw.standard_normal(frames)
    track = np.stack([common + 0.3 * jitter * draw.standard_normal(frames) for _ in range(2)], axis=1)
    scale = frames_per_second / FRAMES_PER_SECOND
    blinks = []
    start = round(draw.exponential(mean_interval) * frames_per_second)
    while True:
        closing, opening = max(1, round(3 * scale)), max(1, round(5 * scale))
        shut = max(1, round(draw.integers(1, 3) * scale))
        is_complete = bool(draw.random() >= incomplete_share)
        minimum = float(draw.uniform(0, 0.1) if is_complete else draw.uniform(0.35, 0.55))
        eye = ("left", "right")[draw.integers(2)] if draw.random() < wink_share else "both"
        end = start + closing + shut + opening - 2
        if end >= frames:
            break
        # the depth of a blink, 1 while it is shut; its outer frames are already on their way
        depth = np.concatenate(
            [np.arange(1, closing + 1) / closing, np.ones(shut - 1), np.arange(opening - 1, 0, -1) / opening]
        )
        place = slice(start, start + len(depth))
        for side in {"both": (0, 1), "right": (0,), "left": (1,)}[eye]:
            track[place, side] += depth * (minimum - track[place, side])
        blinks.append(Blink(start, start + len(depth) - 1, minimum, is_complete, eye))
        start = end + max(2, round(draw.exponential(mean_interval) * frames_per_second))
    return np.clip(track, 0, 1).astype(np.float32), tuple(blinks)


def render_faces(
    seed: int = 0,
    openness: Sequence[Sequence[float]] | np.ndarray = ((0.8, 0.8),),
    *,
    size: tuple[int, int] = (240, 320),
    eye_distance: float | None = None,
    motion: float = 1.0,
    noise: float = 0.01,
) -> Faces:
    """One face whose eyes have a given openness in every frame.

    Args:
        seed: of the face, its motion and the background.
        openness: [frames, 2] in 0..1: the eye at the left of the picture (the person's right), the other one.
        size: height and width in pixels.
        eye_distance: of the eyes' centres, in pixels; a fifth of the smaller side when not given.
        motion: 0 holds the head still; 1 is a slow sway with a little jitter.
        noise: standard deviation of the camera's noise; 1 is white.

    Raises:
        DataError: when an openness is outside of 0..1 or NaN, or the face does not fit the picture.
    """
    track = np.asarray(openness, dtype=np.float32)
    if track.ndim != 2 or track.shape[1] != 2 or not len(track) or not ((track >= 0) & (track <= 1)).all():
        raise DataError(f"openness has the shape {track.shape}; it takes [frames, 2] with values in 0..1.")
    height, width = size
    distance = float(eye_distance if eye_distance is not None else min(size) / 5)
    if not 12 <= distance <= min(size) / 3:
        raise DataError(
            f"eye_distance={distance:g} does not fit {size}; give 12 pixels to a third of the smaller side."
        )
    traits.check_seed(seed)
    draw = np.random.default_rng(np.random.SeedSequence((seed, 3)))
    person = traits.identity(draw.random((1, len(traits.IDENTITY)), dtype=np.float32))
    person["makeup"][:] = 0
    base = _Face(person, distance, draw)
    background = _background(draw, size)
    phase, speed = draw.uniform(0, 2 * np.pi, 3), draw.uniform(0.15, 0.35, 3) * 2 * np.pi / FRAMES_PER_SECOND
    frames = np.empty((len(track), height, width, 3), np.uint8)
    centres = np.empty((len(track), 2, 2), np.float32)
    eyes = base.eyes(track)
    for number in range(len(track)):
        sway = motion * (np.sin(phase + speed * number) + 0.05 * draw.standard_normal(3))
        middle = np.array([width / 2, height / 2]) + sway[:2] * distance * np.array([0.20, 0.10])
        frames[number], centres[number] = base.picture(background, middle, 0.06 * sway[2], eyes[number], noise, draw)
    return Faces(frames, centres, track)


def render_face_video(
    seed: int = 0,
    frames: int = 300,
    *,
    size: tuple[int, int] = (240, 320),
    eye_distance: float | None = None,
    motion: float = 1.0,
    **track: float,
) -> Faces:
    """A video of one face that blinks at random times.

    Args:
        seed: of everything.
        frames: length, at 30 frames a second unless ``frames_per_second`` says otherwise.
        size, eye_distance, motion: see :func:`render_faces`.
        track: see :func:`blink_track`.
    """
    openness, blinks = blink_track(seed, frames, **track)
    faces = render_faces(seed, openness, size=size, eye_distance=eye_distance, motion=motion)
    rate = track.get("frames_per_second", FRAMES_PER_SECOND)
    return Faces(faces.frames, faces.eye_centres, faces.openness, blinks, rate)


class _Face:
    """The parts of a face that stay the same from frame to frame, in pixels around the middle of the eyes."""

    def __init__(self, person: Traits, distance: float, draw: np.random.Generator):
        self.person, self.distance = person, distance
        self.skin = np.clip(person["skin"][0], 0, 1)
        self.hair = person["hair"][0]
        self.width, self.height = distance * draw.uniform(1.15, 1.3), distance * draw.uniform(1.4, 1.6)
        self.brow_lift, self.mouth = draw.uniform(-0.03, 0.05), draw.uniform(0.32, 0.46)
        self.seeds = draw.integers(2**31, size=2)
        side = max(12, round(_PATCH * distance))
        self.patch_size = (max(8, round(side * 2 / 3)), side)

    def eyes(self, openness: np.ndarray) -> np.ndarray:
        """Pictures of both eyes in every frame, uint8 [frames, 2, height, width, 3]."""
        sides = []
        for side in range(2):
            labels = openness[:, side]
            eyes = {name: np.repeat(values, len(labels), axis=0) for name, values in self.person.items()}
            eyes |= traits.neutral_view(len(labels))
            eyes["scale"] = eyes["scale"] * np.float32(_CROP / _PATCH)
            eyes["brow_strength"] = np.zeros_like(eyes["brow_strength"])  # the face has its own
            parts = []
            for start in range(0, len(labels), 64):
                part = {name: values[start : start + 64] for name, values in eyes.items()}
                # the same texture in every frame
                textures = [np.random.default_rng(self.seeds[side]) for _ in labels[start : start + 64]]
                parts.append(shading.shade(part, labels[start : start + 64], textures, self.patch_size))
            pictures = np.concatenate(parts)
            sides.append(pictures[:, :, ::-1] if side == 0 else pictures)  # a right eye is a left one in the mirror
        return np.stack(sides, axis=1)

    def picture(
        self,
        background: np.ndarray,
        middle: np.ndarray,
        angle: float,
        eyes: np.ndarray,
        noise: float,
        draw: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """A frame and where its eyes are."""
        # drawn upright on a canvas of its own, then turned about the middle of the eyes
        reach = int(np.ceil(2.6 * self.distance))
        canvas, mask = self._upright(reach, eyes)
        height, width = background.shape[:2]
        # one affine map from the frame to the canvas: whole and part pixels of the shift at once
        cos, sin = np.cos(angle), np.sin(angle)
        coefficients = (
            cos, sin, reach - cos * middle[0] - sin * middle[1],
            -sin, cos, reach + sin * middle[0] - cos * middle[1],
        )  # fmt: skip
        shown = [
            np.asarray(
                image.transform((width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
            )
            for image in (canvas, mask)
        ]
        share = shown[1][..., None].astype(np.float32) / 255
        frame = background + share * (shown[0] - background)
        frame += 255 * noise * draw.standard_normal(frame.shape, dtype=np.float32)
        offsets = self.patch_places(reach) + np.array(self.patch_size[::-1]) / 2 - reach
        centres = middle + offsets @ np.array([[cos, sin], [-sin, cos]])
        return np.clip(frame + 0.5, 0, 255).astype(np.uint8), centres

    def patch_places(self, reach: int) -> np.ndarray:
        """Upper left corners of the eyes' patches on the canvas, whole pixels [2, 2]."""
        height, width = self.patch_size
        return np.array(
            [[round(reach + x * self.distance - width / 2), round(reach - height / 2)] for x in (-0.5, 0.5)]
        )

    def _upright(self, reach: int, eyes: np.ndarray) -> tuple[Image.Image, Image.Image]:
        d, size = self.distance, (2 * reach, 2 * reach)

        def tone(factor: float, colour: np.ndarray = self.skin) -> tuple[int, int, int]:
            red, green, blue = np.clip(255 * factor * colour, 0, 255).astype(int).tolist()
            return red, green, blue

        def box(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
            return (reach + x * d - w * d, reach + y * d - h * d, reach + x * d + w * d, reach + y * d + h * d)

        canvas = Image.new("RGB", size, tone(1.0))
        pen = ImageDraw.Draw(canvas)
        hair = tone(1.0, self.hair)
        outline = box(0, 0.30, self.width / d, self.height / d)
        x0, y0, x1, _ = outline
        pen.ellipse((x0 - d, y0 - 1.6 * d, x1 + d, y0 + 0.42 * d), hair)
        pen.line(
            [(reach - 0.10 * d, reach + 0.1 * d), (reach - 0.17 * d, reach + 0.50 * d)],
            tone(0.86),
            max(1, round(0.05 * d)),
        )
        pen.arc(box(0, 0.50, 0.17, 0.08), 0, 180, tone(0.62), max(1, round(0.045 * d)))
        red, green, blue = tone(0.8)
        pen.chord(box(0, 0.92, self.mouth, 0.13), 0, 180, (red, int(0.62 * green), int(0.62 * blue)))
        pen.line(
            [(reach - self.mouth * d, reach + 0.92 * d), (reach + self.mouth * d, reach + 0.92 * d)],
            tone(0.4),
            max(1, round(0.03 * d)),
        )
        canvas = canvas.filter(ImageFilter.GaussianBlur(0.02 * d))
        pen = ImageDraw.Draw(canvas)
        feather = _feather(*self.patch_size)
        for picture, (x, y) in zip(eyes, self.patch_places(reach).tolist(), strict=True):
            canvas.paste(Image.fromarray(np.ascontiguousarray(picture)), (x, y), feather)
        for x in (-1, 1):
            lift = -0.36 - self.brow_lift
            arch = [(0.20, lift + 0.03), (0.45, lift - 0.05), (0.70, lift - 0.03), (0.84, lift + 0.06)]
            points = [(reach + x * a * d, reach + b * d) for a, b in arch]
            pen.line(points, hair, max(1, round(0.06 * d)), joint="curve")
        mask = Image.new("L", size, 0)
        ImageDraw.Draw(mask).ellipse(outline, 255)
        return canvas, mask.filter(ImageFilter.GaussianBlur(0.02 * d))


def _feather(height: int, width: int) -> Image.Image:
    """255 in the middle, 0 at the border."""
    rows, columns = np.abs(np.linspace(-1, 1, height))[:, None], np.abs(np.linspace(-1, 1, width))
    share = np.clip((1 - rows) / 0.25, 0, 1) * np.clip((1 - columns) / 0.2, 0, 1)
    return Image.fromarray((255 * share).astype(np.uint8))


def _background(draw: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Soft blotches, float32 [height, width, 3] in 0..255."""
    grey, tint = draw.standard_normal((6, 8, 1)), draw.standard_normal((6, 8, 3))
    coarse = (np.clip(0.5 + 0.15 * grey + 0.04 * tint, 0, 1) * 255).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(smooth, np.float32)


__all__ = ["FRAMES_PER_SECOND", "Blink", "Faces", "blink_track", "render_face_video", "render_faces"]
