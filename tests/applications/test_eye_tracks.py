"""Blinks, closures and PERCLOS of curves whose answer can be worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from hf_compress.applications.eye_openness.tracks import (
    EventRules,
    Normalisation,
    analyse,
    blink_scores,
    find_events,
    merge_eyes,
    normalise,
    perclos,
    sliding_perclos,
    smooth,
)
from hf_compress.errors import DataError

FPS = 30.0
WHOLE = Normalisation(whole_clip=True)
NAN = float("nan")


def blink(track: np.ndarray, start: int, least: float, frames: int = 8) -> None:
    """A raised cosine from the track's level to ``least`` and back."""
    weight = 0.5 * (1 - np.cos(2 * np.pi * (np.arange(frames) + 0.5) / frames))
    track[start : start + frames] -= (track[start] - least) * weight


def clip() -> np.ndarray:
    track = np.full(600, 0.8)
    for start in (60, 180, 300, 420):
        blink(track, start, 0.05)
    blink(track, 500, 0.45)
    track[540:570] = 0.05
    return track


def test_a_clip_with_six_events() -> None:
    found = analyse(clip(), FPS, WHOLE)
    events = found.events
    assert [(e.kind, e.is_complete, e.start_frame, e.end_frame) for e in events] == [
        *(("blink", True, start, start + 4) for start in (62, 182, 302, 422)),
        ("blink", False, 503, 505),
        ("long_closure", True, 540, 569),
    ]
    assert [round(e.min_relative, 3) for e in events] == [0.038] * 4 + [0.551, 0.0]
    assert [round(e.duration, 4) for e in events] == [0.1667] * 4 + [0.1, 1.0]
    assert perclos(found.mean_relative) == pytest.approx(0.0633, abs=5e-5)
    assert perclos(found.mean_relative, events) == pytest.approx(0.05, abs=5e-5)
    summary = found.summary
    assert (summary["perclos"], summary["perclos_with_blinks"]) == pytest.approx((0.05, 0.0633), abs=5e-5)
    assert summary["blinks_per_minute"] == pytest.approx(15) and summary["incomplete_blink_share"] == pytest.approx(0.2)
    assert summary["mean_blink_seconds"] == pytest.approx((4 * 5 + 3) / 5 / 30)
    json.dumps([e.to_json() for e in events], allow_nan=False)


def test_the_same_events_while_the_recording_runs() -> None:
    """Quantiles of the past alone: before the first closed frame the closed level is the prior, so events end a little sooner
    or later, but none is missed and none invented."""
    events = analyse(clip(), FPS).events
    truth = [(62, 66), (182, 186), (302, 306), (422, 426), (503, 505), (540, 569)]
    assert blink_scores(events, truth)["f1"] == 1.0


@pytest.mark.parametrize(("level", "wanted"), [(0.19, 1.0), (0.21, 0.0)])
def test_perclos_of_a_constant_curve(level: float, wanted: float) -> None:
    track = np.full(1000, level)
    assert perclos(track) == wanted
    assert sliding_perclos(track, FPS)[-1] == wanted
    track[:200] = NAN
    assert perclos(track) == wanted
    track[:201] = NAN
    assert math.isnan(perclos(track))


def test_sliding_perclos_is_perclos_of_the_last_minute() -> None:
    draw = np.random.default_rng(0)
    track = draw.random(3000)
    track[draw.random(3000) < 0.1] = NAN
    curve = sliding_perclos(track, FPS, window=20)
    for frame in (300, 599, 600, 1700, 2999):
        assert curve[frame] == pytest.approx(perclos(track[max(0, frame - 599) : frame + 1]))
    assert np.isnan(curve[:299]).all()


@pytest.mark.parametrize("how", [Normalisation(), WHOLE])
def test_a_person_who_does_not_blink_has_no_events(how: Normalisation) -> None:
    track = 0.725 + 0.025 * np.sin(np.arange(900) / 7)
    assert analyse(track, FPS, how).events == []


def test_levels_too_near_to_each_other_are_not_believed() -> None:
    """Somebody whose eyes are hardly open for 30 s: the curve keeps to the levels from before."""
    track = np.concatenate([np.full(300, 0.8), np.full(900, 0.3)])
    relative = normalise(track, FPS)
    assert relative[-1] == pytest.approx((0.3 - 0.2) / (0.8 - 0.2))  # and not 1
    assert normalise(np.full(90, 0.3), FPS)[-1] == pytest.approx((0.3 - 0.2) / (0.7 - 0.2))  # the priors


def test_one_closed_eye_is_a_wink() -> None:
    left = np.full(300, 0.8)
    left[100:109] = 0.03
    right = np.full(300, 0.8)
    (event,) = analyse(np.stack([left, right], axis=1), FPS, WHOLE).events
    assert (event.eye, event.is_wink, event.kind) == ("left", True, "blink")
    hidden = np.where(np.abs(np.arange(300) - 104) < 30, NAN, right)
    (event,) = analyse(np.stack([left, hidden], axis=1), FPS, WHOLE).events
    assert (event.eye, event.is_wink) == ("left", False)  # nobody knows what the other eye did


def test_both_eyes_are_one_event_when_they_overlap() -> None:
    curves = np.full((300, 2), 1.0)
    curves[100:108, 0] = 0.1
    curves[103:111, 1] = 0.05
    events = [find_events(curves[:, i], FPS, eye) for i, eye in enumerate(("left", "right"))]
    (event,) = merge_eyes(*events, curves)
    assert (event.eye, event.start_frame, event.end_frame, event.min_relative) == ("both", 100, 110, 0.05)
    curves[:, 1] = 1.0
    curves[106:114, 1] = 0.05  # two frames of eight in common
    events = [find_events(curves[:, i], FPS, eye) for i, eye in enumerate(("left", "right"))]
    assert [e.eye for e in merge_eyes(*events, curves)] == ["left", "right"]


def test_one_lost_frame_is_bridged_and_two_cut_the_event() -> None:
    track = np.full(60, 1.0)
    track[20:28] = 0.1
    track[23] = NAN
    (event,) = find_events(track, FPS)
    assert (event.start_frame, event.end_frame, event.is_cut) == (20, 27, False)
    track[24] = NAN
    assert [(e.start_frame, e.end_frame, e.is_cut) for e in find_events(track, FPS)] == [(20, 22, True), (25, 27, True)]
    track = np.full(60, 1.0)
    track[50:] = 0.1
    (event,) = find_events(track, FPS)
    assert event.is_cut and math.isnan(event.opening_speed)
    assert event.to_json()["opening_speed"] is None


def test_a_long_shallow_closure_is_no_microsleep() -> None:
    track = np.full(300, 1.0)
    track[100:160] = 0.4
    assert [e.kind for e in find_events(track, FPS)] == ["long_closure"]
    track[100:160] = 0.1
    assert [e.kind for e in find_events(track, FPS)] == ["microsleep"]
    assert find_events(track, FPS, rules=EventRules(microsleep=3.0))[0].kind == "long_closure"


def test_medians_leave_lost_frames_lost() -> None:
    found = smooth(np.array([0.8, 0.1, 0.8, NAN, 0.6, 0.4]))
    np.testing.assert_allclose(found, [0.45, 0.8, 0.45, NAN, 0.5, 0.5])
    assert len(smooth(np.zeros(0))) == 0


def test_nothing_seen_gives_nothing() -> None:
    found = analyse(np.full((100, 2), NAN), FPS)
    assert found.events == [] and np.isnan(found.mean_relative).all()
    assert math.isnan(found.summary["perclos"]) and math.isnan(found.summary["blinks_per_minute"])


def test_impossible_curves_are_refused() -> None:
    for openness, fps in ((np.zeros((0, 2)), 30), (np.zeros((5, 3)), 30), (np.zeros(5), 0), (np.zeros(5), NAN)):
        with pytest.raises(DataError):
            analyse(openness, fps)
    with pytest.raises(DataError, match="odd"):
        smooth(np.zeros(5), 2)


def test_scores_of_events() -> None:
    track = np.full(100, 1.0)
    track[10:16], track[50:56] = 0.1, 0.1
    found = find_events(track, FPS)
    assert blink_scores(found, [(10, 15), (80, 85)]) == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert blink_scores(found, [(10, 15), (50, 55)])["f1"] == 1.0
    assert math.isnan(blink_scores([], [])["recall"])
