"""A run that is killed, wherever that happens, ends like one that was not."""

import json
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny import run_and_die, tiny

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


def test_the_second_of_two_runs_in_one_folder_is_refused(tmp_path: Path) -> None:
    from hf_compress.errors import CheckpointError
    from hf_compress.recipe import load_recipe
    from hf_compress.recipe.folder import RunFolder

    recipe = load_recipe(tiny())
    with RunFolder(tmp_path, recipe).opened(), pytest.raises(CheckpointError, match="another process"):
        with RunFolder(tmp_path, recipe).opened():
            pass
