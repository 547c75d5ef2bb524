"""A vision transformer whose layers have widths of their own: what a pruned ViT, DeiT or DINOv2 becomes.

Every layer has its own number of heads, query/key and value dimensions of a head, and MLP width, and the residual stream
may be narrower than the one that the LayerNorms were trained on. Architectures: Dosovitskiy et al. 2021 (ViT,
arXiv 2010.11929), Touvron et al. 2021 (DeiT, 2012.12877), Oquab et al. 2023 (DINOv2, 2304.07193), Darcet et al. 2023
(registers, 2309.16588). What is searched follows Xue et al. 2022 (arXiv 2204.07722) and Chavan et al. 2022
(ViT-Slim, 2201.00814); widths per layer are our reconstruction.

A checkpoint may carry this file to people without hf_compress, so it imports nothing of it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_pruned_vit import LayerWidths, PrunedViTConfig


class PrunedViTLayerNorm(nn.LayerNorm):
    """LayerNorm over ``norm_width`` dimensions, of which those beyond the input's are zero and left out.

    With n dimensions of mean m and variance v, and a share s = n / norm_width, the mean over all of them is s m and the
    variance s (v + (1 - s) m^2): the statistics of the dense stream with the missing dimensions masked.
    """

    def __init__(self, config: PrunedViTConfig):
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)
        self.norm_width = config.norm_width or config.hidden_size

    def forward(self, hidden_states: Tensor) -> Tensor:
        size = self.weight.shape[0]
        if size == self.norm_width:
            return super().forward(hidden_states)
        share = size / self.norm_width
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
        variance = share * (variance + (1 - share) * mean**2)
        normalized = (wide - share * mean) * torch.rsqrt(variance + self.eps)
        return normalized.to(hidden_states.dtype) * self.weight + self.bias


class PrunedViTPatchEmbeddings(nn.Module):
    """Image to patches: [batch, channels, height, width] -> [batch, patches, hidden_size]."""

    def __init__(self, config: PrunedViTConfig):
        super().__init__()
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_hw, stride=config.patch_hw)

    def forward(self, pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.to(self.projection.weight.dtype)
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class PrunedViTEmbeddings(nn.Module):
    """Class token, distillation token, registers and patches, in this order; all but the registers with a position."""

    def __init__(self, config: PrunedViTConfig):
        super().__init__()
        width = config.hidden_size
        self.image_hw, self.patch_hw = config.image_hw, config.patch_hw
        self.grid = tuple(image // patch for image, patch in zip(self.image_hw, self.patch_hw, strict=True))
        self.interpolates = config.interpolate_pos_encoding
        self.antialias = config.antialias_pos_encoding
        self.num_positioned_tokens = 2 if config.use_distillation_token else 1
        self.num_tokens = self.num_positioned_tokens + config.num_register_tokens
        """How many tokens stand before the patches."""

        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, width)) if config.use_distillation_token else None
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, config.num_register_tokens, width)) if config.num_register_tokens else None
        )
        self.patch_embeddings = PrunedViTPatchEmbeddings(config)
        num_positions = self.num_positioned_tokens + self.grid[0] * self.grid[1]
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, width))
        self.dropout = nn.Dropout(config.embedding_dropout_prob)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = None) -> Tensor:
        """Float [batch, channels, height, width] -> [batch, tokens + patches, hidden_size]."""
        batch, _, height, width = pixel_values.shape
        interpolates = self.interpolates if interpolate_pos_encoding is None else interpolate_pos_encoding
        if not interpolates and (height, width) != self.image_hw:
            raise ValueError(
                f"The images have {height} x {width} pixels; the model was made for {self.image_hw[0]} x "
                f"{self.image_hw[1]}. Resize them, or pass interpolate_pos_encoding=True."
            )
        patches = self.patch_embeddings(pixel_values)
        tokens = [self.cls_token] if self.distillation_token is None else [self.cls_token, self.distillation_token]
        grid = (height // self.patch_hw[0], width // self.patch_hw[1])
        hidden_states = torch.cat([*(token.expand(batch, -1, -1) for token in tokens), patches], dim=1)
        hidden_states = hidden_states + self._positions(grid)
        if self.register_tokens is not None:
            first = self.num_positioned_tokens
            registers = self.register_tokens.expand(batch, -1, -1)
            hidden_states = torch.cat([hidden_states[:, :first], registers, hidden_states[:, first:]], dim=1)
        return self.dropout(hidden_states)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """[1, tokens + patches, hidden_size] for that many rows and columns of patches."""
        if grid == self.grid:
            return self.position_embeddings
        first = self.num_positioned_tokens
        tokens, patches = self.position_embeddings[:, :first], self.position_embeddings[:, first:]
        # in float32 at least, since bicubic weights in half precision shift the embeddings
        maps = patches.unflatten(1, self.grid).permute(0, 3, 1, 2)
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        maps = F.interpolate(maps, size=grid, mode="bicubic", align_corners=False, antialias=self.antialias)
        return torch.cat([tokens, maps.flatten(2).transpose(1, 2).to(tokens.dtype)], dim=1)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention that gives its weights, too.

    Args:
        module: the attention layer.
        query, key: [batch, heads, tokens, qk dimensions].
        value: [batch, heads, tokens, v dimensions].
        attention_mask: added to the logits.
        scaling: factor of the logits.
        dropout: of the weights.

    Returns:
        [batch, tokens, heads, v dimensions], and the weights [batch, heads, tokens, tokens].
    """
    logits = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class PrunedViTAttention(nn.Module):
    """Self-attention of one layer, with its own heads, dimensions and logit scale."""

    def __init__(self, config: PrunedViTConfig, widths: LayerWidths):
        super().__init__()
        self.config = config
        self.num_attention_heads = widths.heads
        self.scaling = widths.attention_scale
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False

        qk, v = widths.heads * widths.qk_dim, widths.heads * widths.v_dim
        self.q_proj = nn.Linear(config.hidden_size, qk, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, qk, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, v, bias=config.qkv_bias)
        self.o_proj = nn.Linear(v, config.hidden_size)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        by_head = (*hidden_states.shape[:-1], self.num_attention_heads, -1)
        query, key, value = (
            projection(hidden_states).view(by_head).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        implementation = self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        v_dim = value.shape[-1]
        if "flash" in (implementation or ""):
            query, key, value = _to_one_width(query, key, value)
        context, weights = attend(
            self,
            query,
            key,
            value,
            None,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        if context.shape[-1] != v_dim:
            context = context[..., :v_dim]
        return self.o_proj(context.reshape(*hidden_states.shape[:-1], -1)), weights


def _to_one_width(*tensors: Tensor) -> list[Tensor]:
    """Zeros behind the last dimension, which change no logit: flash attention knows one head dimension only."""
    widest = max(tensor.shape[-1] for tensor in tensors)
    return [F.pad(tensor, (0, widest - tensor.shape[-1])) for tensor in tensors]


class PrunedViTMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: PrunedViTConfig, widths: LayerWidths):
        super().__init__()
        self.activation_fn = _activation("hidden_act", config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, widths.intermediate_size)
        self.fc2 = nn.Linear(widths.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class PrunedViTSwiGLU(nn.Module):
    """Gated MLP: one linear layer's SiLU times another one, and a third behind them."""

    def __init__(self, config: PrunedViTConfig, widths: LayerWidths):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, widths.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, widths.intermediate_size)
        self.down_proj = nn.Linear(widths.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class PrunedViTLayerScale(nn.Module):
    """A learned factor for every dimension of what a branch adds to the residual stream."""

    def __init__(self, width: int, init_value: float):
        super().__init__()
        self.init_value = init_value
        self.lambda1 = nn.Parameter(torch.full((width,), float(init_value)))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.lambda1


def _layer_scale(config: PrunedViTConfig) -> nn.Module:
    value = config.layer_scale_init_value
    return nn.Identity() if value is None else PrunedViTLayerScale(config.hidden_size, value)


class PrunedViTDropPath(nn.Module):
    """Stochastic depth: while training, a share of the examples gets nothing from this branch, the others more."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return hidden_states
        kept = torch.empty_like(hidden_states[:, :1, :1]).bernoulli_(1 - self.rate)
        return hidden_states * (kept / (1 - self.rate))


class PrunedViTLayer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: PrunedViTConfig, layer: int):
        super().__init__()
        widths = config.layer_widths(layer)
        mlp = PrunedViTSwiGLU if config.use_swiglu_ffn else PrunedViTMLP
        self.layernorm_before = PrunedViTLayerNorm(config)
        self.attention = PrunedViTAttention(config, widths)
        self.layer_scale1 = _layer_scale(config)
        self.layernorm_after = PrunedViTLayerNorm(config)
        self.mlp = mlp(config, widths)
        self.layer_scale2 = _layer_scale(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = PrunedViTDropPath(widths.drop_path_rate)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        branch, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(self.dropout(branch)))
        branch = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.layer_scale2(self.dropout(branch)))


class PrunedViTPooler(nn.Module):
    """One dense layer on the class token."""

    def __init__(self, config: PrunedViTConfig, output_size: int):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, output_size)
        self.activation = _activation("pooler_act", config.pooler_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.dense(hidden_states[:, 0]))


def _activation(field: str, name: str) -> nn.Module:
    if name not in ACT2FN:
        raise ValueError(f"PrunedViTConfig: {field}={name[:60]!r}: not one of {', '.join(sorted(ACT2FN))}.")
    return ACT2FN[name]


class PrunedViTPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and what transformers wants to know about the model."""

    config: PrunedViTConfig
    base_model_prefix = "pruned_vit"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PrunedViTEmbeddings", "PrunedViTLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = False  # it needs head dimensions that are powers of two
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": PrunedViTLayer, "attentions": PrunedViTAttention}  # noqa: RUF012
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, PrunedViTEmbeddings):
            for parameter in module._parameters.values():
                if parameter is not None:
                    init.trunc_normal_(parameter, std=std)
        elif isinstance(module, PrunedViTLayerScale):
            init.constant_(module.lambda1, module.init_value)
        else:
            super()._init_weights(module)


class PrunedViTModel(PrunedViTPreTrainedModel):
    """The vision transformer without a task.

    Args:
        config: widths of all layers.
        add_pooling_layer: whether to have the dense layer that ``config.pooler_output_size`` asks for.
    """

    def __init__(self, config: PrunedViTConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = PrunedViTEmbeddings(config)
        self.layers = nn.ModuleList(PrunedViTLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.layernorm = PrunedViTLayerNorm(config)
        pooler_output_size = config.pooler_output_size if add_pooling_layer else None
        self.pooler = None if pooler_output_size is None else PrunedViTPooler(config, pooler_output_size)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Features of images.

        Args:
            pixel_values: float [batch, config.num_channels, height, width].
            interpolate_pos_encoding: whether images may have another size than ``config.image_size``; by default what
                ``config.interpolate_pos_encoding`` says.
            output_attentions, output_hidden_states: whether to return these, too. Attentions need
                ``attn_implementation="eager"``.
            return_dict: False gives a tuple.

        Returns:
            ``last_hidden_state``: [batch, tokens, hidden_size], after the last LayerNorm;
            ``pooler_output``: [batch, config.pooler_output_size], or the class token [batch, hidden_size];
            ``hidden_states``: before the first layer and after each, [batch, tokens, hidden_size];
            ``attentions``: of each layer, [batch, heads of the layer, tokens, tokens].

        Raises:
            ValueError: when the size of the images is not the model's, and need not be taken.
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        pooled = hidden_states[:, 0] if self.pooler is None else self.pooler(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class PrunedViTForImageClassification(PrunedViTPreTrainedModel):
    """The vision transformer with a linear classifier on what ``config.classifier_pooling`` says."""

    def __init__(self, config: PrunedViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.pruned_vit = PrunedViTModel(config, add_pooling_layer=False)
        features = config.hidden_size * (2 if config.classifier_pooling == "cls_mean" else 1)
        self.classifier = nn.Linear(features, config.num_labels) if config.num_labels else nn.Identity()
        if config.classifier_pooling == "cls_distillation":
            self.distillation_classifier = (
                nn.Linear(features, config.num_labels) if config.num_labels else nn.Identity()
            )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: float [batch, config.num_channels, height, width].
            labels: int64 [batch], or what ``config.problem_type`` needs; with them the output has a loss.
            interpolate_pos_encoding, output_attentions, output_hidden_states, return_dict: see :class:`PrunedViTModel`.
        """
        outputs = self.pruned_vit(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        hidden_states = outputs.last_hidden_state
        features = hidden_states[:, 0]
        if self.config.classifier_pooling == "cls_mean":
            patches = hidden_states[:, self.pruned_vit.embeddings.num_tokens :]
            features = torch.cat([features, patches.mean(dim=1)], dim=1)
        logits = self.classifier(features)
        if self.config.classifier_pooling == "cls_distillation":
            logits = (logits + self.distillation_classifier(hidden_states[:, 1])) / 2
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class PrunedViTBackbone(BackboneMixin, PrunedViTPreTrainedModel):
    """The vision transformer as a backbone: a feature map from each of ``config.out_features``."""

    def __init__(self, config: PrunedViTConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.pruned_vit = PrunedViTModel(config, add_pooling_layer=False)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = None, **kwargs: Any
    ) -> BackboneOutput:
        """Feature maps of images.

        Args:
            pixel_values: float [batch, config.num_channels, height, width].
            interpolate_pos_encoding, output_attentions, output_hidden_states, return_dict: see :class:`PrunedViTModel`.

        Returns:
            ``feature_maps``: [batch, hidden_size, height / patch, width / patch] each, unless
            ``config.reshape_hidden_states`` is off.
        """
        outputs = self.pruned_vit(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        embeddings = self.pruned_vit.embeddings
        grid = [size // patch for size, patch in zip(pixel_values.shape[-2:], embeddings.patch_hw, strict=True)]
        maps = []
        for stage, hidden_states in zip(self.stage_names, outputs.hidden_states, strict=True):
            if stage not in self.out_features:
                continue
            if self.config.apply_layernorm:
                hidden_states = self.pruned_vit.layernorm(hidden_states)
            if self.config.reshape_hidden_states:
                patches = hidden_states[:, embeddings.num_tokens :]
                hidden_states = patches.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()
            maps.append(hidden_states)
        return BackboneOutput(
            feature_maps=tuple(maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["PrunedViTBackbone", "PrunedViTForImageClassification", "PrunedViTModel", "PrunedViTPreTrainedModel"]
