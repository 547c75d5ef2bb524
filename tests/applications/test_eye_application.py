"""From videos and pictures to tables, events and plots; and what happens with faces, eyes and files that are not there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import pipeline
from typer.testing import CliRunner

from hf_compress import export_onnx
from hf_compress.applications.eye_openness import (
    EyeReader,
    Face,
    GivenEyes,
    Normalisation,
    analyse,
    best_frame,
    blink_scores,
    closed_eyes,
    locator,
    read_pictures,
    read_video,
)
from hf_compress.applications.eye_openness.faces import main_face
from hf_compress.applications.eye_openness.frames import open_video, write_video
from hf_compress.applications.eye_openness.pipeline import EyeOpennessPipeline
from hf_compress.applications.eye_openness.report import plot_tracks
from hf_compress.cli import app
from hf_compress.data.eyes import Faces, render_face_video, render_faces
from hf_compress.errors import CheckpointError, DataError, ModelError
from hf_compress.models.eye_openness import EyeOpennessConfig, EyeOpennessForRegression, EyeOpennessImageProcessor

NAN = float("nan")
SIZE = (120, 160)


def faces_of(video: Faces) -> dict[int, list[Face]]:
    """The eyes of a rendered video; its left one in the picture, which comes first, is the person's right one."""
    return {
        number: [Face(tuple(left), tuple(right))] for number, (right, left) in enumerate(video.eye_centres.tolist())
    }


def contrast(pixels: Tensor) -> Tensor:
    """Stands for a model: the deviation of a crop, which an open eye's iris and white raise."""
    return (3 * pixels.std((1, 2, 3))).clamp(0, 1)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    model = EyeOpennessForRegression(EyeOpennessConfig(backbone="nano")).eval()
    model.save_pretrained(folder)
    EyeOpennessImageProcessor().save_pretrained(folder)
    export_onnx(model, folder / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def video() -> Faces:
    # of a person with light lids, so that contrast tells open from closed
    return render_face_video(6, 90, size=SIZE, mean_interval=1.0, incomplete_share=0.3)


@pytest.fixture(scope="module")
def video_file(video: Faces, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("cv2")
    return write_video(tmp_path_factory.mktemp("video") / "face.mp4", iter(video.frames), 30.0)


# -- the whole way --------------------------------------------------------------------------------------------------


def test_true_openness_gives_the_true_blinks() -> None:
    """From the generator's own curve: F1 of complete blinks at least 0.99, incomplete ones found at least 8 times in 10."""
    hits = {"complete": [0.0, 0.0], "incomplete": [0.0, 0.0]}
    for seed in range(6):
        from hf_compress.data.eyes import blink_track

        openness, blinks = blink_track(seed, 1800)
        events = analyse(openness, 30.0, Normalisation(whole_clip=True)).events
        truth = [(blink.start, blink.end) for blink in blinks]
        # two blinks that follow at once are one event, and an event counts for one of them
        assert blink_scores(events, truth)["f1"] >= 0.9
        for blink in blinks:
            kind = hits["complete" if blink.is_complete else "incomplete"]
            kind[1] += 1
            kind[0] += any(e.start_frame <= blink.end and e.end_frame >= blink.start for e in events)
    assert hits["complete"][0] / hits["complete"][1] >= 0.99
    assert hits["incomplete"][0] / hits["incomplete"][1] >= 0.8


def test_a_video_becomes_tables_events_and_pictures(video: Faces, video_file: Path, tmp_path: Path) -> None:
    found = read_video(video_file, EyeReader(contrast), GivenEyes(faces_of(video)), tmp_path / "out", overlay=True)
    names = {"openness.csv", "openness.parquet", "events.json", "openness.png", "overlay.mp4"}
    assert {path.name for path in found.files} == names == {path.name for path in (tmp_path / "out").iterdir()}
    table = pandas.read_parquet(tmp_path / "out" / "openness.parquet")
    assert len(table) == 90 and table["valid"].all()
    np.testing.assert_allclose(pandas.read_csv(tmp_path / "out" / "openness.csv")["left"], table["left"], atol=1e-5)
    for side, column in (("left", 1), ("right", 0)):
        assert np.corrcoef(table[side], video.openness[:, column])[0, 1] > 0.8  # by contrast alone
    events = json.loads((tmp_path / "out" / "events.json").read_text(encoding="utf-8"))
    assert events["fps"] == 30 and events["summary"]["seconds"] == 3
    assert open_video(tmp_path / "out" / "overlay.mp4").declared == 90


def test_frames_without_a_face_and_hidden_eyes_are_nan(video: Faces, video_file: Path, tmp_path: Path) -> None:
    places = faces_of(video)
    for number in range(30, 40):
        del places[number]
    for number in range(50, 60):
        eyes = places[number][0]
        places[number] = [Face(eyes.left, distance=eyes.eye_distance)]
    found = read_video(video_file, EyeReader(contrast), GivenEyes(places), tmp_path)
    assert found.tracks is not None
    assert np.isnan(found.tracks.raw[30:40]).all() and np.isnan(found.tracks.raw[50:60, 1]).all()
    assert np.isfinite(found.tracks.raw[50:60, 0]).all() and np.isfinite(found.tracks.raw[:30]).all()
    assert found.tracks.summary["valid_share"] == pytest.approx(80 / 90)


def test_pictures_become_rows(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, openness in (("open", (0.9, 0.9)), ("shut", (0.9, 0.0))):
        face = render_faces(5, [openness], size=SIZE, motion=0)
        Image.fromarray(face.frames[0]).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"not a picture")
    centres = render_faces(5, [(0.9, 0.9)], size=SIZE, motion=0).eye_centres[0]
    face = Face(tuple(centres[1]), tuple(centres[0]))
    found = read_pictures(
        sorted(folder.glob("*.png")), EyeReader(contrast), GivenEyes(face), tmp_path / "out", overlay=True
    )
    assert found.best == "open.png" and len(found.notes) == 1 and "broken" in found.notes[0]
    table = pandas.read_csv(tmp_path / "out" / "openness.csv")
    assert list(table["picture"]) == ["open.png", "shut.png"]
    assert table["left"][1] < table["right"][1]  # the eye at the right of the picture, the person's left, is shut
    assert (tmp_path / "out" / "open-eyes.png").exists()
    with pytest.raises(DataError, match="none of 1"):
        read_pictures([folder / "broken.png"], EyeReader(contrast), GivenEyes(face), tmp_path / "out")


def test_a_picture_without_a_face_has_a_row_of_nan(tmp_path: Path) -> None:
    Image.new("RGB", (60, 40)).save(tmp_path / "wall.png")
    found = read_pictures([tmp_path / "wall.png"], EyeReader(contrast), GivenEyes([]), tmp_path / "out")
    table = pandas.read_csv(tmp_path / "out" / "openness.csv")
    assert len(table) == 1 and table[["left", "right", "least"]].isna().all(axis=None) and found.best is None


# -- the command and the pipeline -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", "model.onnx"])
def test_the_command(kind: str, video: Faces, video_file: Path, model_folder: Path, tmp_path: Path) -> None:
    rows = [
        {"frame": n, "left_x": f[0].left[0], "left_y": f[0].left[1], "right_x": f[0].right[0], "right_y": f[0].right[1]}
        for n, f in faces_of(video).items()
    ]
    pandas.DataFrame(rows).to_csv(tmp_path / "eyes.csv", index=False)
    arguments = [
        "eye-openness", str(video_file), "--model", str(model_folder / kind), "--eyes", str(tmp_path / "eyes.csv"),
        "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "blinks per minute" in result.output
    assert (tmp_path / "out" / "events.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "nothing.mp4"}, "no file or folder"),
        ({"--model": "./nowhere"}, "no folder"),
        ({"--eyes": "nowhere.csv"}, "cannot be read"),
        ({"--detector": "magic"}, "no face detector"),
        ({"--detector": "yunet"}, "needs its model file"),
    ],
)
def test_the_command_says_what_is_wrong(
    changes: dict[str, str], message: str, video_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    given = {"--model": str(model_folder), "--output": str(tmp_path / "out"), **changes}
    source = given.pop("source", str(video_file))
    result = CliRunner().invoke(app, ["eye-openness", source, *(part for pair in given.items() for part in pair)])
    assert result.exit_code == 1 and message in result.output
    assert not (tmp_path / "out").exists()


def test_the_pipeline_reads_pictures_lists_crops_and_videos(video: Faces, video_file: Path, model_folder: Path) -> None:
    import hf_compress  # noqa: F401  which registers the task

    read = pipeline("eye-openness", model=str(model_folder), locate=GivenEyes(faces_of(video)[0]))
    assert isinstance(read, EyeOpennessPipeline)
    image = Image.fromarray(video.frames[0])
    (face,) = read(image)
    assert 0 <= face["openness"] == min(face["left"], face["right"]) <= 1
    assert read([image, image]) == [[face], [face]]
    left, right = faces_of(video)[0][0].left, faces_of(video)[0][0].right
    (hidden,) = read(image, faces=[Face(left, distance=left[0] - right[0])])
    assert math.isnan(hidden["right"]) and hidden["left"] == hidden["openness"]
    assert read(image, faces=[]) == []
    crops = EyeOpennessImageProcessor().crop_eyes(image, left, right)
    found = read(crops, crops=True)
    assert [one["openness"] for one in found] == pytest.approx([face["left"], face["right"]], abs=1e-6)
    assert set(found[0]) == {"openness", "aperture_ratio", "open_probability"}
    tracks = read(video_file)
    assert tracks.raw.shape == (90, 2) and np.isfinite(tracks.raw).all()
    with pytest.raises(DataError, match="too small"):
        read(Image.new("RGB", (1, 1)), crops=True)
    with pytest.raises(DataError, match="speed"):
        read(image, speed=3)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="ResNetModel"):
        EyeReader.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no file"):
        EyeReader.from_pretrained(tmp_path / "no.onnx")


# -- what cannot be judged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "face",
    [
        Face((80.0, 50.0), (75.0, 50.0)),  # 5 pixels apart
        Face((500.0, 50.0), (20.0, 50.0)),  # one outside of the picture
        Face(),
        Face((80.0, 50.0), (70.0, 50.0), box=(30.0, 10.0, 80.0, 100.0)),  # turned away
    ],
    ids=["tiny", "outside", "hidden", "turned"],
)
def test_eyes_that_cannot_be_judged_are_nan(face: Face, video: Faces) -> None:
    values = EyeReader(contrast).picture(Image.fromarray(video.frames[0]), [face])[0]
    assert math.isnan(values[0])
    assert EyeReader(contrast).picture(Image.fromarray(video.frames[0]), []).shape == (0, 2)


def test_an_empty_crop_shows_no_eye() -> None:
    blank = Image.new("RGB", (160, 120), (90, 80, 70))
    assert np.isnan(EyeReader(contrast).picture(blank, [Face((100.0, 50.0), (60.0, 50.0))])).all()


def test_damaged_and_empty_videos_are_refused(tmp_path: Path, video_file: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    whole = video_file.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # without the index at the end
    for name, message in (
        ("empty", "empty"),
        ("noise", "cannot be opened|decoded"),
        ("cut", "cannot be opened|decoded"),
    ):
        with pytest.raises(DataError, match=message):
            open_video(tmp_path / f"{name}.mp4")
    with pytest.raises(DataError, match="camera 97"):
        open_video(97)


def test_a_video_without_any_face_is_refused_before_anything_is_written(video_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no eye could be judged in 90 frames"):
        read_video(video_file, EyeReader(contrast), GivenEyes([]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    face = Face((100.0, 60.0), (60.0, 60.0))
    with pytest.raises(CheckpointError, match="not a folder"):
        read_video(video_file, EyeReader(contrast), GivenEyes(face), tmp_path / "file")


@pytest.mark.parametrize("content", ["", "frame,left_x\n0,1\n", "frame,left_x,left_y,right_x,right_y\n0,a,2,3,4\n"])
def test_places_of_eyes_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    (tmp_path / "eyes.csv").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"eyes\.csv"):
        GivenEyes.from_file(tmp_path / "eyes.csv")


def test_the_same_face_is_followed() -> None:
    large, small = Face((100.0, 50.0), (40.0, 50.0)), Face((220.0, 50.0), (190.0, 50.0))
    assert main_face([small, large]) is large
    assert main_face([Face((222.0, 51.0), (192.0, 51.0)), large], small).left[0] == 222.0
    assert main_face([]) is None


def test_photographs_to_keep() -> None:
    shut, opened, unknown = np.array([[0.1, 0.9]]), np.array([[0.6, 0.7], [0.8, NAN]]), np.array([[NAN, NAN]])
    assert best_frame([shut, opened, unknown]) == 1
    assert best_frame([unknown]) is None and best_frame([]) is None
    assert closed_eyes(np.concatenate([shut, opened, unknown])).tolist() == [True, False, False, False]


def test_plots_of_one_eye_and_of_nothing(tmp_path: Path) -> None:
    for name, values in (("one", np.full(600, 0.8)), ("none", np.full((600, 2), NAN)), ("short", np.full((1, 2), 0.5))):
        path = plot_tracks(tmp_path / f"{name}.png", analyse(values, 30.0))
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_real_face_in_a_picture_that_a_package_ships(tmp_path: Path) -> None:
    """A smoke test: the detector of another package finds both eyes of scikit-image's astronaut. That says nothing about how
    accurate openness is on real faces, which was not measured."""
    pytest.importorskip("yuface")
    data = pytest.importorskip("skimage.data")
    (face,) = locator()(data.astronaut())
    assert abs(face.left[0] - 247) < 8 and abs(face.right[0] - 200) < 8 and abs(face.left[1] - 102) < 8
    values = EyeReader(contrast).picture(Image.fromarray(data.astronaut()), [face])
    assert values.shape == (1, 2) and np.isfinite(values).all()
    assert locator()(np.zeros((200, 200, 3), np.uint8)) == []
