"""How ``from_pretrained`` rebuilds a compressed model: the record is replayed on the meta device, then weights load."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers.base import HfQuantizer

from hf_compress.errors import RecordError
from hf_compress.surgery.skeleton import apply_record, named_tensors

from .config import HfCompressConfig


class HfCompressQuantizer(HfQuantizer):
    """Makes the freshly built skeleton as small as the record says, before weights are loaded into it.

    The loaded model is an ordinary one: it is not marked as quantized, so that ``Trainer``, ``half()`` and ``float()``
    treat it like any other. Only its configuration remembers the record, for the next ``save_pretrained``.
    """

    quantization_config: HfCompressConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        apply_record(model, self.quantization_config.record)
        self._shapes = {name: tensor.shape for name, tensor in named_tensors(model)}
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # releases of transformers before 5.23 do not compare shapes where a quantizer is at work
        for key, tensor in named_tensors(model):
            if tensor.shape != self._shapes.get(key, tensor.shape):
                raise RecordError(
                    f"the checkpoint's {key!r} has shape {tuple(tensor.shape)}, its config.json asks for "
                    f"{tuple(self._shapes[key])}. The two do not belong together; save the checkpoint again."
                )
        for name in ("hf_quantizer", "quantization_method"):
            vars(model).pop(name, None)
        vars(model)["is_quantized"] = False
        for module in model.modules():
            config = vars(module).get("config")
            if config is not None:  # the base class has marked the configuration of every model inside
                vars(config).pop("_is_quantized", None)
        return model

    # A compressed checkpoint holds no tensor under a name that the model does not have, so there is nothing to look for
    # in the two walks through the model that the base class makes.

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        return

    def update_weight_conversions(self, weight_conversions: Any, model: nn.Module | None = None) -> Any:
        return weight_conversions

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True
