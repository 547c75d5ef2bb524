"""What distinguishes one picture of an eye from another, drawn at random: the person, and how the picture was taken.

Sample ``i`` of a seed depends on ``(seed, i)`` alone, so it is the same in every batch, worker and order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import DataError
from .geometry import Traits

# Of a person: ranges of uniform draws. Lengths are in half eye widths.
IDENTITY = {
    "upper_height": (0.30, 0.62),
    "lower_height": (0.10, 0.26),
    "closing": (0.55, 1.0),
    "skew": (-0.25, 0.25),
    "roundness": (1.6, 2.6),
    "tilt": (-0.12, 0.16),
    "iris_radius": (0.34, 0.44),
    "iris_height": (0.02, 0.12),  # of its middle above the corners, gaze ahead
    "pupil": (0.25, 0.6),
    "crease_height": (0.06, 0.22),
    "crease_strength": (0.0, 0.35),
    "melanin": (0.0, 1.0),
    "iris_choice": (0.0, 1.0),
    "iris_jitter_red": (0.85, 1.15),
    "iris_jitter_green": (0.85, 1.15),
    "iris_jitter_blue": (0.85, 1.15),
    "iris_streaks": (9.0, 23.0),
    "skin_jitter_red": (0.92, 1.08),
    "skin_jitter_green": (0.92, 1.08),
    "skin_jitter_blue": (0.92, 1.08),
    "sclera_jitter": (0.62, 1.03),
    "sclera_red": (0.0, 0.10),
    "lash_length": (0.03, 0.16),
    "lash_frequency": (18.0, 40.0),
    "lash_strength": (0.25, 0.9),
    "line_offset": (-0.01, 0.035),  # of the line of the lashes' roots above the lid's edge
    "line_width": (0.028, 0.06),
    "socket": (0.05, 0.35),
    "bag": (0.0, 0.22),
    "brow_height": (0.62, 1.15),
    "brow_strength": (0.2, 0.85),
    "brow_arch": (0.0, 0.25),
    "fold_draw": (0.0, 1.0),
    "makeup_draw": (0.0, 1.0),
    "makeup_strength": (0.2, 0.7),
    "hair_grey": (0.0, 1.0),
}
# Of a picture.
VIEW = {
    "rotation": (-0.25, 0.25),
    "scale": (0.55, 0.92),  # half the eye's width over half the picture's
    "stretch": (0.85, 1.12),
    "shift_x": (-0.12, 0.12),
    "shift_y": (-0.10, 0.10),
    "yaw": (-0.5, 0.5),
    "gaze_x": (-0.42, 0.42),
    "gaze_y": (-0.16, 0.14),
    "look_down_draw": (0.0, 1.0),
    "look_down": (0.16, 0.42),
    "light_angle": (0.0, 2 * np.pi),
    "gain": (0.45, 1.3),
    "gradient": (0.0, 0.5),
    "lid_shadow": (0.1, 0.5),  # that the upper lid throws on the ball
    "cast_red": (0.92, 1.08),
    "cast_blue": (0.90, 1.10),
    "grey_draw": (0.0, 1.0),
    "near_infrared": (0.0, 1.0),
    "glasses_draw": (0.0, 1.0),
    "glasses_width": (1.15, 1.5),
    "glasses_height": (0.75, 1.1),
    "glasses_thickness": (0.03, 0.09),
    "glasses_tone": (0.0, 0.5),
    "glare_draw": (0.0, 1.0),
    "glare": (0.1, 0.4),
    "glare_place": (-0.8, 0.8),
    "strand_draw": (0.0, 1.0),
    "strand_place": (-1.3, 1.3),
    "strand_slope": (-0.7, 0.7),
    "blur_draw": (0.0, 1.0),
    "gamma": (0.8, 1.25),
    "noise": (0.0, 0.05),
}
BLURS = (0.0, 0.6, 1.0, 1.6)  # standard deviations in pixels at a width of 48
SHARES = {"grey": 0.2, "glasses": 0.25, "glare": 0.4, "strand": 0.06, "fold": 0.25, "makeup": 0.15, "look_down": 0.15}
EXACTLY_CLOSED, EXACTLY_OPEN = 0.15, 0.10

# Irises: dark brown, brown, hazel, green, blue. Light ones are rare with dark skin.
IRISES = np.array(
    [[0.16, 0.10, 0.07], [0.33, 0.20, 0.11], [0.44, 0.34, 0.18], [0.36, 0.44, 0.32], [0.36, 0.50, 0.62]], np.float32
)
LIGHT_SKIN, DARK_SKIN = np.array([0.93, 0.78, 0.68], np.float32), np.array([0.30, 0.19, 0.14], np.float32)


def check_seed(seed: int) -> None:
    """Refuse what is no seed, with a DataError."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise DataError(f"seed={seed!r} is not possible; give an integer, 0 or more.")


def generators(seed: int, indices: Sequence[int] | np.ndarray) -> list[np.random.Generator]:
    """One independent generator per sample."""
    return [np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, int(i))))) for i in indices]


def sample_openness(
    uniform: np.ndarray, exactly_closed: float = EXACTLY_CLOSED, exactly_open: float = EXACTLY_OPEN
) -> np.ndarray:
    """Uniform draws in 0..1 to labels: a share of exact zeros and ones, the rest uniform between."""
    middle = (uniform - exactly_closed) / max(1 - exactly_closed - exactly_open, 1e-9)
    return np.clip(middle, 0, 1).astype(np.float32)


def identity(uniform: np.ndarray) -> Traits:
    """A person per row.

    Args:
        uniform: [samples, len(IDENTITY)] in 0..1.
    """
    traits = _scaled(IDENTITY, uniform)
    traits["fold"] = np.where(traits["fold_draw"] < SHARES["fold"], 0.85, 0.0).astype(np.float32)
    traits["makeup"] = np.where(traits["makeup_draw"] < SHARES["makeup"], traits["makeup_strength"], 0)
    melanin = traits["melanin"][:, None]
    skin = LIGHT_SKIN ** (1 - melanin) * DARK_SKIN**melanin
    traits["skin"] = skin * np.stack([traits[f"skin_jitter_{c}"] for c in ("red", "green", "blue")], 1)
    light = 1 - 0.75 * np.clip(traits["melanin"] * 1.6 - 0.3, 0, 1)
    chosen = np.minimum((traits["iris_choice"] * light * len(IRISES)).astype(int), len(IRISES) - 1)
    traits["iris"] = IRISES[chosen] * np.stack([traits[f"iris_jitter_{c}"] for c in ("red", "green", "blue")], 1)
    grey = 0.35 * np.clip(traits["hair_grey"] * 4 - 3.2, 0, 1)[:, None]
    brown = np.array([0.24, 0.16, 0.11], np.float32) * (1 - 0.75 * melanin) * (1.6 - traits["hair_grey"][:, None])
    traits["hair"] = (brown + grey).astype(np.float32)
    return traits


def view(uniform: np.ndarray) -> Traits:
    """A picture per row.

    Args:
        uniform: [samples, len(VIEW)] in 0..1.
    """
    traits = _scaled(VIEW, uniform)
    for name in ("grey", "glasses", "strand"):
        traits[name] = traits[f"{name}_draw"] < SHARES[name]
    traits["glare"] = np.where(traits["glasses"] & (traits["glare_draw"] < SHARES["glare"]), traits["glare"], 0)
    traits["gaze_y"] = np.where(traits["look_down_draw"] < SHARES["look_down"], -traits["look_down"], traits["gaze_y"])
    # most faces look about ahead: the cube keeps the range and thins out its ends
    traits["yaw"] = traits["yaw"] ** 3 / VIEW["yaw"][1] ** 2
    levels = np.array(BLURS, np.float32)
    traits["blur"] = levels[np.minimum((traits["blur_draw"] * len(levels)).astype(int), len(levels) - 1)]
    return traits


def eyes(uniform: np.ndarray) -> Traits:
    """A person and a picture per row.

    Args:
        uniform: [samples, len(IDENTITY) + len(VIEW)] in 0..1.
    """
    found = {**identity(uniform[:, : len(IDENTITY)]), **view(uniform[:, len(IDENTITY) :])}
    found["gain"] = np.minimum(found["gain"], 1.0 / found["skin"].max(1))  # a camera does not let light skin burn out
    return found


def neutral_view(count: int) -> Traits:
    """A plain picture: straight, ahead, evenly lit, sharp, nothing in front of the eye."""
    middle = view(np.full((count, len(VIEW)), 0.5, np.float32))
    plain = {name: 0.0 for name in ("rotation", "shift_x", "shift_y", "yaw", "gaze_x", "gaze_y", "gradient", "noise")}
    plain |= {"blur": 0.0, "glare": 0.0, "scale": 0.74, "stretch": 1.0}
    plain |= {"gain": 1.0, "gamma": 1.0, "cast_red": 1.0, "cast_blue": 1.0}
    return {**middle, **{name: np.full(count, value, np.float32) for name, value in plain.items()}}


def _scaled(ranges: dict[str, tuple[float, float]], uniform: np.ndarray) -> Traits:
    if uniform.shape[1] != len(ranges):
        raise DataError(f"{uniform.shape[1]} draws do not make {len(ranges)} traits; give one for each.")
    return {
        name: (low + (high - low) * uniform[:, column]).astype(np.float32)
        for column, (name, (low, high)) in enumerate(ranges.items())
    }


__all__ = [
    "BLURS",
    "EXACTLY_CLOSED",
    "EXACTLY_OPEN",
    "IDENTITY",
    "VIEW",
    "check_seed",
    "eyes",
    "generators",
    "identity",
    "neutral_view",
    "sample_openness",
    "view",
]
