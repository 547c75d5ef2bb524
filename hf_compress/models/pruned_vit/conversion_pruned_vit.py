"""From a vision transformer of transformers, shrunk or dense, to a :class:`PrunedViTModel` that computes the same.

A shrunk model of transformers is its dense configuration and a record of what is gone, and needs hf_compress to load. A
PrunedViT has its widths in its configuration.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.errors import ModelError

from .configuration_pruned_vit import PrunedViTConfig
from .modeling_pruned_vit import (
    PrunedViTBackbone,
    PrunedViTForImageClassification,
    PrunedViTModel,
    PrunedViTPreTrainedModel,
)


@dataclass(frozen=True)
class _Source:
    """How a class of transformers maps to ours: the class, its configuration's part of ours, and fields to add."""

    target: type[PrunedViTPreTrainedModel]
    settings: Callable[[Any], dict[str, Any]]
    extra: tuple[tuple[str, Any], ...] = ()


def _vit(config: Any) -> dict[str, Any]:
    return {
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "embedding_dropout_prob": config.hidden_dropout_prob,
        "pooler_act": config.pooler_act,
    }


def _deit(config: Any) -> dict[str, Any]:
    return {**_vit(config), "use_distillation_token": True}


def _dinov2(config: Any) -> dict[str, Any]:
    return {
        "embedding_dropout_prob": config.hidden_dropout_prob,
        "drop_path_rate": config.drop_path_rate,
        "layer_scale_init_value": config.layerscale_value,
        "use_swiglu_ffn": config.use_swiglu_ffn,
        "interpolate_pos_encoding": True,
        "classifier_pooling": "cls_mean",
        "apply_layernorm": config.apply_layernorm,
        "reshape_hidden_states": config.reshape_hidden_states,
    }


def _dinov2_with_registers(config: Any) -> dict[str, Any]:
    return {**_dinov2(config), "antialias_pos_encoding": True}


_OWN_FIELDS = (
    "use_swiglu_ffn", "layer_scale_init_value", "use_distillation_token", "interpolate_pos_encoding",
    "antialias_pos_encoding", "classifier_pooling", "pooler_act", "embedding_dropout_prob", "hidden_dropout_prob",
    "apply_layernorm", "reshape_hidden_states",
)  # fmt: skip


def _own(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _OWN_FIELDS}


_SOURCES: dict[type, _Source] = {
    transformers.ViTModel: _Source(PrunedViTModel, _vit),
    transformers.ViTForImageClassification: _Source(PrunedViTForImageClassification, _vit),
    transformers.DeiTModel: _Source(PrunedViTModel, _deit),
    transformers.DeiTForImageClassification: _Source(PrunedViTForImageClassification, _deit),
    transformers.DeiTForImageClassificationWithTeacher: _Source(
        PrunedViTForImageClassification, _deit, (("classifier_pooling", "cls_distillation"),)
    ),
    transformers.Dinov2Model: _Source(PrunedViTModel, _dinov2),
    transformers.Dinov2ForImageClassification: _Source(PrunedViTForImageClassification, _dinov2),
    transformers.Dinov2Backbone: _Source(PrunedViTBackbone, _dinov2),
    transformers.Dinov2WithRegistersModel: _Source(PrunedViTModel, _dinov2_with_registers),
    transformers.Dinov2WithRegistersForImageClassification: _Source(
        PrunedViTForImageClassification, _dinov2_with_registers
    ),
    transformers.Dinov2WithRegistersBackbone: _Source(PrunedViTBackbone, _dinov2_with_registers),
    PrunedViTModel: _Source(PrunedViTModel, _own),
    PrunedViTForImageClassification: _Source(PrunedViTForImageClassification, _own),
    PrunedViTBackbone: _Source(PrunedViTBackbone, _own),
}

_COMMON_FIELDS = (
    "image_size", "patch_size", "num_channels", "hidden_act", "initializer_range", "attention_probs_dropout_prob",
    "id2label", "label2id", "problem_type",
)  # fmt: skip

_RENAMED = (
    (r"^encoder\.layer\.", "layers."),
    (r"^(layers\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"^(layers\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"^cls_classifier\.", "classifier."),
)


def to_pruned_vit(
    model: PreTrainedModel, *, norm_width: int | None = None
) -> PrunedViTForImageClassification | PrunedViTModel | PrunedViTBackbone:
    """Convert a vision transformer, shrunk or not, into a PrunedViT with the same outputs.

    All sizes are read from the modules. Weights are copied, with their dtype, device and ``requires_grad``; the model
    given stays as it is. What only masked-image pre-training uses (DINOv2's mask token) is left out.

    Args:
        model: a ViT, DeiT or DINOv2 (with registers) of transformers, as base model, classifier or backbone; or a
            PrunedViT that was shrunk since, whose new widths then go into its configuration.
        norm_width: the dense residual width, where the residual stream was cut and every LayerNorm shall go on as if
            the missing dimensions were there and zero. The result then computes what the masked dense model does, and
            not what ``model`` does. By default each LayerNorm stays what it is.

    Returns:
        The model of the same kind, in the same mode. Its base model's ``pooler_output`` is the class token where
        ``model`` has no pooler.

    Raises:
        ModelError: when the model is of another class, or its layers are not as that class builds them.
    """
    source = _SOURCES.get(type(model))
    if source is None:
        names = ", ".join(sorted(kind.__name__ for kind in _SOURCES))
        raise ModelError(
            f"{type(model).__name__} cannot become a PrunedViT; {names} can. Other models stay what they are when they "
            "are shrunk: save_pretrained keeps their record."
        )
    base = model.pruned_vit if isinstance(model, PrunedViTBackbone) else model.base_model
    try:
        config = _configuration(model, base, source, norm_width)
    except (AttributeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"This {type(model).__name__} has not the modules and widths that its class builds: {error}"
        ) from error
    with torch.device("meta"):
        target = source.target(config)
    tensors = _tensors(model, base, target)
    result = target.state_dict()
    wrong = sorted(tensors.keys() ^ result.keys()) or [
        name for name, tensor in tensors.items() if tensor.shape != result[name].shape
    ]
    if wrong:
        raise ModelError(
            f"This {type(model).__name__} is not as its class builds it: {', '.join(wrong[:3])} does not fit. Finish or "
            "undo what changed its modules (a search, a parametrization, an adapter) before the conversion."
        )
    target.load_state_dict({name: tensor.detach().clone() for name, tensor in tensors.items()}, assign=True)
    for name, parameter in target.named_parameters():
        parameter.requires_grad_(tensors[name].requires_grad)
    return target.train(model.training)  # type: ignore[return-value]


def _configuration(model: PreTrainedModel, base: Any, source: _Source, norm_width: int | None) -> PrunedViTConfig:
    """The widths of the modules, and everything else from the model's configuration."""
    layers = _layers(base)
    attentions = [layer.attention for layer in layers]
    heads = [attention.num_attention_heads for attention in attentions]
    width = base.embeddings.patch_embeddings.projection.weight.shape[0]
    norms = [module for module in base.modules() if isinstance(module, nn.LayerNorm)]
    (kept_width,) = {getattr(norm, "norm_width", width) for norm in norms}
    (eps,) = {norm.eps for norm in norms}
    pooler = getattr(base, "pooler", None)
    registers = getattr(base.embeddings, "register_tokens", None)
    settings = {
        **{name: copy.deepcopy(getattr(model.config, name)) for name in _COMMON_FIELDS},
        **source.settings(model.config),
        **dict(source.extra),
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": [int(count) for count in heads],
        "qk_dims": [_per_head(attention.q_proj, count) for attention, count in zip(attentions, heads, strict=True)],
        "v_dims": [_per_head(attention.v_proj, count) for attention, count in zip(attentions, heads, strict=True)],
        "intermediate_sizes": [_hidden(layer.mlp) for layer in layers],
        "attention_scales": [float(attention.scaling) for attention in attentions],
        "norm_width": norm_width or (kept_width if kept_width != width else None),
        "layer_norm_eps": eps,
        "qkv_bias": any(p.bias is not None for a in attentions for p in (a.q_proj, a.k_proj, a.v_proj)),
        "pooler_output_size": None if pooler is None else pooler.dense.weight.shape[0],
        "num_register_tokens": 0 if registers is None else registers.shape[1],
        "dtype": model.dtype,
        "attn_implementation": model.config._attn_implementation,
    }
    if source.target is PrunedViTBackbone:  # others may have lost the layer that it names by default
        settings["out_features"] = model.config.out_features
    if source.settings is _own:
        settings["drop_path_rate"] = [layer.drop_path.rate for layer in layers]
    return PrunedViTConfig(**settings)


def _layers(base: Any) -> list[Any]:
    encoder = getattr(base, "encoder", None)
    return list(base.layers if encoder is None else encoder.layer)


def _per_head(projection: Any, heads: int) -> int:
    size = projection.weight.shape[0]
    if size % heads:
        raise ValueError(f"a projection has {size} outputs for {heads} heads")
    return size // heads


def _hidden(mlp: Any) -> int:
    return (mlp.gate_proj if hasattr(mlp, "gate_proj") else mlp.fc1).weight.shape[0]


def _tensors(model: nn.Module, base: nn.Module, target: PrunedViTPreTrainedModel) -> dict[str, Tensor]:
    """The model's parameters and buffers under the names that they have in the target."""
    prefix = next((f"{name}." for name, module in model.named_modules() if name and module is base), "")
    new_prefix = "" if isinstance(target, PrunedViTModel) else f"{target.base_model_prefix}."
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        is_base = name.startswith(prefix)
        name = name.removeprefix(prefix) if is_base else name
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if name == "embeddings.mask_token" or tensor.numel() == 0:
            continue
        found[new_prefix + name if is_base else name] = tensor
    for name, tensor in target.state_dict().items():
        # one layer may have got a bias that another one has not; only there is a bias of ours without a counterpart
        if name not in found and re.search(r"\.[qkv]_proj\.bias$", name):
            weight = found.get(name.removesuffix("bias") + "weight")
            if weight is not None:
                found[name] = torch.zeros(tensor.shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
    return found


__all__ = ["to_pruned_vit"]
