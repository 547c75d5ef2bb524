"""How ``from_pretrained`` rebuilds a compressed model: the record is replayed on the meta device, then weights load."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from hf_compress.quantization.layers import quantization_of
from hf_compress.quantization.post_training import dequantize
from hf_compress.quantization.storage import finish_loading, packed_state_dict, prepare_skeleton
from hf_compress.surgery.skeleton import apply_record, record_of

from .config import HfCompressConfig, storage_of


class HfCompressQuantizer(HfQuantizer):
    """Makes the freshly built skeleton as small as the record says, before weights are loaded into it.

    The loaded model is an ordinary one: it is not marked as quantized, so that ``Trainer``, ``half()`` and ``float()``
    treat it like any other. Only its configuration remembers the record, for the next ``save_pretrained``. A model with
    low-bit weights or activations also keeps this object, which packs it when it is saved.
    """

    quantization_config: HfCompressConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # from_pretrained builds under torch.device("meta"), a mode that sees every access to a tensor, its shape included
        with torch._C.DisableTorchFunction():
            apply_record(model, self.quantization_config.record)
        if self.quantization_config.quantization is not None:
            prepare_skeleton(model, self.quantization_config.quantization)
        return model

    def postprocess_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # not the base class's, which marks every model inside as quantized
        model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
        return self._process_model_after_weight_loading(model, **kwargs)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name in ("hf_quantizer", "quantization_method"):
            vars(model).pop(name, None)
        vars(model)["is_quantized"] = False
        if self.quantization_config.quantization is not None:
            finish_loading(model, self.quantization_config.quantization)
            attach_quantization(model)
        if self.quantization_config.storage == "sparse":
            from . import sparse_storage  # transformers imports this module before it has what that one needs

            sparse_storage.finish_loading(model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        return packed_state_dict(model) if quantization_of(model) is not None else None, {}

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        dequantize(model)
        return model if dtype is None else model.to(dtype)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        if self.quantization_config.quantization is None and self.quantization_config.storage == "dense":
            return dtype  # as without a quantizer: every tensor is stored as the model holds it
        return super().get_new_dtype(converter, param, dtype)

    def _convert_model_for_quantization(self, model: nn.Module) -> None:
        return  # a walk for modules that other methods replace

    # Sparse tensors aside, a compressed checkpoint holds no tensor under a name that the model does not have, so there is
    # nothing to look for in the two walks through the model that the base class makes.

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        return

    def update_weight_conversions(self, weight_conversions: Any, model: nn.Module | None = None) -> Any:
        if self.quantization_config.storage == "dense":
            return weight_conversions
        from . import sparse_storage

        return sparse_storage.with_decoding(weight_conversions)

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


def attach_quantization(model: nn.Module) -> None:
    """Let a model of transformers carry how it is quantized, beside the record of its sizes.

    In its own copy of the configuration; where it is frozen, with the object that packs its weights at
    ``save_pretrained``. A model that is float again loses both.
    """
    config: Any = model.config
    scheme, record = quantization_of(model), record_of(model, may_be_quantized=True)
    storage = storage_of(config)
    own = copy.deepcopy(config)  # another model may have been built from the same configuration object
    if scheme is None and not record and storage == "dense":
        vars(own).pop("quantization_config", None)
    else:
        own.quantization_config = HfCompressConfig(record, quantization=scheme, storage=storage)
    for module in model.modules():
        if vars(module).get("config") is config:
            vars(module)["config"] = own
    if scheme is not None and scheme.format == "packed":
        vars(model)["hf_quantizer"] = HfCompressQuantizer(own.quantization_config)
    else:
        vars(model).pop("hf_quantizer", None)
