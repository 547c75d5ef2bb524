"""Recipes for eye openness: the data, the whole road from training to card, and fields that do not belong."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from hf_compress import load_recipe, run_recipe
from hf_compress.data.eyes.augmentation import EyeAugmentation
from hf_compress.errors import DataError, RecipeError
from hf_compress.models.eye_openness import EyeOpennessForRegression, EyeOpennessImageProcessor
from hf_compress.recipe.eye_data import EyeSplit, RawEyes, load_eye_data
from hf_compress.recipe.tasks import EyeOpenness

RECIPE: dict[str, Any] = {
    "name": "eyes",
    "task": "eye-openness",
    "model": {"config": {"model_type": "eye_openness", "backbone": "nano"}},
    "data": {"name": "rendered_eyes", "eyes": {"train": 48, "weak": 16, "validation": 24, "test": 30}},
    "training": {"per_device_train_batch_size": 32, "learning_rate": 0.004},
    "stages": [
        {"stage": "train", "epochs": 1},
        {"stage": "prune", "macs": 0.5},
        {"stage": "quantize", "weights": 4},
        {"stage": "finetune", "steps": 1},
        {"stage": "export", "int8": True, "calibration_images": 16, "min_agreement": 0.5},
        "report",
    ],
}


def recipe(**changes: Any) -> dict[str, Any]:
    """The recipe with other sections; ``eyes`` and ``data`` are joined with what is there."""
    made = copy.deepcopy(RECIPE)
    made["data"]["eyes"].update(changes.pop("eyes", {}))
    made["data"].update(changes.pop("data", {}))
    return {**made, **changes}


def test_a_whole_run(tmp_path: Path) -> None:
    result = run_recipe(recipe(), output=tmp_path / "run")
    assert result.metrics is not None
    for side in ("dense", "compressed"):
        figures = result.metrics[side]
        assert figures["agreement"] == pytest.approx(1 - figures["mae"])
        assert {"pearson", "spearman", "mae_middle", "auc", "melanin_gap", "mae_dark"} <= set(figures)
    assert result.metrics["compressed"]["macs"] <= 0.5 * result.metrics["dense"]["macs"]
    assert result.metrics["compressed"]["bytes"] < 0.5 * result.metrics["dense"]["bytes"]
    assert (tmp_path / "run" / "openness.png").exists()
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    for words in ("Not a medical and not a safety device", "real faces was not measured", "thirds of skin tone"):
        assert words in card
    assert "Mean absolute error" in card and 'pipeline(\n    "eye-openness"' in card
    int8 = result.metrics["int8"]
    assert int8["argmax"] is None and 0 < int8["relative_difference"] < 0.5  # one number has no class
    assert int8["mae"] == pytest.approx(result.metrics["compressed"]["mae"], abs=0.1)
    assert f"mean absolute error {int8['mae']:.4f}" in card
    session = onnxruntime.InferenceSession(tmp_path / "run" / "model.onnx")
    assert {output.name for output in session.get_outputs()} == {"logits", "openness", "aperture_ratio"}
    again = run_recipe(recipe(), output=tmp_path / "run")
    assert again.was_finished and again.metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_training_mixes_labels_and_tests_are_exact() -> None:
    data = load_eye_data(load_recipe(recipe()))
    processor = EyeOpennessImageProcessor()
    train = EyeSplit(data.train, processor)
    batch = train.__getitems__(range(len(train)))
    exact, state = batch["openness"][:, 0].isfinite(), batch["eye_state"][:, 0]
    assert batch["pixel_values"].shape == (64, 3, 32, 48) and int(exact.sum()) == 48
    assert torch.equal(exact, state == -100) and torch.equal(exact, batch["domain_ids"] == 0)
    assert set(state[~exact].tolist()) == {0, 1}
    assert torch.equal(batch["aperture_ratio"][:, 0].isfinite(), exact)
    for split in (data.validation, data.test):
        assert bool(EyeSplit(split, processor).__getitems__(range(len(split)))["openness"].isfinite().all())
    assert data.test.melanin is not None and len(data.test.melanin) == 30
    assert data.train.melanin is None  # of several sources it is not asked for


def test_a_subset_has_the_same_eyes() -> None:
    test = load_eye_data(load_recipe(recipe())).test
    chosen = np.array([5, 2, 17])
    whole, part = test.fields(range(30)), test.take(chosen).fields(range(3))
    assert np.array_equal(whole["pixel_values"][chosen], part["pixel_values"])
    assert np.array_equal(test.melanin[chosen], test.take(chosen).melanin)
    assert np.array_equal(np.asarray(test.read([2])[0]), whole["pixel_values"][2].transpose(1, 2, 0))


def test_augmentation_is_the_same_again_and_other_in_the_next_epoch() -> None:
    raw = load_eye_data(load_recipe(recipe())).validation
    split = EyeSplit(raw, EyeOpennessImageProcessor(), EyeAugmentation(), seed=3)
    first, second = (split.__getitems__([4, 1, 7])["pixel_values"] for _ in range(2))
    assert torch.equal(first, second) and float(first.min()) >= 0 and float(first.max()) <= 1
    split.augment_for(1)
    assert not torch.equal(first, split.__getitems__([4, 1, 7])["pixel_values"])
    assert torch.equal(split.pixels(2), split._pixels[:2].float() / 255)  # what checks see is not changed
    nothing = EyeAugmentation(*[0.0] * 12)
    pixels = split.pixels(4)
    # the gamma is exactly 1 and every blend has weight 0; powers and products round
    torch.testing.assert_close(nothing(pixels, torch.Generator()), pixels, atol=1e-6, rtol=0)


def test_the_domain_head_trains_and_is_gone(tmp_path: Path) -> None:
    wanted = recipe(model={"config": {**RECIPE["model"]["config"], "num_domains": 2, "loss_weights": {"domain": 0.05}}})
    result = run_recipe(wanted, output=tmp_path / "run")
    first = EyeOpennessForRegression.from_pretrained(tmp_path / "run" / "stages" / "01-train" / "model")
    start = EyeOpennessForRegression.from_pretrained(tmp_path / "run" / "stages" / "00-start" / "model")
    assert any("domain" in name for name in start.state_dict())
    for model in (first, EyeOpennessForRegression.from_pretrained(tmp_path / "run")):
        assert not any("domain" in name for name in model.state_dict()) and model.config.loss_weights["domain"] == 0
    assert result.metrics is not None and result.metrics["dense"]["params"] == first.num_parameters()


def test_a_weaker_augmentation_changes_less() -> None:
    """Same draws at half the strength; what is mirrored stays the same."""
    pixels = EyeSplit(load_eye_data(load_recipe(recipe())).train, EyeOpennessImageProcessor()).pixels(32)
    still = EyeAugmentation(flip=0.0)
    changes = [
        (still.times(strength)(pixels, torch.Generator().manual_seed(0)) - pixels).abs().mean()
        for strength in (0.0, 0.2, 0.5, 1.0)
    ]
    assert changes[0] == 0 and changes == sorted(changes) and changes[1] < 0.5 * changes[3]
    assert EyeAugmentation().times(0.3).flip == EyeAugmentation().flip
    with pytest.raises(DataError, match="0 to 1"):
        EyeAugmentation().times(1.5)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, EyeAugmentation().times(0.4)),
        ({"augment": 1}, EyeAugmentation()),
        ({"augment": 0}, None),
        ({"translate": 0.2}, replace(EyeAugmentation().times(0.4), translate=0.2)),
        ({"augment": 0, "translate": 0.2}, replace(EyeAugmentation().times(0), translate=0.2)),
    ],
    ids=["default", "full", "none", "moved", "only moved"],
)
def test_recipes_say_how_strong_the_augmentation_is(given: dict[str, float], wanted: EyeAugmentation | None) -> None:
    loaded = load_recipe(recipe(eyes=given))
    split = EyeOpenness().training_split(loaded, EyeOpennessImageProcessor(), load_eye_data(loaded), 0)
    assert split.augmentation == wanted


def test_a_flip_alone_mirrors() -> None:
    flip = EyeAugmentation(translate=0, scale=0, rotate=0, flip=1.0)
    pixels = torch.rand(3, 3, 32, 48)
    # grid_sample interpolates at pixel centres that it computes in float32
    torch.testing.assert_close(flip.move(pixels, torch.Generator()), pixels.flip(-1), atol=1e-4, rtol=0)


def test_a_model_of_another_size_gets_resized_eyes() -> None:
    raw = load_eye_data(load_recipe(recipe())).validation
    split = EyeSplit(raw, EyeOpennessImageProcessor(size={"height": 64, "width": 96}))
    assert split.__getitems__([0])["pixel_values"].shape == (1, 3, 64, 96)


def test_a_folder_takes_the_place_of_rendered_weak_labels(tmp_path: Path) -> None:
    for name, level in (("open", 200), ("closed", 40)):
        (tmp_path / name).mkdir()
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, level, (32, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    made = recipe(eyes={"folder": str(tmp_path)})
    del made["data"]["eyes"]["weak"]
    train = load_eye_data(load_recipe(made)).train
    assert len(train) == 48 + 6 and set(train.fields(range(48, 54))["eye_state"]) == {0, 1}
    made["data"]["eyes"]["folder"] = "./nowhere"
    with pytest.raises((DataError, RecipeError), match="nowhere"):
        load_eye_data(load_recipe(made))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"name": "digits"}}, "rendered_eyes"),
        ({"data": {"crop_padding": 2}}, "crop_padding"),
        ({"data": {"image_size": 32}}, "image_size"),
        ({"eyes": {"shift": "soft"}}, "shift"),
        ({"eyes": {"trian": 5}}, "train"),
        ({"eyes": {"folder": "here"}}, "both"),
        ({"task": "image-classification"}, "eye-openness"),
    ],
)
def test_what_does_not_belong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe(**changes))


def test_raw_eyes_of_two_sources_keep_their_order() -> None:
    data = load_eye_data(load_recipe(recipe()))
    assert isinstance(data.train, RawEyes) and list(data.train.strata) == [0] * 48 + [1] * 16
    mixed = data.train.fields([50, 3, 63, 0])
    alone = [data.train.fields([i])["pixel_values"][0] for i in (50, 3, 63, 0)]
    assert np.array_equal(mixed["pixel_values"], np.stack(alone))
