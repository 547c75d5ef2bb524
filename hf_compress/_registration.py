"""Tells transformers about this package, without importing it.

Registering needs ``transformers.quantizers.auto`` and the Auto classes, which import torch and take seconds. So that
``import hf_compress`` stays cheap, each registration waits until the module that it registers with has been imported
by whoever needs it, and runs right after that import.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .models import AUTO_CLASSES, IMAGE_PROCESSORS


def _register_quantizer() -> None:
    if not all(_is_complete(name) for name in (_QUANTIZERS, _OWN_QUANTIZER)):
        return  # the second imports the first; its own hook comes when it is done
    from transformers.quantizers import auto

    from .hub.config import QUANT_METHOD, HfCompressConfig
    from .hub.quantizer import HfCompressQuantizer

    # assigned, not registered: transformers refuses a name that exists, which a reload of this package must not meet
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = HfCompressConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = HfCompressQuantizer
    # so that a checkpoint with a configuration of ours (it was pruned) can be quantized while it is loaded
    taking_over = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", ())
    if HfCompressConfig not in taking_over:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*taking_over, HfCompressConfig)


def _register_configurations() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    for model_type, (package, config_class, _) in AUTO_CLASSES.items():
        AutoConfig.register(model_type, _load(package, config_class), exist_ok=True)


def _register_models() -> None:
    if not all(_is_complete(name) for name in (_MODELING, _MODELING_LAYERS, _MODELING_AUTO)):
        return  # one of these imports another; the hook of the one that finishes last does it
    if any(name in sys.modules and not _is_complete(name) for name in _OWN_MODELING):
        return  # one of these brought transformers in and has no classes yet; its own hook comes when it is done
    auto = sys.modules[_MODELING_AUTO]

    for model_type, (package, config_class, model_classes) in AUTO_CLASSES.items():
        for auto_class, model_class in model_classes.items():
            getattr(auto, auto_class).register(_load(package, config_class), _load(package, model_class), exist_ok=True)
            if auto_class == "AutoModelForObjectDetection":
                # the pipeline asks a copy that leaves out registered models
                auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.setdefault(model_type, model_class)


def _register_image_processors() -> None:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    for model_type, name in IMAGE_PROCESSORS.items():
        package, config_class, _ = AUTO_CLASSES[model_type]
        classes = {"torchvision": _load(package, name)}
        AutoImageProcessor.register(_load(package, config_class), image_processor_classes=classes, exist_ok=True)


def _register_pipelines() -> None:
    if _is_complete(
        _PIPELINE
    ):  # it imports transformers.pipelines; where it came first, its own hook comes when it is done
        _load(_PIPELINE, "register")()


def _load(package: str, name: str) -> Any:
    return getattr(import_module(package), name)


_MODELING = "transformers.modeling_utils"
_MODELING_LAYERS = "transformers.modeling_layers"  # imports the Auto classes before it has any of its own
_MODELING_AUTO = "transformers.models.auto.modeling_auto"
_OWN_MODELING = (
    f"{__package__}.models.slimming",
    *(f"{package}.modeling_{package.rpartition('.')[2]}" for package, _, _ in AUTO_CLASSES.values()),
)
_QUANTIZERS = "transformers.quantizers.auto"
_OWN_QUANTIZER = f"{__package__}.hub.quantizer"
_PIPELINE = f"{__package__}.applications.eye_openness.pipeline"
_HOOKS: dict[str, Callable[[], None]] = {
    _QUANTIZERS: _register_quantizer,
    _OWN_QUANTIZER: _register_quantizer,
    "transformers.models.auto.configuration_auto": _register_configurations,
    "transformers.models.auto.image_processing_auto": _register_image_processors,
    "transformers.pipelines": _register_pipelines,
    _PIPELINE: _register_pipelines,
    _MODELING: _register_models,
    _MODELING_LAYERS: _register_models,
    _MODELING_AUTO: _register_models,
    **dict.fromkeys(_OWN_MODELING, _register_models),
}


def _is_complete(name: str) -> bool:
    """Whether a module was imported to its end; imports it when nobody has begun to."""
    if name not in sys.modules:
        import_module(name)
    return not getattr(sys.modules[name].__spec__, "_initializing", False) or name in _finished


_finished: set[str] = set()


class _AfterImport(MetaPathFinder):
    """Finds the modules in ``_HOOKS`` as usual, and has their hook run once they are loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _HOOKS:
            return None
        for finder in sys.meta_path:
            spec = None if isinstance(finder, _AfterImport) else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = partial(_load_then_register, spec.loader.exec_module)  # type: ignore[method-assign]
                return spec
        return None


def _load_then_register(load: Callable[[ModuleType], None], module: ModuleType) -> None:
    load(module)
    _finished.add(module.__name__)
    _HOOKS[module.__name__]()


def register() -> None:
    """Register now what can be, and the rest when transformers has loaded it. Calling it again changes nothing."""
    if importlib.util.find_spec("transformers") is None:
        return  # axes and surgery work on any nn.Module without it
    if not any(type(finder).__name__ == _AfterImport.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    for name, hook in _HOOKS.items():
        if name in sys.modules and not getattr(sys.modules[name].__spec__, "_initializing", False):
            hook()
