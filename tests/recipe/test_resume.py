"""A run that is killed, wherever that happens, ends like one that was not."""

import json
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny import run_and_die, tiny, tiny_detection

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]


@pytest.fixture(scope="module")
def processes() -> Any:
    """New processes that do not import torch and transformers again, and share no thread with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_compress.recipe.training", "sklearn.datasets", "transformers.models.resnet"])
    return context


def start(processes: Any, recipe: dict[str, Any], output: Path, place: str) -> int:
    process = processes.Process(target=run_and_die, args=(recipe, output, place))
    process.start()
    process.join()
    return process.exitcode


def weights(output: Path) -> dict[str, bytes]:
    """Every file that decides what a model is, of all stages and of the result."""
    found = {p.relative_to(output).as_posix(): p.read_bytes() for p in output.rglob("*.safetensors")}
    found |= {p.relative_to(output).as_posix(): p.read_bytes() for p in output.rglob("plan.json")}
    return found | {p.relative_to(output).as_posix(): p.read_bytes() for p in output.rglob("config.json")}


def assert_whole(output: Path) -> None:
    """No file in a final place is half-written: whatever is there can be read."""
    from safetensors.torch import load_file

    for path in output.rglob("*.safetensors"):
        if ".partial" not in path.as_posix():
            assert load_file(path)
    for path in output.rglob("*.json"):
        if ".partial" not in path.as_posix():
            assert json.loads(path.read_text())


SLIMMING = {
    "network_slimming": {"stage": "network_slimming", "epochs": 2, "strength": 0.01},
    "proximal_slimming": {"stage": "proximal_slimming", "epochs": 2, "strength": 0.3, "coupling": 10.0},
}


PLACES = {
    "network_slimming": [
        "step:train:2",  # before the first checkpoint
        "step:train:6",  # after a checkpoint in the middle of the first epoch
        "checkpoint:train:8",  # a checkpoint without its last files
        "mark:train:12",  # all steps done, the last checkpoint not yet counted
        "finish:1",  # everything written, not declared complete
        "finished:1",  # between two stages
        "step:network_slimming:9",
        "finish:3",  # pruned, not declared
        "step:finetune:7",
        "publish",  # half of the final model is copied
    ],
    "proximal_slimming": [  # its auxiliary variable has to come back from the checkpoint
        "step:proximal_slimming:9",
        "mark:proximal_slimming:12",
        "finish:2",
    ],
}


@pytest.mark.parametrize("method", SLIMMING)
def test_killed_at_any_place_and_continued_ends_in_the_same_weights(
    method: str, processes: Any, tmp_path: Path
) -> None:
    recipe = tiny()
    recipe["stages"][1] = SLIMMING[method]
    assert start(processes, recipe, tmp_path / "whole", "none") == 0
    for place in PLACES[method]:
        assert start(processes, recipe, tmp_path / "killed", place) == -signal.SIGKILL, place
        assert_whole(tmp_path / "killed")
    assert start(processes, recipe, tmp_path / "killed", "none") == 0
    assert_whole(tmp_path / "killed")
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert set(whole) == set(killed)
    assert [name for name in whole if whole[name] != killed[name]] == []
    assert not list((tmp_path / "killed").rglob("*.partial*"))


VIT = {
    "config": {
        "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "image_size": 16, "patch_size": 8,
    }
}  # fmt: skip


def test_a_vision_transformer_continues_with_the_weights_that_it_saved(processes: Any, tmp_path: Path) -> None:
    """save_pretrained writes it under older names, which Trainer does not read back (transformers issue 48805)."""
    recipe = tiny(model=VIT)
    recipe["training"]["learning_rate"] = 0.01
    recipe["stages"] = [
        {"stage": "train", "epochs": 2},
        {"stage": "dimension_search", "epochs": 2, "target": 0.25, "min_keep": 1},
        {"stage": "prune", "support": True},
        {"stage": "finetune", "epochs": 1},
    ]
    assert start(processes, recipe, tmp_path / "whole", "none") == 0
    for place in ("step:train:6", "step:dimension_search:6", "step:finetune:5"):
        assert start(processes, recipe, tmp_path / "killed", place) == -signal.SIGKILL, place
    assert start(processes, recipe, tmp_path / "killed", "none") == 0
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert set(whole) == set(killed)
    assert [name for name in whole if whole[name] != killed[name]] == []


def test_a_detector_continues_with_the_images_that_come_next(processes: Any, tmp_path: Path) -> None:
    recipe = tiny_detection()
    recipe["training"]["save_steps"] = 2  # 3 steps to an epoch, and another half of the images mirrored in each
    recipe["stages"] = [{"stage": "train", "epochs": 2}, *recipe["stages"][1:3]]
    assert start(processes, recipe, tmp_path / "whole", "none") == 0
    for place in ("step:train:3", "step:train:5", "step:dimension_search:5"):
        assert start(processes, recipe, tmp_path / "killed", place) == -signal.SIGKILL, place
    assert start(processes, recipe, tmp_path / "killed", "none") == 0
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert set(whole) == set(killed)
    assert [name for name in whole if whole[name] != killed[name]] == []


SUPERNET = {"config": {"model_type": "darts_supernet", "num_cells": 2, "width": 4, "nodes": 1, "stem_multiplier": 1}}


@pytest.mark.parametrize("search", ["architecture_search", "width_search"])
def test_a_search_continues_with_both_copies_and_both_halves(search: str, processes: Any, tmp_path: Path) -> None:
    is_width = search == "width_search"
    recipe = tiny() if is_width else tiny(model=SUPERNET)
    recipe["training"] |= {"save_steps": 2}  # 3 steps to an epoch of a half
    common = {"epochs": 2, "architecture_lr": 0.2, "coupling": [0.5, 2.0]}
    recipe["stages"] = [
        {"stage": search, **common, **({"target": 0.3} if is_width else {})},
        {"stage": "prune", "support": True} if is_width else {"stage": "derive"},
        {"stage": "train", "steps": 2},
    ]
    assert start(processes, recipe, tmp_path / "whole", "none") == 0
    for place in (f"step:{search}:3", f"step:{search}:5", "finish:2"):
        assert start(processes, recipe, tmp_path / "killed", place) == -signal.SIGKILL, place
    assert start(processes, recipe, tmp_path / "killed", "none") == 0
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert set(whole) == set(killed)
    assert [name for name in whole if whole[name] != killed[name]] == []


def test_the_best_checkpoint_of_a_vision_transformer_is_loaded_at_the_end(tmp_path: Path) -> None:
    from hf_compress.recipe import run_recipe

    recipe = tiny(model=VIT)
    recipe["training"] |= {"learning_rate": 0.01, "lr_scheduler_type": "constant", "disable_tqdm": True}
    # with this learning rate the loss on validation images rises: the weights after step 4 are the best
    best = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "greater_is_better": False}
    recipe["stages"] = [{"stage": "train", "steps": 12, "training": {**best, "metric_for_best_model": "loss"}}]
    run_recipe(recipe, output=tmp_path / "best")
    history = json.loads((tmp_path / "best" / "stages" / "01-train" / "history.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert min(losses, key=losses.__getitem__) == 4 and set(losses) == {4, 8, 12}
    recipe["stages"] = [{"stage": "train", "steps": 4}]
    run_recipe(recipe, output=tmp_path / "short")
    name = "model.safetensors"
    assert (tmp_path / "best" / name).read_bytes() == (tmp_path / "short" / name).read_bytes()


def test_the_second_of_two_runs_in_one_folder_is_refused(tmp_path: Path) -> None:
    from hf_compress.errors import CheckpointError
    from hf_compress.recipe import load_recipe
    from hf_compress.recipe.folder import RunFolder

    recipe = load_recipe(tiny())
    with RunFolder(tmp_path, recipe).opened(), pytest.raises(CheckpointError, match="another process"):
        with RunFolder(tmp_path, recipe).opened():
            pass
