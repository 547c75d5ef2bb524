"""Configuration of a vision transformer whose layers have widths of their own.

A checkpoint may carry this file to people without hf_compress, so it imports nothing of it.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, NoReturn

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

_MOST_LAYERS = 1000  # config.json is untrusted input; these bound what a number in it can make us allocate here
_LARGEST_SIZE = 2**20


class LayerWidths(NamedTuple):
    """What may differ from layer to layer; see the fields of :class:`PrunedViTConfig`."""

    heads: int
    qk_dim: int
    v_dim: int
    intermediate_size: int
    attention_scale: float
    drop_path_rate: float


@strict
class PrunedViTConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of :class:`PrunedViTModel`. The defaults give ViT-B/16.

    Where a list is meant, with one entry per layer, a single number stands for the same in every layer.

    Args:
        image_size: pixels; one number or [height, width].
        patch_size: pixels; one number or [height, width].
        num_channels: channels of an image.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of layers.
        num_attention_heads: list, heads.
        qk_dims: list, query and key dimensions of each head. By default hidden_size / heads.
        v_dims: list, value dimensions of each head. By default as ``qk_dims``.
        intermediate_sizes: list, hidden units of the MLP; with ``use_swiglu_ffn`` of the gated product. By default
            4 ``hidden_size``.
        attention_scales: list, factor of the attention logits. By default 1 / sqrt(qk dimensions). A pruned model keeps
            the factor of the dense one: its logits are sums over fewer, unchanged products.
        norm_width: residual width in the denominators of every LayerNorm's mean and variance, as if the missing
            ``norm_width - hidden_size`` dimensions were there and zero. By default ``hidden_size``, the ordinary
            LayerNorm. With the dense width, cutting the residual stream is exactly masking it.
        hidden_act: name of the MLP's activation. SwiGLU always uses SiLU.
        use_swiglu_ffn: whether the MLP is gated (some DINOv2).
        qkv_bias: whether query, key and value have a bias.
        layer_scale_init_value: first value of the factors behind attention and MLP (DINOv2); None for no such factors.
        use_distillation_token: whether a second learned token follows the class token (DeiT).
        num_register_tokens: learned tokens without a position, behind those (DINOv2 with registers).
        interpolate_pos_encoding: whether images of other sizes are taken without being asked (DINOv2). If not, the
            forward pass has to be called with ``interpolate_pos_encoding=True``.
        antialias_pos_encoding: whether that interpolation has a low-pass filter (DINOv2 with registers).
        classifier_pooling: what the classifier reads. "cls": the class token. "cls_mean": the class token and the mean
            patch, concatenated (DINOv2). "cls_distillation": the class and the distillation token, with a classifier
            each, and the mean of their logits (DeiT).
        pooler_output_size: width of the dense layer on the class token that gives the base model's ``pooler_output``;
            None for no such layer.
        pooler_act: name of that layer's activation.
        layer_norm_eps: added to the variance of every LayerNorm.
        initializer_range: standard deviation of the first weights (truncated normal).
        embedding_dropout_prob, hidden_dropout_prob, attention_probs_dropout_prob: dropout of the embeddings, of what
            attention and MLP add to the residual stream, and of the attention weights.
        drop_path_rate: list, share of the examples of a batch for which a layer is skipped while training.
        apply_layernorm: whether a backbone's feature maps go through the last LayerNorm.
        reshape_hidden_states: whether a backbone's feature maps are [batch, hidden_size, height, width], of the patches
            alone; otherwise [batch, tokens, hidden_size].
        out_features, out_indices: which feature maps a backbone gives, of "stem", "stage1", ... or 0, 1, ...; by
            default the last.

    Raises:
        ValueError: naming the field that is not as said here.
        StrictDataclassError: of huggingface_hub, naming a field of another type.
    """

    model_type = "pruned_vit"

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int | list[int] = 12
    qk_dims: int | list[int] | None = None
    v_dims: int | list[int] | None = None
    intermediate_sizes: int | list[int] | None = None
    attention_scales: float | int | list[float | int] | None = None
    norm_width: int | None = None
    hidden_act: str = "gelu"
    use_swiglu_ffn: bool = False
    qkv_bias: bool = True
    layer_scale_init_value: float | int | None = None
    use_distillation_token: bool = False
    num_register_tokens: int = 0
    interpolate_pos_encoding: bool = False
    antialias_pos_encoding: bool = False
    classifier_pooling: Literal["cls", "cls_mean", "cls_distillation"] = "cls"
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    layer_norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02
    embedding_dropout_prob: float | int = 0.0
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int | list[float | int] = 0.0
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        # the types were checked when the fields were set
        self._check_size("num_hidden_layers", self.num_hidden_layers, _MOST_LAYERS)
        for name in ("num_channels", "hidden_size"):
            self._check_size(name, getattr(self, name))
        for name in ("norm_width", "pooler_output_size"):
            if getattr(self, name) is not None:
                self._check_size(name, getattr(self, name))
        for name in ("image_size", "patch_size"):
            self._check_pair(name)
        if any(image < patch for image, patch in zip(self.image_hw, self.patch_hw, strict=True)):
            self._refuse("patch_size", self.patch_size, f"must not exceed image_size ({self.image_size})")
        if self.norm_width is not None and self.norm_width < self.hidden_size:
            self._refuse("norm_width", self.norm_width, f"must be at least hidden_size ({self.hidden_size}), or null")

        self._fill("num_attention_heads")
        if self.qk_dims is None:
            heads = next((heads for heads in self.num_attention_heads if self.hidden_size % heads), None)
            if heads is not None:
                self._refuse("qk_dims", None, f"hidden_size ({self.hidden_size}) is not a multiple of {heads} heads")
            self.qk_dims = [self.hidden_size // heads for heads in self.num_attention_heads]
        self._fill("qk_dims")
        self._fill("v_dims", self.qk_dims)
        self._fill("intermediate_sizes", 4 * self.hidden_size)
        if self.attention_scales is None:
            self.attention_scales = [dims**-0.5 for dims in self.qk_dims]
        self._per_layer("attention_scales")
        for i, scale in enumerate(self.attention_scales):
            if not (math.isfinite(scale) and scale > 0):
                self._refuse(f"attention_scales[{i}]", scale, "must be a positive number")

        if not 0 <= self.num_register_tokens <= _LARGEST_SIZE:
            self._refuse("num_register_tokens", self.num_register_tokens, f"must be from 0 to {_LARGEST_SIZE}")
        if self.classifier_pooling == "cls_distillation" and not self.use_distillation_token:
            self._refuse("classifier_pooling", self.classifier_pooling, "needs use_distillation_token")
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                self._refuse(name, value, "must be a finite number, not below 0")
        if self.layer_scale_init_value is not None and not math.isfinite(self.layer_scale_init_value):
            self._refuse("layer_scale_init_value", self.layer_scale_init_value, "must be a finite number or null")
        for name in ("embedding_dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob"):
            self._check_probability(name, getattr(self, name))
        self._per_layer("drop_path_rate")
        for i, rate in enumerate(self.drop_path_rate):
            self._check_probability(f"drop_path_rate[{i}]", rate)

        self.stage_names = ["stem", *(f"stage{i}" for i in range(1, self.num_hidden_layers + 1))]
        kwargs.pop("stage_names", None)  # follows from the number of layers; a saved configuration repeats it
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    def layer_widths(self, layer: int) -> LayerWidths:
        """The widths of one layer, counted from 0."""
        lists: Any = (
            self.num_attention_heads,
            self.qk_dims,
            self.v_dims,
            self.intermediate_sizes,
            self.attention_scales,
            self.drop_path_rate,
        )
        return LayerWidths(*(values[layer] for values in lists))

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return _pair(self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return _pair(self.patch_size)

    def _fill(self, name: str, default: int | list[int] | None = None) -> None:
        """Make a field a list of valid sizes, one per layer."""
        if getattr(self, name) is None:
            setattr(self, name, default)
        self._per_layer(name)
        for i, size in enumerate(getattr(self, name)):
            self._check_size(f"{name}[{i}]", size)

    def _per_layer(self, name: str) -> None:
        value = getattr(self, name)
        value = list(value) if isinstance(value, list) else [value] * self.num_hidden_layers
        if len(value) != self.num_hidden_layers:
            self._refuse(name, value, f"has {len(value)} entries; num_hidden_layers is {self.num_hidden_layers}")
        setattr(self, name, value)

    def _check_pair(self, name: str) -> None:
        value = getattr(self, name)
        sizes: Iterable[int] = value if isinstance(value, (list, tuple)) else (value,)
        if isinstance(value, (list, tuple)) and len(value) != 2:
            self._refuse(name, value, "must be one size, or height and width")
        for size in sizes:
            self._check_size(name, size)

    def _check_size(self, name: str, value: int, most: int = _LARGEST_SIZE) -> None:
        if not 1 <= value <= most:
            self._refuse(name, value, f"must be from 1 to {most}")

    def _check_probability(self, name: str, value: float) -> None:
        if not 0 <= value < 1:
            self._refuse(name, value, "must be at least 0 and below 1")

    def _refuse(self, name: str, value: Any, why: str) -> NoReturn:
        shown = repr(value)
        raise ValueError(f"{type(self).__name__}: {name}={shown if len(shown) < 80 else shown[:80] + '...'}: {why}.")


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


__all__ = ["PrunedViTConfig"]
