"""Reading recipes: values, overrides, and where every message points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny

from hf_compress.errors import RecipeError
from hf_compress.recipe import load_recipe
from hf_compress.recipe.schema import scoring_stage

TEXT = """\
name: example
seed: 3
model:
  config:
    model_type: resnet
data:
  name: digits
training:
  learning_rate: 1e-2
stages:
  - train
  - stage: network_slimming
    strength: 1e-4
  - stage: prune
    macs: 0.5
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "example.yaml"
    file.write_text(TEXT)
    return file


def test_numbers_are_read_as_yaml_1_2_reads_them(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.training["learning_rate"] == 0.01 and recipe.stages[1].strength == 1e-4  # type: ignore[union-attr]
    assert recipe.stages[0].stage == "train"  # the short form


OVERRIDES: dict[str, Any] = {
    "seed=5": ("seed", 5),
    "stages.prune.macs=0.25": ("stages.2.macs", 0.25),
    "stages.2.macs=0.25": ("stages.2.macs", 0.25),
    "stages.1.strength=1e-3": ("stages.1.strength", 1e-3),
    "stages.network_slimming.parameters={p: 0.5}": ("stages.1.parameters", {"p": 0.5}),
    "training.optim_args=momentum=0.9,nesterov=true": ("training.optim_args", "momentum=0.9,nesterov=true"),
    "stages.train.training.learning_rate=0.3": ("stages.0.training.learning_rate", 0.3),
    "data.image_mean=[0.1, 0.2, 0.3]": ("data.image_mean", [0.1, 0.2, 0.3]),
}


@pytest.mark.parametrize("assignment", OVERRIDES)
def test_an_override_reaches_its_field(assignment: str, path: Path) -> None:
    field, value = OVERRIDES[assignment]
    found: Any = load_recipe(path, [assignment]).model_dump()
    for key in field.split("."):
        found = found[int(key) if key.isdigit() else key]
    assert found == value


WRONG_OVERRIDES = {
    "seed": "FIELD=VALUE",
    "=3": "FIELD=VALUE",
    "sed=3": "Did you mean 'seed'",
    "seed=[1": "not YAML",
    "seed.x=1": "seed is the value 3",
    "stages.9.macs=1": "numbered from 0; there is no 9",
    "stages.prunes.macs=1": "Did you mean 'prune'",
    "stages.prune.macs=-1": "greater than 0",
    "description=": "string",
}


@pytest.mark.parametrize("assignment", WRONG_OVERRIDES)
def test_an_override_that_leads_nowhere_is_named(assignment: str, path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [assignment])
    assert f"--set {assignment}" in str(caught.value) and WRONG_OVERRIDES[assignment] in str(caught.value)


def test_a_stage_that_occurs_twice_has_to_be_numbered() -> None:
    with pytest.raises(RecipeError, match=r"2 stages are called 'train'.*stages\.0 or stages\.1"):
        load_recipe(tiny(stages=["train", "train"]), ["stages.train.epochs=1"])


def test_every_problem_of_a_file_is_reported_with_its_line(path: Path) -> None:
    path.write_text(TEXT.replace("seed: 3", "seed: -3").replace("strength: 1e-4", "strenght: 1e-4"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert f"{path}, line 2, field seed:" in lines[0]
    assert f"{path}, line 13, field stages.1.strenght: unknown field. Did you mean 'strength'?" in lines[1]


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["name", "seed", "model", "data", "training", "stages", "x", "output"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda children: (
                st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
            ),
            max_leaves=6,
        ),
    )
)
def test_any_content_ends_in_a_recipe_or_in_a_recipe_error(content: dict[str, Any]) -> None:
    try:
        load_recipe(content)
    except RecipeError as error:
        assert "field" in str(error)


def test_a_recipe_written_and_read_again_is_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(tiny(), ["seed=9"])
    (tmp_path / "again.yaml").write_text(recipe.as_yaml())
    assert load_recipe(tmp_path / "again.yaml").model_dump() == recipe.model_dump()
    assert yaml.safe_load(recipe.as_yaml())["seed"] == 9


SCORING = {
    "train, prune": None,
    "network_slimming, prune": 0,
    "network_slimming, train, prune": 0,
    "proximal_slimming, network_slimming, prune": 1,
    "network_slimming, prune, finetune, prune": None,
}


@pytest.mark.parametrize("names", SCORING)
def test_the_last_prune_takes_the_scores_of_the_slimming_before_it(names: str) -> None:
    extra: dict[str, Any] = {"prune": {"macs": 0.5}, "proximal_slimming": {"strength": 1.0, "coupling": 1.0}}
    recipe = load_recipe(tiny(stages=[{"stage": name, **extra.get(name, {})} for name in names.split(", ")]))
    assert scoring_stage(recipe, len(recipe.stages) - 1) == SCORING[names]
