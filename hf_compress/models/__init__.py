"""Networks of the papers, as ordinary transformers models. Importing this package imports nothing else."""

from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any

AUTO_CLASSES: dict[str, tuple[str, str, dict[str, str]]] = {
    "slimming_vgg": (
        "hf_compress.models.slimming_vgg",
        "VggConfig",
        {"AutoModel": "VggModel", "AutoModelForImageClassification": "VggForImageClassification"},
    ),
    "slimming_densenet": (
        "hf_compress.models.slimming_densenet",
        "DenseNetConfig",
        {"AutoModel": "DenseNetModel", "AutoModelForImageClassification": "DenseNetForImageClassification"},
    ),
    "slimming_preact_resnet": (
        "hf_compress.models.slimming_preact_resnet",
        "PreActResNetConfig",
        {"AutoModel": "PreActResNetModel", "AutoModelForImageClassification": "PreActResNetForImageClassification"},
    ),
    "pruned_vit": (
        "hf_compress.models.pruned_vit",
        "PrunedViTConfig",
        {
            "AutoModel": "PrunedViTModel",
            "AutoModelForImageClassification": "PrunedViTForImageClassification",
            "AutoBackbone": "PrunedViTBackbone",
        },
    ),
    "afidaf": (
        "hf_compress.models.afidaf",
        "AfidafConfig",
        {
            "AutoModel": "AfidafModel",
            "AutoModelForImageClassification": "AfidafForImageClassification",
            "AutoModelForObjectDetection": "AfidafForObjectDetection",
            "AutoModelForSemanticSegmentation": "AfidafForSemanticSegmentation",
            "AutoBackbone": "AfidafBackbone",
        },
    ),
    "lenet": (
        "hf_compress.models.lenet",
        "LeNetConfig",
        {"AutoModel": "LeNetModel", "AutoModelForImageClassification": "LeNetForImageClassification"},
    ),
    "wide_resnet": (
        "hf_compress.models.wide_resnet",
        "WideResNetConfig",
        {"AutoModel": "WideResNetModel", "AutoModelForImageClassification": "WideResNetForImageClassification"},
    ),
    "darts": (
        "hf_compress.models.darts",
        "DartsConfig",
        {"AutoModel": "DartsModel", "AutoModelForImageClassification": "DartsForImageClassification"},
    ),
    "darts_supernet": (
        "hf_compress.models.darts",
        "DartsSupernetConfig",
        {"AutoModel": "DartsSupernetModel", "AutoModelForImageClassification": "DartsSupernetForImageClassification"},
    ),
    "eye_openness": (
        "hf_compress.models.eye_openness",
        "EyeOpennessConfig",
        {"AutoModel": "EyeOpennessForRegression"},
    ),
    "sidt": ("hf_compress.models.sidt", "SidtConfig", {"AutoModelForObjectDetection": "SidtForObjectDetection"}),
}
"""``model_type`` -> (package, configuration class, {Auto class: model class}): what transformers' Auto classes learn."""

IMAGE_PROCESSORS = {
    "afidaf": "AfidafImageProcessor",
    "eye_openness": "EyeOpennessImageProcessor",
    "sidt": "SidtImageProcessor",
}
"""``model_type`` -> image processor in the same package, for models that need one of their own."""


def lazy_names(package: str, names: Collection[str]) -> Callable[[str], Any]:
    """A ``__getattr__`` for a model's package, so that its configuration can be had without loading torch.

    Args:
        package: ``__name__`` of a package that holds ``configuration_<model>`` and ``modeling_<model>``.
        names: the public names of both.
    """
    model = package.rpartition(".")[2]

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if name.endswith("Config"):
            return getattr(import_module(f"{package}.configuration_{model}"), name)
        # The Auto classes load every model of this package as soon as they are there, so they have to come first:
        # a modeling module that imports them indirectly would be asked for its classes before it has any.
        import_module("transformers.models.auto.modeling_auto")
        return getattr(import_module(f"{package}.modeling_{model}"), name)

    return __getattr__
