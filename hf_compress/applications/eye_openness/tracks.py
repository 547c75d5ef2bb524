"""From a curve of eye openness to blinks, closures, winks and PERCLOS.

All functions are pure functions of arrays; a frame without a value is NaN and stays NaN. PERCLOS, the share of time with
eyes at least 80 % closed, is that of drowsiness research (Wierwille et al. 1994); normalisation, hysteresis and the kinds of
events are a design of this package. Nothing here is a medical or a safety device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ...errors import DataError

CLOSED_LEVEL = 0.2
"""A relative openness up to this counts as closed: 80 % of the way down (PERCLOS P80)."""


@dataclass(frozen=True)
class Normalisation:
    """How openness becomes relative to a person: 1 at the level of their open eyes, 0 at that of their closed ones.

    Levels are quantiles, never means, which blinking would pull down.

    Attributes:
        whole_clip: quantiles of all frames, for a recording that is there as a whole; else of the frames before each one, as
            a live camera has them.
        open_seconds, open_quantile: the open level is this quantile of the last so many seconds.
        closed_seconds, closed_quantile: the closed level likewise, but at most ``closed_most``.
        first_seconds: with less than that behind it, a frame takes the priors.
        open_prior, closed_most: levels of a person of whom nothing is known.
        least_range: levels nearer to each other than this are not believed, and the ones before are kept.
    """

    whole_clip: bool = False
    open_seconds: float = 20.0
    open_quantile: float = 0.9
    closed_seconds: float = 60.0
    closed_quantile: float = 0.02
    first_seconds: float = 2.0
    open_prior: float = 0.7
    closed_most: float = 0.2
    least_range: float = 0.25


@dataclass(frozen=True)
class EventRules:
    """What counts as an event; levels are relative openness, times are seconds.

    Attributes:
        enter, leave: an event begins below ``enter`` and ends above ``leave``.
        shortest: shorter ones are noise.
        longest_blink: a longer event is a closure.
        microsleep: a complete closure longer than this is a candidate for a microsleep.
        gap: so many frames without a value inside of an event are bridged.
        overlap: events of both eyes that share this part of the shorter one are one event.
    """

    enter: float = 0.6
    leave: float = 0.75
    shortest: float = 0.05
    longest_blink: float = 0.5
    microsleep: float = 1.0
    gap: int = 1
    overlap: float = 0.5


RUNNING, USUAL_RULES = Normalisation(), EventRules()


@dataclass(frozen=True)
class EyeEvent:
    """One time that eyes closed.

    Attributes:
        kind: ``blink``, ``long_closure`` or ``microsleep`` (a candidate: a complete closure above a second).
        eye: ``left``, ``right`` or ``both``.
        start_frame, end_frame: the first and the last frame.
        start, end, peak: seconds; the end is that of the last frame, the peak is where the eye is most closed.
        duration: seconds between the two thresholds, not from fully open to fully open.
        min_relative: smallest relative openness.
        amplitude: 1 - min_relative, the completeness of a blink.
        is_complete: whether min_relative is at most 0.2.
        closing_speed, opening_speed: relative openness per second, from the frame before the event to its peak and from there
            to the frame after it; NaN at the ends of a recording.
        is_wink: one eye closed while the other was seen and did not.
        is_cut: the recording, or what is known of it, begins or ends inside of the event.
    """

    kind: str
    eye: str
    start_frame: int
    end_frame: int
    start: float
    end: float
    peak: float
    duration: float
    min_relative: float
    amplitude: float
    is_complete: bool
    closing_speed: float
    opening_speed: float
    is_wink: bool = False
    is_cut: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings; NaN as None."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def smooth(openness: np.ndarray, width: int = 3) -> np.ndarray:
    """Median over ``width`` frames (of those that have a value); frames without a value stay without.

    Args:
        openness: [frames].
        width: odd.
    """
    track = _track(openness)
    if width < 1 or width % 2 == 0:
        raise DataError(f"a median over width={width} frames has no middle; give an odd number.")
    if width == 1 or not len(track):
        return track.copy()
    padded = np.concatenate([np.full(width // 2, np.nan), track, np.full(width // 2, np.nan)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    found = np.full(len(track), np.nan)
    known = np.isfinite(track)
    found[known] = np.nanmedian(windows[known], axis=1)
    return found


def levels(openness: np.ndarray, fps: float, how: Normalisation = RUNNING) -> np.ndarray:
    """The open and the closed level of every frame, [frames, 2].

    Args:
        openness: smoothed, [frames].
        fps: frames per second.
    """
    track, rate = _track(openness), _rate(fps)
    if how.whole_clip:
        known = track[np.isfinite(track)]
        pair = _believed(known, known, (how.open_prior, how.closed_most), how) if len(known) else None
        return np.tile(pair or (how.open_prior, how.closed_most), (len(track), 1))
    pair = (how.open_prior, how.closed_most)
    found = np.empty((len(track), 2))
    recent, long = round(how.open_seconds * rate), round(how.closed_seconds * rate)
    least = round(how.first_seconds * rate)
    for frame in range(len(track)):
        past = track[max(0, frame + 1 - long) : frame + 1]
        past, near = past[np.isfinite(past)], past[-recent:]
        near = near[np.isfinite(near)]
        if len(near) >= max(least, 1):
            pair = _believed(near, past, pair, how)
        found[frame] = pair
    return found


def _believed(
    near: np.ndarray, past: np.ndarray, before: tuple[float, float], how: Normalisation
) -> tuple[float, float]:
    opened = float(np.quantile(near, how.open_quantile))
    closed = min(how.closed_most, float(np.quantile(past, how.closed_quantile)))
    return (opened, closed) if opened - closed >= how.least_range else before


def normalise(openness: np.ndarray, fps: float, how: Normalisation = RUNNING) -> np.ndarray:
    """Openness relative to the person, 0 to 1, NaN where there is none; see :class:`Normalisation`."""
    pairs = levels(openness, fps, how)
    return np.clip((_track(openness) - pairs[:, 1]) / (pairs[:, 0] - pairs[:, 1]), 0, 1)


def find_events(relative: np.ndarray, fps: float, eye: str = "both", rules: EventRules = USUAL_RULES) -> list[EyeEvent]:
    """Blinks and closures of one curve, by hysteresis.

    Args:
        relative: relative openness, [frames].
        fps: frames per second.
        eye: whose curve it is.
    """
    track, rate = _track(relative), _rate(fps)
    bridged = _bridge(track, rules.gap)
    runs, begun = [], None
    for frame, value in enumerate(bridged):
        if begun is None:
            if value < rules.enter:
                begun = frame
        elif not value <= rules.leave:  # also when it is NaN
            runs.append((begun, frame - 1))
            begun = None
    if begun is not None:
        runs.append((begun, len(track) - 1))
    found = (_event(bridged, start, end, rate, eye, rules) for start, end in runs)
    return [event for event in found if event is not None]


def _event(track: np.ndarray, start: int, end: int, rate: float, eye: str, rules: EventRules) -> EyeEvent | None:
    duration = (end - start + 1) / rate
    if duration < rules.shortest - 1e-9:
        return None
    deepest = int(np.argmin(track[start : end + 1])) + start
    least = float(track[deepest])
    complete = bool(least <= CLOSED_LEVEL)
    if duration <= rules.longest_blink + 1e-9:
        kind = "blink"
    else:
        kind = "microsleep" if complete and duration > rules.microsleep + 1e-9 else "long_closure"
    before = float(track[start - 1]) if start else math.nan
    after = float(track[end + 1]) if end + 1 < len(track) else math.nan
    return EyeEvent(
        kind,
        eye,
        start,
        end,
        start / rate,
        (end + 1) / rate,
        deepest / rate,
        duration,
        least,
        1 - least,
        complete,
        (before - least) / ((deepest - start + 1) / rate),
        (after - least) / ((end - deepest + 1) / rate),
        is_cut=not (math.isfinite(before) and math.isfinite(after)),
    )


def _bridge(track: np.ndarray, gap: int) -> np.ndarray:
    """Gaps of up to ``gap`` frames filled by a straight line; longer ones, and those at the ends, stay."""
    filled, known = track.copy(), np.flatnonzero(np.isfinite(track))
    for before, after in zip(known, known[1:], strict=False):
        if 1 < after - before <= gap + 1:
            filled[before : after + 1] = np.linspace(track[before], track[after], after - before + 1)
    return filled


def merge_eyes(
    left: Sequence[EyeEvent],
    right: Sequence[EyeEvent],
    relative: np.ndarray | None = None,
    rules: EventRules = USUAL_RULES,
) -> list[EyeEvent]:
    """One list of events from those of both eyes, in order.

    Events that share at least ``rules.overlap`` of the shorter one become one of ``both`` eyes, with the deeper one's figures
    and the time of both together.

    Args:
        relative: [frames, 2], left and right; says whether the other eye of a single one was seen, which makes it a wink.
    """
    rest, merged = list(right), []
    for event in left:
        partner = max(rest, key=lambda other: _shared(event, other), default=None)
        if partner is None or _shared(event, partner) < rules.overlap:
            merged.append(_single(event, relative))
            continue
        rest.remove(partner)
        deeper = min((event, partner), key=lambda one: one.min_relative)
        start, end = min(event.start_frame, partner.start_frame), max(event.end_frame, partner.end_frame)
        times = {"start": min(event.start, partner.start), "end": max(event.end, partner.end)}
        duration = times["end"] - times["start"]
        kind = "blink"
        if duration > rules.longest_blink + 1e-9:
            kind = "microsleep" if deeper.is_complete and duration > rules.microsleep + 1e-9 else "long_closure"
        changed = {
            "kind": kind,
            "eye": "both",
            "start_frame": start,
            "end_frame": end,
            "duration": duration,
            "is_cut": event.is_cut or partner.is_cut,
            **times,
        }
        merged.append(EyeEvent(**{**asdict(deeper), **changed}))
    merged += [_single(event, relative) for event in rest]
    return sorted(merged, key=lambda event: (event.start_frame, event.eye))


def _shared(a: EyeEvent, b: EyeEvent) -> float:
    """Common frames over those of the shorter event."""
    common = min(a.end_frame, b.end_frame) - max(a.start_frame, b.start_frame) + 1
    return max(common, 0) / min(a.end_frame - a.start_frame + 1, b.end_frame - b.start_frame + 1)


def _single(event: EyeEvent, relative: np.ndarray | None) -> EyeEvent:
    if relative is None:
        return event
    other = relative[event.start_frame : event.end_frame + 1, 1 if event.eye == "left" else 0]
    return EyeEvent(**{**asdict(event), "is_wink": bool(np.isfinite(other).mean() > 0.5)})


def perclos(
    relative: np.ndarray, exclude: Sequence[EyeEvent] = (), longest_blink: float = 0.5, least_valid: float = 0.8
) -> float:
    """Share of the frames with a value that are at least 80 % closed; NaN when fewer than 80 % have a value.

    Args:
        relative: relative openness, [frames].
        exclude: blinks among these events (those shorter than ``longest_blink``) do not count as closed: the classical
            definition refers to slow closures.
    """
    track = _track(relative)
    known = np.isfinite(track)
    if not len(track) or known.mean() < least_valid:
        return math.nan
    return float(_closed(track, exclude, longest_blink)[known].mean())


def sliding_perclos(
    relative: np.ndarray,
    fps: float,
    window: float = 60.0,
    exclude: Sequence[EyeEvent] = (),
    *,
    longest_blink: float = 0.5,
    least_valid: float = 0.8,
    least_seconds: float = 10.0,
) -> np.ndarray:
    """PERCLOS of the ``window`` seconds up to every frame, [frames]; see :func:`perclos`.

    NaN where fewer than ``least_valid`` of the window's frames have a value, and in the first ``least_seconds``.
    """
    track, rate = _track(relative), _rate(fps)
    known = np.isfinite(track)
    closed = _closed(track, exclude, longest_blink) & known
    length = max(1, round(window * rate))
    sums = [np.concatenate([[0], np.cumsum(flags)]) for flags in (closed, known)]
    ends = np.arange(1, len(track) + 1)
    starts = np.maximum(ends - length, 0)
    counted, valid = (total[ends] - total[starts] for total in sums)
    enough = (valid >= least_valid * (ends - starts)) & (ends >= least_seconds * rate)
    return np.where(enough, counted / np.maximum(valid, 1), np.nan)


def _closed(track: np.ndarray, exclude: Sequence[EyeEvent], longest_blink: float) -> np.ndarray:
    closed: np.ndarray = track <= CLOSED_LEVEL  # False where it is NaN
    for event in exclude:
        if event.duration < longest_blink:
            closed[event.start_frame : event.end_frame + 1] = False
    return closed


@dataclass(frozen=True)
class EyeTracks:
    """Everything that follows from the openness of two eyes over time.

    Attributes:
        fps: frames per second.
        raw: [frames, 2], left and right, as the model says; NaN where an eye was not seen.
        smoothed: medians of three frames.
        relative: relative to the person.
        mean_relative: [frames]: of the eyes that were seen.
        events: of both eyes, in order.
        perclos_curve: [frames]: of the minute before, without blinks.
        summary: figures of the whole recording; NaN where they cannot be given.
    """

    fps: float
    raw: np.ndarray
    smoothed: np.ndarray
    relative: np.ndarray
    mean_relative: np.ndarray
    events: list[EyeEvent]
    perclos_curve: np.ndarray
    summary: dict[str, float] = field(default_factory=dict)


def analyse(
    openness: np.ndarray,
    fps: float,
    how: Normalisation = RUNNING,
    rules: EventRules = USUAL_RULES,
    *,
    window: float = 60.0,
    exclude_blinks: bool = True,
) -> EyeTracks:
    """Smooth, normalise, find events, and sum up.

    Args:
        openness: [frames, 2], left and right, or [frames] for one curve; NaN where an eye was not seen.
        fps: frames per second.
        window: of PERCLOS, in seconds.
        exclude_blinks: whether PERCLOS leaves out events shorter than ``rules.longest_blink``.

    Raises:
        DataError: when there are no frames, or the shapes or ``fps`` are impossible.
    """
    raw = np.asarray(openness, dtype=float)
    is_single = raw.ndim == 1
    raw = raw[:, None] if is_single else raw
    if raw.ndim != 2 or raw.shape[1] not in (1, 2) or not len(raw):
        raise DataError(
            f"openness has the shape {np.shape(openness)}; give [frames] or [frames, 2] with a frame at least."
        )
    rate = _rate(fps)
    smoothed = np.stack([smooth(column) for column in raw.T], axis=1)
    relative = np.stack([normalise(column, rate, how) for column in smoothed.T], axis=1)
    if is_single:
        events = find_events(relative[:, 0], rate, "both", rules)
    else:
        left, right = (find_events(relative[:, i], rate, eye, rules) for i, eye in enumerate(("left", "right")))
        events = merge_eyes(left, right, relative, rules)
    known = np.isfinite(relative)
    mean = np.where(known.any(1), np.where(known, relative, 0).sum(1) / np.maximum(known.sum(1), 1), np.nan)
    left_out = [event for event in events if event.eye == "both" or not event.is_wink] if exclude_blinks else []
    curve = sliding_perclos(mean, rate, window, left_out, longest_blink=rules.longest_blink)
    return EyeTracks(rate, raw, smoothed, relative, mean, events, curve, _summary(mean, rate, events, left_out, rules))


def _summary(
    mean: np.ndarray, rate: float, events: Sequence[EyeEvent], left_out: Sequence[EyeEvent], rules: EventRules
) -> dict[str, float]:
    valid = int(np.isfinite(mean).sum())
    blinks = [event for event in events if event.kind == "blink" and not event.is_wink]
    whole = [event for event in blinks if not event.is_cut]
    return {
        "seconds": len(mean) / rate,
        "valid_share": valid / len(mean),
        "blinks": float(len(blinks)),
        "blinks_per_minute": len(blinks) / (valid / rate / 60) if valid else math.nan,
        "mean_blink_seconds": float(np.mean([event.duration for event in whole])) if whole else math.nan,
        "incomplete_blink_share": float(np.mean([not event.is_complete for event in blinks])) if blinks else math.nan,
        "winks": float(sum(event.is_wink for event in events)),
        "long_closures": float(sum(event.kind == "long_closure" for event in events)),
        "microsleep_candidates": float(sum(event.kind == "microsleep" for event in events)),
        "perclos": perclos(mean, left_out, rules.longest_blink),
        "perclos_with_blinks": perclos(mean),
    }


def blink_scores(
    found: Sequence[EyeEvent], truth: Sequence[tuple[int, int]], least_overlap: float = 0.2
) -> dict[str, float]:
    """How well found events match true ones: each true one with at most one found, by frames in common over all frames.

    Args:
        found: events.
        truth: first and last frame of every true event.
        least_overlap: of intersection over union, for a match. A convention; published figures differ in theirs.

    Returns:
        ``precision``, ``recall``, ``f1``.
    """
    pairs = []
    for i, event in enumerate(found):
        for j, (start, end) in enumerate(truth):
            common = min(event.end_frame, end) - max(event.start_frame, start) + 1
            union = max(event.end_frame, end) - min(event.start_frame, start) + 1
            if common > 0 and common / union >= least_overlap:
                pairs.append((common / union, i, j))
    used: tuple[set[int], set[int]] = (set(), set())
    for _, i, j in sorted(pairs, reverse=True):
        if i not in used[0] and j not in used[1]:
            used[0].add(i)
            used[1].add(j)
    hits = len(used[0])
    precision, recall = hits / len(found) if found else math.nan, hits / len(truth) if truth else math.nan
    return {"precision": precision, "recall": recall, "f1": 2 * hits / max(len(found) + len(truth), 1)}


def _track(values: np.ndarray) -> np.ndarray:
    track = np.asarray(values, dtype=float)
    if track.ndim != 1:
        raise DataError(f"a curve has one dimension, not the shape {track.shape}.")
    return np.where(np.isfinite(track), track, np.nan)


def _rate(fps: float) -> float:
    if not (math.isfinite(fps) and fps > 0):
        raise DataError(f"fps={fps} is not possible; give the frames per second of the recording.")
    return float(fps)


__all__ = [
    "CLOSED_LEVEL",
    "RUNNING",
    "USUAL_RULES",
    "EventRules",
    "EyeEvent",
    "EyeTracks",
    "Normalisation",
    "analyse",
    "blink_scores",
    "find_events",
    "levels",
    "merge_eyes",
    "normalise",
    "perclos",
    "sliding_perclos",
    "smooth",
]
