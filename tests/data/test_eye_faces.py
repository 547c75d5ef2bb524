"""Rendered faces: eyes are where they are said to be, and blinks happen when they are said to."""

import math

import numpy as np
import pytest
from PIL import Image

from hf_compress.data.eyes import EyeRenderer, blink_track, render_face_video, render_faces, shipped_faces
from hf_compress.errors import DataError
from hf_compress.models.eye_openness.image_processing_eye_openness import EyeOpennessImageProcessor, crop_eye


def test_eyes_are_where_they_are_said_to_be():
    """What changes between shut and open eyes lies around the eyes' centres, whatever the head does."""
    frames = 16
    for seed, distance in ((0, 60.0), (1, 45.3)):
        shut, wide = (
            render_faces(seed, np.full((frames, 2), o), eye_distance=distance, noise=0.0, motion=4.0)
            for o in (0.0, 0.9)
        )
        np.testing.assert_array_equal(shut.eye_centres, wide.eye_centres)
        offsets = shut.eye_centres[:, 1] - shut.eye_centres[:, 0]
        assert np.abs(np.linalg.norm(offsets, axis=1) - distance).max() <= 1  # patches sit on whole pixels
        assert (
            np.abs(offsets[:, 1]).max() > 3 and np.ptp(shut.eye_centres, axis=0).min() > 1
        )  # the head sways and turns
        change = np.abs(wide.frames.astype(float) - shut.frames).sum(3)
        rows, columns = np.mgrid[: change.shape[1], : change.shape[2]] + 0.5
        for frame, centres in zip(change, shut.eye_centres, strict=True):
            for x, y in centres:
                near = frame * (np.hypot(columns - x, rows - y) < distance / 2)
                middle = np.array([(columns * near).sum(), (rows * near).sum()]) / near.sum()
                assert np.hypot(*(middle - (x, y))) < 0.12 * distance  # gaze ahead; an eye is 0.48 wide


def test_each_eye_has_its_own_openness():
    faces = render_faces(3, [(0.0, 0.9), (0.9, 0.0), (0.0, 0.0)], motion=0.0, noise=0.0)
    change = [np.abs(f.astype(float) - faces.frames[2]).sum(2) for f in faces.frames[:2]]
    half = faces.frames.shape[2] // 2
    assert change[0][:, :half].max() == 0 and change[0][:, half:].max() > 100
    assert change[1][:, half:].max() == 0 and change[1][:, :half].max() > 100


def test_crops_of_a_face_look_like_rendered_eyes():
    """The crop that a network gets shows the eye upright and at the size that the renderer trains on."""
    faces = render_faces(5, [(0.9, 0.9)], size=(480, 640), motion=0.0, noise=0.0)
    (x0, y0), (x1, y1) = faces.eye_centres[0].tolist()
    distance, angle = math.hypot(x1 - x0, y1 - y0), math.atan2(y1 - y0, x1 - x0)
    image = Image.fromarray(faces.frames[0])
    crops = [
        np.asarray(crop_eye(image, centre, distance, angle, mirror=mirror), float)
        for mirror, centre in ((True, (x0, y0)), (False, (x1, y1)))
    ]
    # a mirrored right eye is a left eye, but for the skin's texture and the reflected light
    assert np.abs(crops[0] - crops[1]).mean() < 0.8 * np.abs(crops[0][:, ::-1] - crops[1]).mean()
    pixels = EyeOpennessImageProcessor()(image, eyes=faces.eyes[0], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels.transpose(0, 2, 3, 1) * 255, np.stack(crops[::-1]), atol=1e-3)
    shut = render_faces(5, [(0.0, 0.0)], size=(480, 640), motion=0.0, noise=0.0)
    other = np.asarray(crop_eye(Image.fromarray(shut.frames[0]), (x1, y1), distance, angle), float)
    columns = np.flatnonzero(np.abs(other - crops[1]).sum(2).max(0) > 60)
    scale = (columns.max() - columns.min() + 1) / 48
    assert 0.55 <= scale <= 0.92


def test_the_track_holds_its_blinks():
    track, blinks = blink_track(1, 6000, mean_interval=2.0, jitter=0.0, wink_share=0.2)
    assert track.shape == (6000, 2) and len(blinks) > 40
    assert all(b.start > a.end for a, b in zip(blinks, blinks[1:], strict=False))
    for blink in blinks:
        sides = {"both": [0, 1], "right": [0], "left": [1]}[blink.eye]
        part = track[blink.start : blink.end + 1]
        np.testing.assert_allclose(part[:, sides].min(0), blink.minimum, atol=1e-6)
        assert (part[:, sides] < 0.8).all()
        assert (blink.minimum <= 0.1) == blink.is_complete
        assert 7 <= len(part) <= 8  # 3 frames down, 1 or 2 shut, 5 up, the last of which is the baseline
        assert (track[blink.start - 1] == track[0]).all()
    outside = np.ones(6000, bool)
    for blink in blinks:
        outside[blink.start : blink.end + 1] = False
    np.testing.assert_allclose(track[outside], 0.8, atol=1e-6)
    winks = [b for b in blinks if b.eye != "both"]
    assert winks and all(track[b.start + 2, 1 if b.eye == "right" else 0] == track[0, 0] for b in winks)
    assert 0.02 < np.mean([not b.is_complete for b in blinks]) < 0.35


def test_a_slower_camera_sees_shorter_blinks():
    _, fast = blink_track(0, 3000, frames_per_second=60)
    _, slow = blink_track(0, 3000, frames_per_second=15)
    assert min(b.end - b.start + 1 for b in fast) > max(b.end - b.start + 1 for b in slow)


def test_a_video_is_its_track():
    video = render_face_video(2, 40, size=(96, 128), eye_distance=30, mean_interval=0.5)
    track, blinks = blink_track(2, 40, mean_interval=0.5)
    np.testing.assert_array_equal(video.openness, track)
    assert video.blinks == blinks and len(video) == 40 and video.frames.shape == (40, 96, 128, 3)
    again = render_face_video(2, 40, size=(96, 128), eye_distance=30, mean_interval=0.5)
    np.testing.assert_array_equal(video.frames, again.frames)
    assert (video.frames != render_face_video(3, 40, size=(96, 128), eye_distance=30).frames).any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: render_faces(0, [(0.5, 1.5)]),
        lambda: render_faces(0, [(0.5, math.nan)]),
        lambda: render_faces(0, [0.5, 0.5]),
        lambda: render_faces(0, eye_distance=200),
        lambda: render_faces(0, size=(30, 30)),
        lambda: blink_track(0, 0),
        lambda: blink_track(0, 10, baseline=2.0),
    ],
)
def test_what_makes_no_face_is_refused(make):
    with pytest.raises(DataError):
        make()


def test_shipped_photographs_have_eyes_where_they_are_marked():
    """The pupil is dark: the middle of the crop is darker than the skin beneath it."""
    faces = shipped_faces()
    assert "hopper" in faces  # matplotlib is a dependency
    for image, eyes in faces.values():
        (x0, y0), (x1, y1) = eyes.tolist()
        distance, angle = math.hypot(x1 - x0, y1 - y0), math.atan2(y1 - y0, x1 - x0)
        for mirror, centre in ((True, (x0, y0)), (False, (x1, y1))):
            crop = np.asarray(crop_eye(image, centre, distance, angle, mirror=mirror).convert("L"), float)
            assert crop[13:19, 20:28].mean() < 0.75 * crop[26:, 12:36].mean()


def test_rendered_eyes_are_as_large_as_real_ones():
    """A crop is 0.65 of the distance of the eyes, about 63 mm, and an eye about 30 mm wide: 0.73 of the crop."""
    marks = EyeRenderer().render(0, 500)["landmarks"]
    widths = np.linalg.norm(marks[:, 0] - marks[:, 3], axis=1) / 48
    assert 0.65 < widths.mean() < 0.8 and widths.min() < 0.6 and widths.max() > 0.85
