"""Adapters for folders of eyes: what is found, who is in it, what is refused. The folders are made up in their form."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from hf_compress.data.eyes import (
    EyeRenderer,
    MixedEyes,
    SyntheticEyes,
    cew,
    eye_collator,
    face_synthetics,
    mrl_eye,
    open_closed_folder,
    render_faces,
    rt_bene,
)
from hf_compress.errors import DataError


def picture(path, openness=0.9, seed=0, mirror=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(EyeRenderer().render(seed, openness=[openness])["images"][0])
    (image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image).save(path)
    return path


@pytest.fixture
def plain(tmp_path):
    for number in range(6):
        for person in ("s1", "s2", "s3"):
            picture(tmp_path / "train" / "open" / f"{person}_{number}.png", seed=number)
            picture(tmp_path / "train" / "Closed_Eyes" / f"{person}_{number}.png", 0.0, seed=number)
    return tmp_path


def test_open_and_closed_folders(plain):
    eyes = open_closed_folder(plain, person=r"(s\d+)_")
    assert len(eyes) == 36 and (eyes.eye_states == 1).sum() == 18 and set(eyes.persons) == {"s1", "s2", "s3"}
    batch = eye_collator(list(eyes))
    assert batch["pixel_values"].shape == (36, 3, 32, 48)
    assert batch["eye_state"].tolist() == eyes.eye_states.tolist()
    assert batch["openness"].isnan().all() and (batch["domain_ids"] == 1).all()
    where = next(i for i, p in enumerate(eyes.pictures) if p.path.name == "s2_3.png" and p.eye_state == 1)
    expected = EyeRenderer().render(3, openness=[0.9])["images"][0]
    np.testing.assert_array_equal(batch["pixel_values"][where].numpy(), expected.transpose(2, 0, 1) / np.float32(255))
    assert "18 open, 18 closed" in repr(eyes)


def test_splits_share_no_person(plain):
    train, held_out = open_closed_folder(plain, person=r"(s\d+)_").split(0.3)
    assert not set(train.persons) & set(held_out.persons)
    assert len(train) == 24 and len(held_out) == 12
    other = open_closed_folder(plain, person=r"(s\d+)_").split(0.3, seed=5)[1]
    assert {len(other)} == {12}


def test_a_split_without_persons_warns(plain, caplog):
    with caplog.at_level(logging.WARNING):
        train, held_out = open_closed_folder(plain).split(0.25)
    assert "same person" in caplog.text and len(held_out) == 9 and len(train) == 27
    assert not {p.path for p in train.pictures} & {p.path for p in held_out.pictures}


def test_one_person_cannot_be_split(tmp_path):
    for state in ("open", "closed"):
        picture(tmp_path / state / "s1_0.png")
    with pytest.raises(DataError, match="one person"):
        open_closed_folder(tmp_path, person=r"(s\d+)").split()


def test_damaged_pictures_are_counted_and_logged(plain, caplog):
    whole = plain / "train" / "open" / "s1_0.png"
    whole.write_bytes(whole.read_bytes()[:200])  # cut short
    (plain / "train" / "open" / "s1_1.png").write_bytes(b"no picture")
    Image.new("RGB", (1, 1)).save(plain / "train" / "open" / "dot.png")
    with caplog.at_level(logging.WARNING):
        eyes = open_closed_folder(plain)
    assert eyes.unreadable == 3 and len(eyes) == 34
    assert "3 of 37" in caplog.text
    unchecked = open_closed_folder(plain, check=False)
    place = next(i for i, p in enumerate(unchecked.pictures) if p.path == whole)
    with pytest.raises(DataError, match=r"s1_0\.png"):
        unchecked[place]


def test_balanced_mixing_of_a_folder(plain):
    for number in range(5):
        (plain / "train" / "Closed_Eyes" / f"s1_{number}.png").unlink()
    eyes = open_closed_folder(plain)
    mixed = MixedEyes(SyntheticEyes(64), eyes, (1, 2), length=30, balanced=True)
    batch = eye_collator([mixed[i] for i in range(30)])
    assert (batch["eye_state"] == 0).sum() == (batch["eye_state"] == 1).sum() == 30


@pytest.mark.parametrize("read", [open_closed_folder, cew, mrl_eye, rt_bene, face_synthetics])
def test_missing_and_empty_folders_are_refused(read, tmp_path):
    with pytest.raises(DataError, match="no folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no"):
        read(tmp_path)


def test_one_class_is_refused(tmp_path):
    picture(tmp_path / "open" / "a.png")
    with pytest.raises(DataError, match="0 closed and 1 open"):
        open_closed_folder(tmp_path)
    with pytest.raises(DataError, match="none of 1 pictures"):
        (tmp_path / "open" / "a.png").write_bytes(b"")
        open_closed_folder(tmp_path)


@pytest.mark.parametrize("person", ["(", r"s\d+", "(a)(b)"])
def test_bad_patterns_are_refused(person, plain):
    with pytest.raises(DataError, match="person="):
        open_closed_folder(plain, person=person)


def test_cew_crops(tmp_path):
    for name, state, side, letter in (
        ("closed_eye_0001.jpg_face_1", "closed", "Left", "L"),
        ("closed_eye_0001.jpg_face_1", "closed", "Right", "R"),
        ("Aaron_Guiel_0001", "open", "Left", "L"),
        ("Aaron_Guiel_0002", "open", "Right", "R"),
    ):
        picture(tmp_path / f"{state}{side}Eyes" / f"{name}_{letter}.png", mirror=side == "Right")
    eyes = cew(tmp_path)
    assert sorted(set(eyes.persons)) == ["Aaron_Guiel", "closed_eye_0001.jpg_face_1"]
    assert sorted(eyes.eye_states) == [0, 0, 1, 1]
    batch = eye_collator(list(eyes))["pixel_values"]
    assert all(torch.equal(batch[0], other) for other in batch[1:])  # right eyes were mirrored back
    turned = eye_collator(list(cew(tmp_path, left_is_of_picture=True)))["pixel_values"]
    assert torch.equal(turned, batch.flip(-1))


def test_cew_faces(tmp_path):
    faces = render_faces(1, [(0.0, 0.0), (0.9, 0.9)], size=(100, 100), eye_distance=32, motion=0)
    for name, file, frame, centres in zip(
        ("Closed", "Open"), ("closed_eye_0001.jpg", "A_B_0001.jpg"), faces.frames, faces.eye_centres, strict=True
    ):
        (tmp_path / f"{name}Face").mkdir()
        Image.fromarray(frame).save(tmp_path / f"{name}Face" / file)
        (x0, y0), (x1, y1) = centres.round().astype(int).tolist()
        # whichever eye is named first
        line = f"{file} {x1} {y1} {x0} {y0}" if name == "Open" else f"{file} {x0} {y0} {x1} {y1}"
        (tmp_path / f"EyeCoordinatesInfo_{name}Face.txt").write_text(line + "\n\n")
    eyes = cew(tmp_path)
    assert len(eyes) == 4 and sorted(eyes.eye_states) == [0, 0, 1, 1]
    batch = eye_collator(list(eyes))["pixel_values"]
    left, right = batch[eyes.eye_states == 1]
    assert (left - right).abs().mean() < 0.05  # both upright, in the orientation of a left eye
    (tmp_path / "EyeCoordinatesInfo_OpenFace.txt").write_text("A_B_0001.jpg 1 2\n")
    with pytest.raises(DataError, match="four numbers"):
        cew(tmp_path)


def test_mrl_eye(tmp_path):
    for name in ("s0001_00001_0_0_0_0_0_01", "s0001_00002_0_1_1_2_1_03", "s0002_00001_1_0_1_0_0_02", "notes_1"):
        picture(tmp_path / name[:5] / f"{name}.png")
    (tmp_path / "s0001" / "._s0001_00001_0_0_0_0_0_01.png").write_bytes(b"of macOS")
    eyes = mrl_eye(tmp_path)
    assert eyes.eye_states.tolist() == [0, 1, 1] and eyes.persons == ["s0001", "s0001", "s0002"]
    assert eyes.unreadable == 0


def test_rt_bene(tmp_path):
    for person, labels in (("s000", (0.0, 1.0, 0.5)), ("s001", (0.0, 1.0, 0.0))):
        lines = []
        for number, label in enumerate(labels):
            name = f"left_{number:06d}_rgb.png"
            lines.append(f"{name},{label}")
            for side in ("left", "right"):
                file = tmp_path / f"{person}_noglasses" / "natural" / side / name.replace("left", side)
                picture(file, 0.9 * (1 - label), mirror=side == "right")
        (tmp_path / f"{person}_blink_labels.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "s001_noglasses" / "natural" / "right" / "right_000002_rgb.png").unlink()
    eyes = rt_bene(tmp_path)
    assert len(eyes) == 9 and (eyes.eye_states == 0).sum() == 4 and set(eyes.persons) == {"s000", "s001"}
    batch = eye_collator(list(eyes))["pixel_values"]
    assert torch.equal(batch[0], batch[1])  # left and mirrored right
    turned = eye_collator(list(rt_bene(tmp_path, left_is_of_picture=True)))["pixel_values"]
    assert torch.equal(turned, batch.flip(-1))
    (tmp_path / "s001_blink_labels.csv").write_text("left_000000_rgb.png;0.0\n")
    with pytest.raises(DataError, match="line 1"):
        rt_bene(tmp_path)


def test_face_synthetics(tmp_path):
    faces = render_faces(1, [(0.6, 0.6)], motion=0, noise=0)
    Image.fromarray(faces.frames[0]).save(tmp_path / "000000.png")
    Image.fromarray(faces.frames[0]).save(tmp_path / "000000_seg.png")
    points = np.zeros((70, 2))
    for first, (x, y) in zip((36, 42), faces.eye_centres[0], strict=True):
        # an eye 20 wide whose lids are parabolas, 3 up and 1 down at the middle, seen at thirds
        marks = [(-10, 0), (-10 / 3, -8 / 3), (10 / 3, -8 / 3), (10, 0), (10 / 3, 8 / 9), (-10 / 3, 8 / 9)]
        points[first : first + 6] = np.array(marks) + (x, y)
    np.savetxt(tmp_path / "000000_ldmks.txt", points)
    eyes = face_synthetics(tmp_path)
    batch = eye_collator(list(eyes))
    assert len(eyes) == 2 and (batch["eye_state"] == -100).all() and (batch["domain_ids"] == 0).all()
    np.testing.assert_allclose(batch["aperture_ratio"], 4 / 20, rtol=1e-6)
    left, right = batch["pixel_values"]
    assert (left - right).abs().mean() < 0.05
    assert len(set(eyes.persons)) == 1  # both eyes of a face stay together
    (tmp_path / "000000_ldmks.txt").write_text("1 2\n")
    with pytest.raises(DataError, match="70 lines"):
        face_synthetics(tmp_path)
