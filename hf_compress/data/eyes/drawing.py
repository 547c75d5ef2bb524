"""Renderer "b": eyes drawn as flat polygons and strokes with Pillow, a style that training on "a" has not seen.

Lids are cubic Bezier curves whose control points move in straight lines with the openness, so the aperture is linear in it
at every curve parameter. Shapes, colours and camera are independent of renderer "a". It stands for pictures from elsewhere
in tests; it is not a model of real photographs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .geometry import aperture_ratio

_SUPERSAMPLING = 4
_STREAM = 1  # keeps the draws of a seed apart from those of renderer "a"
_RANGES = {
    "label": (0.0, 1.0),
    "half_width": (0.60, 0.90),  # of the eye, in half picture widths
    "centre_x": (-0.10, 0.10),
    "centre_y": (-0.09, 0.09),
    "rotation": (-0.22, 0.22),
    "upper_inner": (0.42, 0.85),  # heights of control points, in half eye widths
    "upper_outer": (0.35, 0.85),
    "lower_inner": (0.10, 0.34),
    "lower_outer": (0.14, 0.40),
    "closing": (0.6, 1.0),
    "inner_x": (-0.60, -0.30),
    "outer_x": (0.30, 0.60),
    "iris": (0.36, 0.46),
    "pupil": (0.30, 0.60),
    "gaze_x": (-0.36, 0.36),
    "gaze_y": (-0.10, 0.10),
    "skin": (0.0, 1.0),
    "skin_warmth": (-0.05, 0.05),
    "eye_colour": (0.0, 1.0),
    "shadow": (-0.16, 0.10),  # of the lid's polygon against the skin
    "lid_height": (0.08, 0.30),
    "brow_height": (0.70, 1.05),
    "brow_arch": (0.0, 0.30),
    "brow_thickness": (0.05, 0.16),
    "brow_draw": (0.0, 1.0),
    "lashes": (5.0, 13.0),
    "lash_length": (0.05, 0.22),
    "line": (0.03, 0.09),
    "glasses_draw": (0.0, 1.0),
    "glasses_width": (1.15, 1.45),
    "glasses_height": (0.65, 0.95),
    "glasses_line": (0.03, 0.08),
    "glasses_tone": (0.0, 120.0),
    "blur": (0.0, 1.1),
    "gain": (0.55, 1.2),
    "gradient": (-0.35, 0.35),
    "grey_draw": (0.0, 1.0),
    "noise": (0.0, 9.0),  # grey levels
    "spot_x": (-0.14, 0.14),
}
_SKINS = np.array(
    [[247, 214, 190], [232, 190, 158], [205, 157, 120], [163, 114, 80], [116, 76, 52], [74, 48, 36]], float
)
_EYES = [(52, 34, 24), (86, 56, 34), (110, 92, 52), (88, 118, 92), (92, 128, 160), (120, 128, 134)]
_T = np.linspace(0, 1, 25)
_BASIS = np.stack([(1 - _T) ** 3, 3 * _T * (1 - _T) ** 2, 3 * _T**2 * (1 - _T), _T**3], axis=1)
# inner corner, upper lid at one and two thirds, outer corner, lower lid back again, middle of the upper and lower lid
_MARKS = np.array([0, 8, 16, 24, 16, 8, 12, 12])


def render(
    seed: int,
    indices: Sequence[int] | np.ndarray,
    openness: np.ndarray | None,
    label: Callable[[np.ndarray], np.ndarray],
    image_size: tuple[int, int],
    shift: str,
) -> dict[str, np.ndarray]:
    """Pictures and labels; see :meth:`~.renderer.EyeRenderer.render`."""
    draws = [np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, int(i), _STREAM)))) for i in indices]
    uniform = np.stack([draw.random(len(_RANGES)) for draw in draws])
    low, high = np.array(list(_RANGES.values())).T
    values = low + (high - low) * uniform
    traits = {name: values[:, column] for column, name in enumerate(_RANGES)}
    if openness is None:
        openness = label(traits["label"]).astype(np.float32)
    images = np.empty((len(draws), *image_size, 3), np.uint8)
    points = np.empty((len(draws), 8, 2), np.float32)
    for i, draw in enumerate(draws):
        eye = {name: float(values[i]) for name, values in traits.items()}
        images[i], points[i] = _picture(eye, float(openness[i]), draw, image_size, shift == "hard")
    return {
        "images": images,
        "openness": openness,
        "aperture_ratio": aperture_ratio(points),
        "landmarks": points,
        "glasses": traits["glasses_draw"] < 0.25,
        "melanin": traits["skin"].astype(np.float32),
        "gaze_x": traits["gaze_x"].astype(np.float32),
        "gaze_y": traits["gaze_y"].astype(np.float32),
        "yaw": np.zeros(len(draws), np.float32),
        "blur": traits["blur"].astype(np.float32),
        "grey": (traits["grey_draw"] < 0.2) | (shift == "hard"),
        "gain": traits["gain"].astype(np.float32),
        "noise": (traits["noise"] / 255).astype(np.float32),
    }


def lids(eye: dict[str, float], openness: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Upper lid, lower lid and the wide open upper lid, [25, 2] each, in eye coordinates."""
    across = np.array([-1, eye["inner_x"], eye["outer_x"], 1])
    upper = np.array([0, eye["upper_inner"], eye["upper_outer"], 0])
    lower = -np.array([0, eye["lower_inner"], eye["lower_outer"], 0])
    line = eye["closing"] * lower + 0.1 * (1 - eye["closing"]) * upper
    curves = (line + openness * (upper - line), line + openness * (lower - line), upper)
    first, second, third = (_BASIS @ np.stack([across, heights], axis=1) for heights in curves)
    return first, second, third


def _picture(
    eye: dict[str, float], openness: float, draw: np.random.Generator, image_size: tuple[int, int], is_hard: bool
) -> tuple[np.ndarray, np.ndarray]:
    height, width = image_size[0] * _SUPERSAMPLING, image_size[1] * _SUPERSAMPLING
    unit = eye["half_width"] * width / 2
    cos, sin = np.cos(eye["rotation"]), np.sin(eye["rotation"])
    turn = np.array([[cos, -sin], [-sin, -cos]]) * unit  # row vectors (u, v), v up, to pixels (x, y), y down
    origin = np.array([(1 + eye["centre_x"]) * width / 2, height / 2 - eye["centre_y"] * width / 2])

    def place(points: Any) -> np.ndarray:
        return np.asarray(points, float) @ turn + origin

    def flat(points: Any) -> list[float]:
        return place(points).ravel().tolist()

    def thick(size: float) -> int:
        return max(1, round(size * unit))

    skin = _skin(eye)
    upper, lower, opened = lids(eye, openness)
    canvas = Image.new("RGB", (width, height), _rgb(skin))
    pen = ImageDraw.Draw(canvas)
    # cheek, and the lid between its edge and the fold above
    pen.polygon(
        flat([(-3, -0.45), (-0.9, -0.40), (0.2, -0.62), (1.1, -0.40), (3, -0.3), (3, -3), (-3, -3)]), _rgb(skin * 1.05)
    )
    fold = opened + np.array([0, 1]) * eye["lid_height"] * np.sin(np.pi * _T)[:, None] ** 0.5
    pen.polygon(flat(np.concatenate([upper, fold[::-1]])), _rgb(skin * (1 + eye["shadow"])))
    pen.line(flat(fold), _rgb(skin * 0.68), thick(0.035), joint="curve")
    # the eye, cut out by the lids
    if openness > 0:
        ball = Image.new("RGB", (width, height), (236, 232, 228))
        brush = ImageDraw.Draw(ball)
        brush.polygon(flat([(-1.1, -0.3), (-0.80, -0.1), (-0.80, 0.2), (-1.1, 0.3)]), (214, 150, 140))
        x, y = place([(eye["gaze_x"], eye["gaze_y"] + 0.10 - 0.15 * (1 - openness))])[0]
        radius, colour = eye["iris"] * unit, _EYES[min(int(eye["eye_colour"] * len(_EYES)), len(_EYES) - 1)]
        for size, fill in ((1.0, tuple(c // 2 for c in colour)), (0.86, colour), (eye["pupil"], (12, 10, 10))):
            r = radius * size
            brush.ellipse((x - r, y - r, x + r, y + r), fill)
        r, x, y = 0.085 * unit, x + eye["spot_x"] * unit, y - 0.14 * unit  # a window's reflection
        brush.rectangle((x - r, y - r, x + r, y + r), (250, 250, 250))
        shade = flat(np.concatenate([upper, upper[::-1] - np.array([0, 0.07])]))
        brush.polygon(shade, (150, 140, 136))
        mask = Image.new("L", (width, height), 0)
        ImageDraw.Draw(mask).polygon(flat(np.concatenate([upper, lower[::-1]])), 255)
        canvas.paste(ball, (0, 0), mask)
    ink = _rgb(skin * 0.22)
    pen.line(flat(lower), _rgb(skin * 0.62), thick(0.03))
    pen.line(flat(upper), ink, thick(eye["line"]), joint="curve")
    # single lashes, hanging from shut lids and standing up from open ones
    t = np.linspace(0.12, 0.95, round(eye["lashes"]))
    lean = np.stack([0.8 * (t - 0.4), np.full(len(t), np.tanh(4 * (openness - 0.25)))], axis=1)
    roots = upper[np.round(t * 24).astype(int)]
    for lash in place(np.concatenate([roots, roots + eye["lash_length"] * lean], axis=1).reshape(-1, 2)).reshape(-1, 4):
        pen.line(lash.tolist(), ink, thick(0.025))
    if eye["brow_draw"] < 0.85:
        arch = [(-1.0, 0.02), (-0.4, 0.6), (0.3, 1.0), (0.9, 0.5), (1.25, 0.0)]
        brow = [(x, eye["brow_height"] + eye["brow_arch"] * y) for x, y in arch]
        pen.line(flat(brow), _rgb(skin * 0.30), thick(eye["brow_thickness"]), joint="curve")
    if eye["glasses_draw"] < 0.25:
        x, y = origin
        w, h = eye["glasses_width"] * unit, eye["glasses_height"] * unit
        tone = (int(eye["glasses_tone"]),) * 3
        pen.rounded_rectangle((x - w, y - h, x + w, y + h), 0.3 * h, None, tone, thick(eye["glasses_line"]))
        pen.line((0, y - 0.2 * h, x - w, y - 0.2 * h), tone, thick(eye["glasses_line"]))
    small = canvas.reduce(_SUPERSAMPLING)
    if eye["blur"] > 0.3:
        small = small.filter(ImageFilter.GaussianBlur(eye["blur"] * image_size[1] / 48))
    marks = place(np.where((np.arange(8) < 4)[:, None] | (np.arange(8) == 6)[:, None], upper[_MARKS], lower[_MARKS]))
    return _photographed(small, marks / _SUPERSAMPLING, eye, draw, is_hard)


def _skin(eye: dict[str, float]) -> np.ndarray:
    place = eye["skin"] * (len(_SKINS) - 1)
    first = min(int(place), len(_SKINS) - 2)
    tone = _SKINS[first] + (place - first) * (_SKINS[first + 1] - _SKINS[first])
    return tone * np.array([1 + eye["skin_warmth"], 1, 1 - eye["skin_warmth"]])


def _rgb(colour: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = np.clip(colour, 0, 255).astype(int).tolist()
    return red, green, blue


def _photographed(
    small: Image.Image, marks: np.ndarray, eye: dict[str, float], draw: np.random.Generator, is_hard: bool
) -> tuple[np.ndarray, np.ndarray]:
    width, height = small.size
    if is_hard:
        coarse = (max(2, round(width * 18 / 48)), max(2, round(height * 12 / 32)))
        small = small.resize(coarse, Image.Resampling.BOX).resize((width, height), Image.Resampling.BILINEAR)
    slope = 1 + eye["gradient"] * np.linspace(-1, 1, width, dtype=np.float32)[None, :, None]
    pixels: np.ndarray = np.asarray(small, np.float32) * (eye["gain"] * slope)
    noise: np.ndarray = eye["noise"] * draw.standard_normal(pixels.shape, dtype=np.float32)
    if is_hard or eye["grey_draw"] < 0.2:
        pixels = pixels @ np.array([[0.299], [0.587], [0.114]], np.float32)
        noise = noise[..., :1]
    pixels = np.repeat(pixels + noise, 3 // pixels.shape[2], axis=2)
    if is_hard:
        pixels = 255 * (np.clip(pixels, 0, 255) / 255) ** 0.45
        down = round(height * 3 / 32)
        pixels = np.concatenate([pixels[down:0:-1], pixels[:-down]])
        marks = marks + np.array([0, down])
        pixels += 20 * (2 * draw.random(pixels.shape[:2], dtype=np.float32)[..., None] - 1)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8), marks.astype(np.float32)


__all__ = ["lids", "render"]
