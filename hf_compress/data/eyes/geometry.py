"""The shape of an eye: two lid curves between fixed corners, whose aperture is exactly linear in the openness.

Coordinates: ``u`` runs along the eye from the inner corner (-1) to the outer one (1), ``v`` points up, and half the width
of the eye is the unit. Pictures show a left eye: the nose is at their left. Openness 0 means that the lids touch, 1 that
they are as far apart as this person can hold them; a relaxed open eye is at about 0.8.

The curves are a design of this package, made for the setting of "Weakly-Supervised Degree of Eye-Closeness Estimation"
(Mequanint et al. 2019, arXiv 1910.10845), whose own renderer is not public.
"""

from __future__ import annotations

import numpy as np

Traits = dict[str, np.ndarray]

GAZE_COUPLING = 0.25  # how far the upper lid follows a downward gaze, per unit of gaze
LANDMARK_POSITIONS = np.array([-1.0, -1 / 3, 1 / 3, 1.0, 1 / 3, -1 / 3, 0.0, 0.0])


def expanded(values: np.ndarray, ndim: int) -> np.ndarray:
    """Values of shape [samples] with axes of size 1 behind, so that they meet an array of ``ndim`` dimensions."""
    return values.reshape(values.shape + (1,) * (ndim - values.ndim))


def open_lids(u: np.ndarray, traits: Traits) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower lid of the eye held wide open, gaze ahead.

    Args:
        u: [samples, ...].
        traits: ``upper_height``, ``lower_height``, ``skew``, ``roundness`` and ``fold``, [samples] each.
    """
    upper_height, lower_height, skew, roundness, fold = (
        expanded(traits[name], u.ndim) for name in ("upper_height", "lower_height", "skew", "roundness", "fold")
    )
    rest = 1 - u * u
    place = np.abs(np.clip(u + skew * rest, -1, 1))
    upper = upper_height * (1 - place**roundness)
    # an epicanthic fold lowers the upper lid at the inner corner
    upper = upper * (1 - fold * np.exp(-(((u + 1) / 0.4) ** 2)))
    lower = -lower_height * np.maximum(rest, 0)
    return upper, lower


def reachable(traits: Traits) -> np.ndarray:
    """The largest openness that the gaze allows, [samples]: the upper lid follows a gaze that is lowered."""
    zero = np.zeros((len(traits["upper_height"]), 1), dtype=traits["upper_height"].dtype)
    upper, lower = open_lids(zero, traits)
    lowered = GAZE_COUPLING * np.maximum(-traits["gaze_y"], 0) / (upper - lower)[:, 0]
    return 1 - np.minimum(lowered, 0.6)


def couple_gaze(traits: Traits, openness: np.ndarray) -> Traits:
    """The traits with the gaze raised where the lids are opened wider than a gaze so low allows."""
    zero = np.zeros((len(openness), 1), dtype=traits["upper_height"].dtype)
    upper, lower = open_lids(zero, traits)
    lowest = -(1 - openness) * (upper - lower)[:, 0] / GAZE_COUPLING
    return {**traits, "gaze_y": np.maximum(traits["gaze_y"], lowest.astype(traits["gaze_y"].dtype))}


def lid_curves(u: np.ndarray, openness: np.ndarray, traits: Traits) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower lid at some openness; their distance is ``openness`` times that of :func:`open_lids`, at every u.

    Both lids meet on a closing line near the lower lid. A lowered gaze takes the upper lid down with it; the openness
    stays relative to the gaze ahead.

    Args:
        u: [samples, ...].
        openness: [samples], in 0..1, at most :func:`reachable`.
        traits: those of :func:`open_lids`, ``closing`` (1: only the upper lid moves) and ``gaze_y``.
    """
    return moved_lids(*open_lids(u, traits), openness, traits)


def moved_lids(
    upper: np.ndarray, lower: np.ndarray, openness: np.ndarray, traits: Traits
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`lid_curves` of wide open lids that are known."""
    reach = reachable(traits)
    effort = expanded(openness / reach, upper.ndim)
    closing, share = expanded(traits["closing"], upper.ndim), expanded(reach, upper.ndim)
    raised = lower + share * (upper - lower)
    line = closing * lower + 0.15 * (1 - closing) * raised
    return line + effort * (raised - line), line - effort * (line - lower)


def landmarks(openness: np.ndarray, traits: Traits) -> np.ndarray:
    """Points on the lids in eye coordinates, [samples, 8, 2].

    The first six are those of the eye aspect ratio: inner corner, upper lid at a third and two thirds, outer corner,
    lower lid at two thirds and a third. Then the middle of the upper and of the lower lid.
    """
    u = np.broadcast_to(LANDMARK_POSITIONS.astype(traits["upper_height"].dtype), (len(openness), 8))
    upper, lower = lid_curves(u, openness, traits)
    is_upper = np.array([True, True, True, True, False, False, True, False])
    return np.stack([u, np.where(is_upper, upper, lower)], axis=-1)


def to_pixels(points: np.ndarray, traits: Traits, image_size: tuple[int, int]) -> np.ndarray:
    """Eye coordinates to pixels (x to the right, y down; 0 is the outer edge of the first pixel).

    Args:
        points: [samples, points, 2].
        traits: ``tilt``, ``scale``, ``stretch``, ``yaw``, ``shift_x``, ``shift_y`` and ``rotation``, [samples] each.
        image_size: height and width.
    """
    height, width = image_size
    tilt, scale, stretch, yaw, shift_x, shift_y, angle = (
        traits[name][:, None] for name in ("tilt", "scale", "stretch", "yaw", "shift_x", "shift_y", "rotation")
    )
    u, v = points[..., 0], points[..., 1]
    x = u * scale * np.cos(yaw) + shift_x
    y = (v + tilt * u / 2) * scale * stretch + shift_y
    cos, sin = np.cos(angle), np.sin(angle)
    turned = np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)
    return turned * (width / 2) * np.array([1, -1]) + np.array([width / 2, height / 2])


def from_pixels(traits: Traits, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Eye coordinates u and v of every pixel's centre, [samples, height, width] each; undoes :func:`to_pixels`."""
    height, width = image_size
    tilt, scale, stretch, yaw, shift_x, shift_y, angle = (
        traits[name][:, None, None] for name in ("tilt", "scale", "stretch", "yaw", "shift_x", "shift_y", "rotation")
    )
    kind = tilt.dtype
    x = ((np.arange(width, dtype=kind) + 0.5) * 2 / width - 1)[None, None, :]
    y = ((height - 2 * np.arange(height, dtype=kind) - 1) / width)[None, :, None]
    cos, sin = np.cos(angle), np.sin(angle)
    width_scale, height_scale = scale * np.cos(yaw), scale * stretch
    u = (cos * x - shift_x) / width_scale + sin / width_scale * y
    v = (-sin * x - shift_y) / height_scale + cos / height_scale * y
    return u, v - tilt / 2 * u


def eye_aspect_ratio(points: np.ndarray) -> np.ndarray:
    """Mean of two lid distances over the distance of the corners (Soukupova and Cech 2016).

    Args:
        points: [..., 6 or more, 2], in the order of :func:`landmarks`.

    Returns:
        [...]. It grows with the openness, but by a factor that differs from person to person.
    """
    points = np.asarray(points)
    first = np.linalg.norm(points[..., 1, :] - points[..., 5, :], axis=-1)
    second = np.linalg.norm(points[..., 2, :] - points[..., 4, :], axis=-1)
    return (first + second) / (2 * np.linalg.norm(points[..., 0, :] - points[..., 3, :], axis=-1))


def aperture_ratio(points: np.ndarray) -> np.ndarray:
    """Distance of the lids in the middle of the eye over that of the corners, as seen; from :func:`landmarks`."""
    points = np.asarray(points)
    aperture = np.linalg.norm(points[..., 6, :] - points[..., 7, :], axis=-1)
    return aperture / np.linalg.norm(points[..., 0, :] - points[..., 3, :], axis=-1)


__all__ = [
    "GAZE_COUPLING",
    "Traits",
    "aperture_ratio",
    "couple_gaze",
    "expanded",
    "eye_aspect_ratio",
    "from_pixels",
    "landmarks",
    "lid_curves",
    "moved_lids",
    "open_lids",
    "reachable",
    "to_pixels",
]
