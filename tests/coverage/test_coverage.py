"""Every architecture passes every check that applies to it, and no architecture of transformers is forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import backbones
import classification
import detection
import pytest
import segmentation
import transformers
from checks import Reloader, check
from transformers.models.auto import modeling_auto

_OTHER = {"__main__", "checks", "test_coverage"}
MODULES = [import_module(path.stem) for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem not in _OTHER]
CASES = [
    pytest.param(name, build, getattr(module, "WITHOUT", {}).get(name, set()), id=f"{module.__name__}-{name}")
    for module in MODULES
    for name, build in module.ARCHITECTURES.items()
    if name not in getattr(module, "SLOW", ())
]


@pytest.fixture(scope="module")
def reloader() -> Iterator[Reloader]:
    with Reloader() as process:
        yield process


@pytest.mark.parametrize(("name", "build", "without"), CASES)
def test_architecture(name: str, build: object, without: set[str], reloader: Reloader) -> None:
    outcome = check(name, build, reloader=reloader)  # type: ignore[arg-type]
    assert not outcome.failed
    assert {"masked", "reload", "train"} - set(outcome.results) == without, outcome.notes


def test_every_classifier_of_transformers_is_here() -> None:
    known = set(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    assert known == set(classification.CONFIGS) | set(classification.CANNOT)


def test_every_backbone_of_transformers_is_here() -> None:
    known = set(modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES)
    assert known == set(backbones.BACKBONES) | set(backbones.SAME_CLASS) | set(backbones.CANNOT)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (detection, "OBJECT_DETECTION"),
        (detection, "ZERO_SHOT_OBJECT_DETECTION"),
        (segmentation, "SEMANTIC_SEGMENTATION"),
        (segmentation, "IMAGE_SEGMENTATION"),
        (segmentation, "INSTANCE_SEGMENTATION"),
        (segmentation, "UNIVERSAL_SEGMENTATION"),
        (segmentation, "DEPTH_ESTIMATION"),
        (segmentation, "IMAGE_TO_IMAGE"),
    ],
)
def test_every_dense_predictor_of_transformers_is_here(module: ModuleType, kind: str) -> None:
    mapping = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")
    known = {key: name for key, name in mapping.items() if hasattr(transformers, name)}  # without those registered here
    built = {build.model_class.__name__ for build in module.ARCHITECTURES.values()}
    assert len(known) > 0
    assert {key for key, name in known.items() if name not in built} == set(module.CANNOT) & set(known)


def test_what_is_said_not_to_build_does_not() -> None:
    assert set(classification.CANNOT) == set(backbones.CANNOT) == {"dinat"}
    for kind in (transformers.DinatForImageClassification, transformers.DinatBackbone):
        with pytest.raises(ImportError, match="natten"):
            kind(transformers.DinatConfig())
