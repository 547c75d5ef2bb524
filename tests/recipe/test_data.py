"""Images for a recipe: what is held out, what the model sees, and what augmentation depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny
from transformers import ViTImageProcessor

from hf_compress.errors import DataError
from hf_compress.recipe import load_recipe
from hf_compress.recipe.data import ImageSplit, RawSplit, load_data

PROCESSOR = ViTImageProcessor(size={"height": 12, "width": 12})


def data(**section: Any) -> Any:
    return load_data(load_recipe(tiny(data={"name": "digits", **section})))


def noise(number: int, size: int = 12, seed: int = 0) -> RawSplit:
    pixels = np.random.default_rng(seed).integers(0, 256, (number, size, size, 3), dtype=np.uint8)
    return RawSplit(lambda indices: [Image.fromarray(pixels[i]) for i in indices], np.zeros(number, dtype=np.int64))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), validation=st.floats(0.05, 0.4), test=st.floats(0.05, 0.4))
def test_splits_are_disjoint_complete_and_keep_the_class_shares(seed: int, validation: float, test: float) -> None:
    found = data(split_seed=seed, validation_share=validation, test_share=test)
    images = {name: split.read(range(len(split))) for name, split in found.splits().items()}
    pixels = {name: [image.tobytes() for image in images[name]] for name in images}
    assert sum(map(len, pixels.values())) == 1797
    assert len(set().union(*pixels.values())) == 1797  # no two digits are equal, so none is in two splits
    for split in found.splits().values():
        shares = np.bincount(split.labels, minlength=10) / len(split)
        # each class is rounded to whole images, so a share is off by at most one image and a bit
        assert np.abs(shares - 0.1).max() < 0.01 + 2 / len(split)
    again = data(split_seed=seed, validation_share=validation, test_share=test)
    assert [image.tobytes() for image in again.test.read(range(20))] == pixels["test"][:20]


def test_images_are_what_the_processor_makes_of_them() -> None:
    raw = noise(40, size=20)
    split = ImageSplit(raw, PROCESSOR)
    expected = PROCESSOR(raw.read(range(40)), return_tensors="pt")["pixel_values"]
    # kept as bytes and normalised in another order of float32 operations
    assert torch.allclose(split.__getitems__(range(40))["pixel_values"], expected, atol=1e-5)
    assert torch.equal(split[7]["pixel_values"], split.__getitems__([3, 7])["pixel_values"][1])


def test_large_data_is_decoded_batch_by_batch_to_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = noise(40, size=20)
    kept = ImageSplit(raw, PROCESSOR, crop_padding=2, flip=True)
    monkeypatch.setattr("hf_compress.recipe.data.MEMORY_LIMIT", 0)
    decoded = ImageSplit(raw, PROCESSOR, crop_padding=2, flip=True)
    assert kept._resized is not None and decoded._resized is None
    batch = [5, 39, 0]
    assert torch.equal(kept.__getitems__(batch)["pixel_values"], decoded.__getitems__(batch)["pixel_values"])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), epoch=st.integers(0, 99), padding=st.integers(0, 4), flip=st.booleans())
def test_augmentation_is_a_shift_and_a_mirror_that_depend_on_seed_epoch_and_image(
    seed: int, epoch: int, padding: int, flip: bool
) -> None:
    raw = noise(6)
    plain = ImageSplit(raw, PROCESSOR)
    plain._normalise = lambda pixels: pixels  # whole bytes, so that pixels can be compared exactly
    split = ImageSplit(raw, PROCESSOR, crop_padding=padding, flip=flip, seed=seed)
    split._normalise = lambda pixels: pixels
    split.augment_for(epoch)
    torch.manual_seed(epoch)  # the global random state has no say
    found = split.__getitems__(range(6))["pixel_values"]
    torch.rand(3)
    assert torch.equal(found[[4, 1]], split.__getitems__([4, 1])["pixel_values"])  # nor has the batch
    for image, result in zip(plain.__getitems__(range(6))["pixel_values"], found, strict=True):
        padded = torch.nn.functional.pad(image, [padding] * 4)
        windows = [padded[:, y : y + 12, x : x + 12] for y in range(2 * padding + 1) for x in range(2 * padding + 1)]
        mirrored = [window.flip(-1) for window in windows] if flip else []
        assert any(torch.equal(result, window) for window in [*windows, *mirrored])


def test_epochs_and_seeds_change_the_augmentation() -> None:
    split = ImageSplit(noise(32), PROCESSOR, crop_padding=2, seed=1)
    first = split.__getitems__(range(32))["pixel_values"]
    split.augment_for(1)
    assert not torch.equal(first, split.__getitems__(range(32))["pixel_values"])
    other = ImageSplit(noise(32), PROCESSOR, crop_padding=2, seed=2)
    assert not torch.equal(first, other.__getitems__(range(32))["pixel_values"])


def test_trainer_tells_the_images_which_epoch_it_is_also_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_compress.recipe.preparation import prepare
    from hf_compress.recipe.training import CompleteCheckpoints, train

    recipe = load_recipe(tiny(stages=[{"stage": "train", "epochs": 3}]))  # 6 steps to an epoch, saved every 4

    def epochs_seen() -> list[int]:
        prepared = prepare(recipe)
        seen = []
        split = prepared.training_split(0)
        fetch = split.__getitems__
        split.__getitems__ = lambda indices: seen.append(split.epoch) or fetch(indices)  # type: ignore
        prepared.training_split = lambda seed: split  # type: ignore[method-assign]
        try:
            train(prepared, 0, prepared.model, tmp_path)
        except InterruptedError:
            pass
        return seen

    with monkeypatch.context() as patch:
        mark = CompleteCheckpoints.on_save

        def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 12:
                raise InterruptedError
            mark(self, args, state, control, **kwargs)

        patch.setattr(CompleteCheckpoints, "on_save", interrupt)
        assert epochs_seen() == [0] * 6 + [1] * 6
    # from the last complete checkpoint, 8, in the middle of epoch 1; the half-made one of step 12 is gone
    assert epochs_seen() == [1] * 4 + [2] * 6


def image_folder(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), number: int = 6) -> Path:
    for label, name in enumerate(classes):
        (folder / "train" / name).mkdir(parents=True)
        for index in range(number):
            shade = 40 * label + index
            Image.new("L", (10, 14), shade).save(folder / "train" / name / f"{index}.png")
    return folder


@pytest.fixture
def _datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_datasets_cache")
def test_a_folder_of_images_is_read_as_rgb_with_its_class_names(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pets")
    found = data(name=str(folder), test_share=0.34, validation_share=0.34)
    assert found.label_names == ["cat", "dog"] and found.native_size == (14, 10)
    assert {name: len(split) for name, split in found.splits().items()} == {"train": 6, "validation": 2, "test": 4}
    for split in found.splits().values():
        for image, label in zip(split.read(range(len(split))), split.labels, strict=True):
            assert image.mode == "RGB" and image.getpixel((0, 0))[0] // 40 == label


@pytest.mark.usefixtures("_datasets_cache")
def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pets")
    for file in (folder / "train" / "cat").iterdir():
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(DataError, match="cannot be decoded"):
        found = data(name=str(folder), test_share=0.34, validation_share=0.34)
        found.train.read(range(len(found.train)))


@pytest.mark.usefixtures("_datasets_cache")
def test_unknown_columns_and_splits_are_refused_with_what_there_is(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pets")
    for section, words in (
        ({"image_column": "picture"}, r"'picture'.*image"),
        ({"label_column": "kind"}, r"'kind'.*label"),
        ({"test_split": "exam"}, r"'exam'.*train"),
    ):
        with pytest.raises(DataError, match=words):
            data(name=str(folder), **section)


def test_limits_and_empty_splits() -> None:
    found = data(train_limit=50, test_limit=10)
    assert (len(found.train), len(found.test)) == (50, 10)
    with pytest.raises(DataError, match=r"validation split of digits is empty.*validation_share"):
        data(validation_share=0.0001)
