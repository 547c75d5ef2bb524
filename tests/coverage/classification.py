"""Every image classifier of transformers: small, random, ready for the checks of coverage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as t
from families import images, perturb
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Tensor]]

VIT: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
"""A small vision transformer, in the words that most configurations share."""

PYRAMID: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}


def lcnet_blocks() -> list[Any]:
    """Depthwise blocks of the PP-LCNet family: kernel, width in, width out, stride, squeeze-and-excite."""
    return [
        [[3, 8, 8, 1, False]], [[3, 8, 12, 2, False]], [[3, 12, 16, 2, True]],
        [[3, 16, 24, 2, False], [5, 24, 24, 1, False]], [[5, 24, 32, 2, True], [5, 32, 32, 1, False]],
    ]  # fmt: skip


CONFIGS: dict[str, Callable[[], tuple[t.PretrainedConfig, int]]] = {
    "beit": lambda: (t.BeitConfig(use_relative_position_bias=True, **VIT), 32),
    "bit": lambda: (t.BitConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4), 32),
    "clip": lambda: (t.CLIPConfig(vision_config=VIT), 32),
    "convnext": lambda: (t.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], image_size=32), 32),
    "convnextv2": lambda: (t.ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], image_size=32), 32),
    "cvt": lambda: (t.CvtConfig(embed_dim=[8, 16, 24], num_heads=[1, 2, 3], depth=[1, 2, 3]), 64),
    "data2vec-vision": lambda: (t.Data2VecVisionConfig(use_relative_position_bias=True, **VIT), 32),
    "deit": lambda: (t.DeiTConfig(**VIT), 32),
    "dinov2": lambda: (t.Dinov2Config(**{**VIT, "mlp_ratio": 2}), 32),
    "dinov2_with_registers": lambda: (t.Dinov2WithRegistersConfig(**{**VIT, "mlp_ratio": 2}), 32),
    "donut-swin": lambda: (
        t.DonutSwinConfig(image_size=32, patch_size=2, embed_dim=12, depths=[2, 1], num_heads=[2, 3], window_size=4),
        32,
    ),
    "efficientnet": lambda: (
        t.EfficientNetConfig(
            image_size=32, width_coefficient=0.25, depth_coefficient=1.0, hidden_dim=320, kernel_sizes=[3, 3, 5],
            in_channels=[32, 16, 24], out_channels=[16, 24, 40], strides=[1, 2, 2], num_block_repeats=[1, 2, 1],
            expand_ratios=[1, 4, 4],
        ),
        32,
    ),
    "focalnet": lambda: (
        t.FocalNetConfig(
            image_size=32, patch_size=2, embed_dim=8, hidden_sizes=[12, 16], depths=[1, 2], focal_levels=[2, 2],
            focal_windows=[3, 3], mlp_ratio=2.0,
        ),
        32,
    ),
    "hgnet_v2": lambda: (
        t.HGNetV2Config(
            stem_channels=[3, 6, 8], stage_in_channels=[8, 10, 12, 16], stage_mid_channels=[6, 6, 8, 10],
            stage_out_channels=[10, 12, 16, 24], hidden_sizes=[10, 12, 16, 24], stage_num_blocks=[1, 1, 2, 1],
            stage_numb_of_layers=[2, 2, 2, 2], depths=[1, 1, 2, 1], embedding_size=8,
        ),
        64,
    ),
    "hiera": lambda: (
        t.HieraConfig(image_size=[64, 64], embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]),
        64,
    ),
    "ijepa": lambda: (t.IJepaConfig(**VIT), 32),
    "imagegpt": lambda: (t.ImageGPTConfig(vocab_size=17, n_positions=16, n_embd=24, n_layer=2, n_head=3), 0),
    "levit": lambda: (
        t.LevitConfig(
            image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], depths=[1, 1, 1],
            key_dim=[8, 8, 8], down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]],
        ),
        64,
    ),
    "metaclip_2": lambda: (t.MetaClip2Config(vision_config=VIT), 32),
    "mobilenet_v1": lambda: (t.MobileNetV1Config(image_size=32, depth_multiplier=0.1, min_depth=4), 32),
    "mobilenet_v2": lambda: (
        t.MobileNetV2Config(image_size=32, depth_multiplier=0.25, min_depth=4, depth_divisible_by=4),
        32,
    ),
    "mobilevit": lambda: (
        t.MobileViTConfig(
            image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 12, 16, 20, 24, 28, 48]
        ),
        64,
    ),
    "mobilevitv2": lambda: (
        t.MobileViTV2Config(
            image_size=64, width_multiplier=0.25, n_attn_blocks=[1, 1, 1], base_attn_unit_dims=[32, 48, 64]
        ),
        64,
    ),
    "perceiver": lambda: (perceiver(), 16),
    "poolformer": lambda: (t.PoolFormerConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]), 64),
    "pp_lcnet": lambda: (t.PPLCNetConfig(divisor=4, stem_channels=8, block_configs=lcnet_blocks(), class_expand=40), 64),
    "pvt": lambda: (t.PvtConfig(image_size=64, mlp_ratios=[2, 2, 2, 2], **PYRAMID), 64),
    "pvt_v2": lambda: (t.PvtV2Config(image_size=64, mlp_ratios=[2, 2, 2, 2], **PYRAMID), 64),
    "regnet": lambda: (
        t.RegNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8, layer_type="y"),
        32,
    ),
    "resnet": lambda: (t.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2]), 32),
    "segformer": lambda: (t.SegformerConfig(**PYRAMID), 64),
    "shieldgemma2": lambda: (
        t.ShieldGemma2Config(
            text_config={
                "vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8,
            },
            vision_config=VIT, mm_tokens_per_image=4, image_token_index=39, boi_token_index=37, eoi_token_index=38, yes_token_index=5,
            no_token_index=6,
        ),
        32,
    ),
    "siglip": lambda: (t.SiglipConfig(vision_config=VIT), 32),
    "siglip2": lambda: (t.Siglip2Config(vision_config={**VIT, "num_patches": 16}), 32),
    "swiftformer": lambda: (t.SwiftFormerConfig(image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32]), 64),
    "swin": lambda: (
        t.SwinConfig(image_size=32, patch_size=2, embed_dim=12, depths=[2, 1], num_heads=[2, 3], window_size=4),
        32,
    ),
    "swinv2": lambda: (
        t.Swinv2Config(image_size=32, patch_size=2, embed_dim=12, depths=[2, 1], num_heads=[2, 3], window_size=4),
        32,
    ),
    "textnet": lambda: (
        t.TextNetConfig(stem_out_channels=8, hidden_sizes=[8, 8, 12, 16, 24], image_size=[64, 64]),
        64,
    ),
    "timm_wrapper": lambda: (
        t.TimmWrapperConfig(
            architecture="resnet18", do_pooling=True, model_args={"channels": [8, 8, 16, 16], "stem_width": 8}
        ),
        32,
    ),
    "vit": lambda: (t.ViTConfig(**VIT), 32),
    "vit_msn": lambda: (t.ViTMSNConfig(**VIT), 32),
}  # fmt: skip
"""Model type -> a small configuration and the size of its images."""


def perceiver() -> t.PerceiverConfig:
    return t.PerceiverConfig(
        image_size=16, num_latents=6, d_latents=24, num_blocks=1, num_self_attends_per_block=2,
        num_self_attention_heads=3, num_cross_attention_heads=1,
    )  # fmt: skip


def _image_tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(32).reshape(2, 16) % 17}


def patches(side: int = 4, patch: int = 8) -> dict[str, Tensor]:
    """Images as flattened patches, with a mask and the number of rows and columns: what NaFlex models take."""
    count = side * side
    return {
        "pixel_values": torch.randn(2, count, 3 * patch * patch, generator=torch.Generator().manual_seed(1)),
        "pixel_attention_mask": torch.ones(2, count, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[side, side], [side, side]]),
    }


def _prompted_image() -> dict[str, Tensor]:
    tokens = torch.tensor([2, 37, 39, 39, 39, 39, 38, 5, 6, 7])
    return {
        "pixel_values": images(32),
        "input_ids": tokens.expand(2, -1).clone(),
        "attention_mask": torch.ones(2, len(tokens), dtype=torch.int64),
        "token_type_ids": (tokens == 39).long().expand(2, -1).clone(),
    }


OTHER_INPUTS: Mapping[str, Callable[[], dict[str, Tensor]]] = {
    "imagegpt": _image_tokens,
    "shieldgemma2": _prompted_image,
    "siglip2": patches,
}
"""Model type -> its inputs, where these are not one batch of images."""


def inputs_of(model_type: str, size: int) -> dict[str, Tensor]:
    """Two examples for a model type."""
    return OTHER_INPUTS[model_type]() if model_type in OTHER_INPUTS else {"pixel_values": images(size)}


def classifier(model_type: str, which: int = 0, size: int | None = None) -> Callable[[], Built]:
    """The classifier of a model type; ``which`` counts where there are several, ``size`` is that of its images."""

    def build() -> Built:
        torch.manual_seed(0)
        config, usual = CONFIGS[model_type]()
        config.num_labels = 7
        kinds = t.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
        model = (kinds[which] if isinstance(kinds, tuple) else kinds)(config)
        return perturb(model), inputs_of(model_type, size or usual)

    return build


ARCHITECTURES: dict[str, Callable[[], Built]] = {
    **{model_type: classifier(model_type) for model_type in CONFIGS},
    "deit, with a teacher": classifier("deit", 1),
    "levit, with a teacher": classifier("levit", 1),
    "perceiver, Fourier features": classifier("perceiver", 1, size=32),
    "perceiver, convolutions": classifier("perceiver", 2, size=32),
}

CANNOT: dict[str, str] = {
    "dinat": "needs natten2dqkrpb and natten2dav of the package natten: 0.21.7 no longer has both, and 0.17.5 "
    "and 0.15.1 do not compile against torch 2.14",
}
"""Model type -> why it cannot be built here."""

WITHOUT: dict[str, set[str]] = {
    "convnextv2": {"masked"},  # its response normalisation takes a mean over the units of the MLP
}
"""Architecture -> checks that do not apply to it, for want of an exact axis."""
