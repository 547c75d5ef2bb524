"""Renderer "a": eyes shaded pixel by pixel, many at a time, with numpy alone.

Every layer (skin, lid crease, eyeball, lashes, brow, glasses, light, camera) is a closed formula of the eye coordinates, so
a batch is a few hundred array operations. A design of this package; see :mod:`.geometry` for what it stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .geometry import Traits, from_pixels, moved_lids, open_lids
from .traits import BLURS

_PIXEL = np.float32


def shade(
    traits: Traits, openness: np.ndarray, generators: Sequence[np.random.Generator], image_size: tuple[int, int]
) -> np.ndarray:
    """Pictures, uint8 [samples, height, width, 3].

    Args:
        traits: of :func:`~.traits.identity` and :func:`~.traits.view`, [samples, ...] each.
        openness: float32 [samples], in 0..1, no more than the gaze allows; see :func:`~.geometry.couple_gaze`.
        generators: one per sample, for the textures and the noise.
        image_size: height and width in pixels.
    """
    u, v = from_pixels(traits, image_size)
    upper_open, lower_open = open_lids(u, traits)
    upper, lower = moved_lids(upper_open, lower_open, openness, traits)
    within = (1 - np.minimum(u * u, 1)).astype(_PIXEL)
    eye = _Eye(traits, _wide(openness), u, v, upper, lower, upper_open, within, image_size)
    blotches, noise = _textures(generators, image_size)
    image = _skin(eye, blotches, noise[:, 0])
    _blend(image, coverage(v, upper, lower, traits, image_size[1]), _eyeball(eye))
    _lid_margins(image, eye)
    _brow(image, eye)
    _nose(image, eye)
    _strands(image, eye)
    _glasses(image, eye)
    return _camera(image, eye, noise)


@dataclass(frozen=True)
class _Eye:
    """What the layers share: maps of the pixels, [samples, height, width] each.

    Attributes:
        traits: [samples, ...] each.
        openness: [samples, 1, 1].
        u, v: eye coordinates.
        upper, lower: where the lids are, in v.
        upper_open: where the upper lid is when the eye is held wide open.
        within: 1 in the middle of the eye, 0 from its corners on.
        image_size: height and width.
    """

    traits: Traits
    openness: np.ndarray
    u: np.ndarray
    v: np.ndarray
    upper: np.ndarray
    lower: np.ndarray
    upper_open: np.ndarray
    within: np.ndarray
    image_size: tuple[int, int]


def coverage(v: np.ndarray, upper: np.ndarray, lower: np.ndarray, traits: Traits, width: int) -> np.ndarray:
    """The share of every pixel that shows the eyeball, [samples, height, width].

    A difference of two soft steps: its sum over a column is the aperture there, whatever the softness, and closed lids
    show nothing.
    """
    sharpness = (1.7 / 1.5 * width) * _wide(traits["scale"])
    return _step(sharpness * (upper - v)) - _step(sharpness * (lower - v))


def _wide(values: np.ndarray) -> np.ndarray:
    return values[:, None, None].astype(_PIXEL)


def _step(x: np.ndarray) -> np.ndarray:
    """The logistic function."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def _bump(x: np.ndarray, width: float | np.ndarray) -> np.ndarray:
    return np.exp(-((x * (1 / width)) ** 2))


def _colour(values: np.ndarray) -> np.ndarray:
    """Colours [samples, 3] to meet pictures [samples, 3, height, width]."""
    return values[:, :, None, None].astype(_PIXEL)


def _blend(image: np.ndarray, share: np.ndarray, top: np.ndarray) -> None:
    image += share[:, None] * (top - image)


def _interpolation(coarse: int, fine: int) -> np.ndarray:
    """Linear interpolation of ``coarse`` knots to ``fine`` places, as a matrix [fine, coarse]."""
    places = np.linspace(0, coarse - 1, fine)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(coarse))).astype(_PIXEL)


def _textures(generators: Sequence[np.random.Generator], image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Blotches of the skin, about -0.1..0.1, and noise of standard deviation 1 [samples, 3, height, width]."""
    height, width = image_size
    grid = np.stack([draw.standard_normal((4, 6), dtype=_PIXEL) for draw in generators])
    noise = np.stack([draw.standard_normal((3, height, width), dtype=_PIXEL) for draw in generators])
    blotches = _interpolation(4, height) @ grid @ _interpolation(6, width).T
    return blotches * 0.06, noise


def _skin(eye: _Eye, blotches: np.ndarray, grain: np.ndarray) -> np.ndarray:
    traits, u, v, within, opened = eye.traits, eye.u, eye.v, eye.within, eye.openness
    tone = 1 + blotches + 0.02 * grain
    # the hollow beside the nose, and the one below the brow
    tone -= _wide(traits["socket"]) * np.exp(-(((u + 1.15) / 0.55) ** 2) - ((v - 0.30) / 0.5) ** 2)
    tone -= (0.5 * _wide(traits["socket"])) * within * _bump(v - _wide(traits["brow_height"]) + 0.28, 0.20)
    # the lid is a part of the ball: brightest where it bulges, darker towards its crease
    crease = eye.upper_open + _wide(traits["crease_height"]) * (0.6 + 0.4 * within) + 0.05 * (1 - opened)
    on_lid = _step(14 * (v - eye.upper)) * _step(14 * (crease - v))
    tone += 0.12 * on_lid * within * (1 - opened)
    strength = _wide(traits["crease_strength"]) * (0.45 + 0.55 * opened)
    tone -= strength * _bump(v - crease, 0.05) * _step(9 * (1.12 - np.abs(u)))
    # lower lid: a bag with a line beneath it
    below = v + _wide(traits["lower_height"]) * (0.4 + 0.6 * within) + 0.17
    tone -= _wide(traits["bag"]) * _bump(below, 0.07) * _step(7 * (1.05 - np.abs(u)))
    tone += (0.4 * _wide(traits["bag"])) * _bump(below - 0.12, 0.07) * within
    image = np.clip(tone, 0.05, None)[:, None] * _colour(traits["skin"])
    if traits["makeup"].any():
        painted = traits["makeup"] > 0
        share = _wide(traits["makeup"][painted]) * on_lid[painted]
        shadow = np.stack([traits["iris_choice"], 0.3 * traits["hair_grey"], traits["lash_length"] * 4], 1)[painted]
        part = image[painted]
        _blend(part, share, 0.75 * _colour(shadow) * 0.6 + 0.05)
        image[painted] = part
    # thin skin round the lids is redder
    image[:, 1:] *= (1 - 0.07 * _bump(v - 0.5 * (eye.upper + eye.lower), 0.35) * within)[:, None]
    return image


def _eyeball(eye: _Eye) -> np.ndarray:
    traits, u, v = eye.traits, eye.u, eye.v
    # the ball is rounder than the lids: its front moves when the head turns
    shift = 0.22 * _wide(np.sin(traits["yaw"]))
    dx = (u - np.clip(_wide(traits["gaze_x"]) + shift, -0.5, 0.5)) * (1 + 0.10 * _wide(np.abs(traits["gaze_x"])))
    dy = v - _wide(traits["gaze_y"] + traits["iris_height"])
    radius = _wide(traits["iris_radius"])
    distance = np.sqrt(dx * dx + dy * dy)
    share = distance / radius
    shadow = (1 - 0.30 * u * u) * (1 - _wide(traits["lid_shadow"]) * np.exp(np.minimum((v - eye.upper) / 0.12, 0)))
    red = _wide(traits["sclera_red"]) * (0.4 + u * u)
    white = np.stack([np.full_like(red, 0.90), 0.87 - red, 0.84 - 1.1 * red], 1) * _colour(
        np.repeat(traits["sclera_jitter"][:, None], 3, 1)
    )
    # the caruncle, in the inner corner
    caruncle = _bump(u + 0.93, 0.11)
    _blend(white, 0.75 * caruncle, _colour(np.array([[0.72, 0.40, 0.36]]) * (1 - 0.45 * traits["melanin"][:, None])))
    # iris: dark rim, streaks, lighter around the pupil and opposite of the light
    angle = np.arctan2(dy, dx)
    tone = 1.12 - 0.75 * np.minimum(share, 1.1) ** 4
    tone += 0.10 * np.cos(_wide(np.round(traits["iris_streaks"])) * angle)
    tone += 0.22 * np.minimum(share, 1) * np.cos(angle - _wide(traits["light_angle"]) - np.pi)
    pupil = _step((distance - radius * _wide(traits["pupil"])) * 40)
    iris = (tone * (0.06 + 0.94 * pupil))[:, None] * _colour(traits["iris"])
    _blend(white, _step((radius - distance) * 34), iris)
    white *= shadow[:, None]
    # reflections of the light: one on the cornea, and the wet rim of the lower lid
    lit = traits["light_angle"]
    sx, sy = dx - 0.16 * _wide(np.cos(lit)), dy - 0.06 - 0.10 * _wide(np.abs(np.sin(lit)))
    spot = np.exp(-(sx * sx + sy * sy) / 0.004) + 0.25 * _bump(v - eye.lower - 0.03, 0.03) * (u * u < 0.7)
    white += 0.85 * spot[:, None] * (1 - white)
    return white


def _lid_margins(image: np.ndarray, eye: _Eye) -> None:
    traits, u, v, upper, lower = eye.traits, eye.u, eye.v, eye.upper, eye.lower
    inside = _step(20 * (1.02 - np.abs(u)))
    # the lower rim: a thin lighter, redder edge
    rim = 0.45 * _bump(v - lower + 0.025, 0.035) * inside * np.minimum(eye.openness * 4, 1)
    image[:, 0] += 0.10 * rim
    image[:, 1:] *= (1 - 0.12 * rim)[:, None]
    strength = _wide(traits["lash_strength"])
    # lashes grow from the outer side of the lid's edge, so the line hides little of the ball
    softness = np.maximum(_wide(traits["line_width"]), 1.2 / (eye.image_size[1] * _wide(traits["scale"])))
    line = (0.35 + 0.55 * strength) * _bump(v - upper - _wide(traits["line_offset"]), softness) * inside
    # Lashes turn with the lid: up when it is open, down when it is shut. Between, they point at the viewer and look short.
    # The turn is smooth, so that it marks no openness by itself.
    turn = np.tanh((eye.openness - 0.25) / 0.1)
    along = v - upper
    length = _wide(traits["lash_length"]) * (0.55 + 0.45 * np.clip((u + 1) / 1.2, 0, 1))  # longer at the outer side
    fade = np.exp(-np.abs(along) / (length * np.maximum(np.abs(turn), 0.35))) * _step(90 * along * turn)
    comb = 0.5 + 0.5 * np.cos(_wide(traits["lash_frequency"]) * u * (1 + 0.5 * np.abs(along)))
    strokes = strength * fade * comb * comb * inside
    under = 0.18 * strength * np.exp(-np.maximum(lower - v, 0) / 0.06) * (v < lower) * comb * inside * eye.within
    dark = np.maximum(np.maximum(line, strokes), under)
    _blend(image, np.minimum(dark, 0.95), _colour(0.25 * traits["hair"] + 0.02))


def _brow(image: np.ndarray, eye: _Eye) -> None:
    traits, u, v = eye.traits, eye.u, eye.v
    middle = _wide(traits["brow_height"]) + _wide(traits["brow_arch"]) * (1 - (u - 0.25) ** 2)
    ends = _step(8 * (1.35 - np.abs(u - 0.05)))
    thick = 0.13 + 0.05 * np.clip(-u, -1, 1)
    hairs = 0.85 + 0.15 * np.cos(34 * (u - 0.9 * v))
    share = _wide(traits["brow_strength"]) * _bump(v - middle, thick) * ends * hairs
    _blend(image, share, _colour(0.6 * traits["hair"] + 0.02))


def _nose(image: np.ndarray, eye: _Eye) -> None:
    """The bridge of the nose hides the inner corner when the head is turned away from this eye."""
    traits, u, v = eye.traits, eye.u, eye.v
    turned = np.flatnonzero(traits["yaw"] > 0.12)
    if not len(turned):
        return
    edge = -1.75 + 1.6 * _wide(traits["yaw"][turned]) + 0.25 * v[turned]
    behind = _step(12 * (edge - u[turned]))
    lit = 0.92 + 0.10 * np.clip((edge - u[turned]) * 2, 0, 1) - 0.25 * _bump(u[turned] - edge - 0.05, 0.09)
    part = image[turned]
    _blend(
        part, np.maximum(behind, 0.5 * _bump(u[turned] - edge, 0.10)), lit[:, None] * _colour(traits["skin"][turned])
    )
    image[turned] = part


def _strands(image: np.ndarray, eye: _Eye) -> None:
    traits, u, v = eye.traits, eye.u, eye.v
    chosen = np.flatnonzero(traits["strand"])
    if not len(chosen):
        return
    part, along = image[chosen], u[chosen] - _wide(traits["strand_slope"][chosen]) * v[chosen]
    for offset, share in ((0.0, 0.75), (0.13, 0.5), (-0.21, 0.4)):
        line = along - _wide(traits["strand_place"][chosen]) - offset - 0.05 * np.sin(3 * v[chosen] + 9 * offset)
        _blend(part, share * _bump(line, 0.035), _colour(traits["hair"][chosen]))
    image[chosen] = part


def _glasses(image: np.ndarray, eye: _Eye) -> None:
    traits, u, v = eye.traits, eye.u, eye.v
    chosen = np.flatnonzero(traits["glasses"])
    if not len(chosen):
        return
    worn = {name: _wide(traits[name][chosen]) for name in traits if name.startswith("gla")}
    x, y, part = u[chosen], v[chosen], image[chosen]
    size = (np.abs(x / worn["glasses_width"]) ** 3 + np.abs(y / worn["glasses_height"]) ** 3) ** (1 / 3)
    ring = _step((worn["glasses_thickness"] - np.abs(size - 1)) * 45)
    inside = _step(25 * (1 - size))
    shaded = 1 - 0.30 * _bump(size - 1.1, 0.12) * (y < 0)  # the frame's shadow on the cheek
    part *= shaded[:, None]
    streak = worn["glare"] * _bump(x + 0.6 * y - worn["glare_place"], 0.16) * inside
    part += streak[:, None] * (1 - part)
    bridge = _step((0.07 - np.abs(y - 0.15)) * 40) * (x < -worn["glasses_width"])
    _blend(part, 0.92 * np.maximum(ring, bridge), worn["glasses_tone"][:, None] * np.ones((1, 3, 1, 1), _PIXEL))
    image[chosen] = part


def _blur_matrix(size: int, deviation: float) -> np.ndarray:
    """Gaussian smoothing along an axis, [size, size], rows sum to 1."""
    distance = np.arange(size)[:, None] - np.arange(size)
    weights = np.exp(-0.5 * (distance / deviation) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(_PIXEL)


def _camera(image: np.ndarray, eye: _Eye, noise: np.ndarray) -> np.ndarray:
    traits, (height, width) = eye.traits, eye.image_size
    x = np.linspace(-1, 1, width, dtype=_PIXEL)[None, None, :]
    y = np.linspace(1, -1, height, dtype=_PIXEL)[None, :, None]
    lit = _wide(np.cos(traits["light_angle"])) * x + _wide(np.sin(traits["light_angle"])) * y
    light = _wide(traits["gain"]) * (1 + _wide(traits["gradient"]) * 0.5 * lit)
    cast = np.stack([traits["cast_red"], np.ones_like(traits["cast_red"]), traits["cast_blue"]], 1)
    image *= light[:, None] * _colour(cast)
    grey = np.flatnonzero(traits["grey"])
    if len(grey):
        # near infrared: melanin absorbs little of it, so the red channel is the nearest that there is
        infrared = traits["near_infrared"][grey][:, None]
        weights = (1 - infrared) * np.array([0.299, 0.587, 0.114]) + infrared * np.array([0.85, 0.10, 0.05])
        image[grey] = (image[grey] * _colour(weights)).sum(1, keepdims=True)
    for level in BLURS[1:]:
        chosen = np.flatnonzero(traits["blur"] == _PIXEL(level))
        if len(chosen):
            deviation = level * width / 48
            image[chosen] = _blur_matrix(height, deviation) @ image[chosen] @ _blur_matrix(width, deviation).T
    np.clip(image, 0, None, out=image)
    image **= traits["gamma"][:, None, None, None]
    # The lid line has to stand out of the noise: three standard deviations at most of a quarter of the skin's brightness.
    bright = (traits["gain"] * traits["skin"].mean(1)) ** traits["gamma"]
    deviation = np.minimum(traits["noise"], 0.25 * bright / 3)[:, None, None, None]
    image += deviation * np.where(traits["grey"][:, None, None, None], noise[:, :1], noise)
    np.clip(image * 255 + 0.5, 0, 255, out=image)
    return image.transpose(0, 2, 3, 1).astype(np.uint8)


__all__ = ["coverage", "shade"]
