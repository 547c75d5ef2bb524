"""Every backbone of transformers, and the vision towers that other models are built around: small and random."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import transformers as t
from classification import CONFIGS, VIT, lcnet_blocks, patches
from families import images, perturb
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Tensor]]

_HALF = {**VIT, "mlp_ratio": 2}
_BLOCKS = {key: value for key, value in _HALF.items() if key != "intermediate_size"}

BACKBONES: dict[str, Callable[[], tuple[t.PretrainedConfig, int]]] = {
    **{
        name: CONFIGS[name]
        for name in (
            "beit bit convnext convnextv2 dinov2 dinov2_with_registers focalnet hgnet_v2 hiera pp_lcnet pvt_v2 resnet swin "
            "swinv2 textnet"
        ).split()
    },
    "dinov3_convnext": lambda: (
        t.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], image_size=32), 32
    ),
    "dinov3_vit": lambda: (t.DINOv3ViTConfig(num_register_tokens=2, **VIT), 32),
    "lw_detr_vit": lambda: (t.LwDetrViTConfig(num_windows=4, window_block_indices=[0], **_BLOCKS), 32),
    "maskformer-swin": lambda: (
        t.MaskFormerSwinConfig(image_size=32, patch_size=2, embed_dim=12, depths=[2, 1], num_heads=[2, 3], window_size=4),
        32,
    ),
    "pixio": lambda: (t.PixioConfig(n_cls_tokens=2, **_BLOCKS), 32),
    "pp_lcnet_v3": lambda: (
        t.PPLCNetV3Config(divisor=4, stem_channels=8, conv_symmetric_num=2, block_configs=lcnet_blocks()), 64
    ),
    "pp_lcnet_v4": lambda: (t.PPLCNetV4Config(stem_channels=[3, 6, 8], block_configs=lcnet_blocks()[:4]), 64),
    "rf_detr_dinov2": lambda: (t.RfDetrDinov2Config(num_windows=2, **_BLOCKS), 32),
    "rt_detr_resnet": lambda: (
        t.RTDetrResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 2, 1], layer_type="basic",
            out_features=["stage3", "stage4"],
        ),
        64,
    ),
    "sapiens2": lambda: (
        t.Sapiens2Config(
            num_register_tokens=2, num_key_value_attention_heads=1, num_first_full_attention_layers=1,
            num_last_full_attention_layers=0, **VIT,
        ),
        32,
    ),
    "timm_backbone": lambda: (t.TimmBackboneConfig(backbone="mobilenetv3_small_050", use_pretrained_backbone=False), 64),
    "tipsv2_vision_model": lambda: (t.Tipsv2VisionConfig(**_BLOCKS), 32),
    "uvdoc_backbone": lambda: (uvdoc(), 64),
    "vitdet": lambda: (
        t.VitDetConfig(
            window_block_indices=[0], window_size=2, residual_block_indices=[1],
            use_relative_position_embeddings=True, **_BLOCKS,
        ),
        32,
    ),
    "vitpose_backbone": lambda: (t.VitPoseBackboneConfig(**{**_BLOCKS, "image_size": (32, 32), "patch_size": (8, 8)}), 32),
}  # fmt: skip
"""Model type -> a small configuration and the size of its images."""

SAME_CLASS = {"tipsv2": "tipsv2_vision_model"}
"""Model types whose backbone is that of another."""


def uvdoc() -> t.UVDocBackboneConfig:
    return t.UVDocBackboneConfig(
        resnet_head=[[3, 6], [6, 6]],
        resnet_configs=[[[6, 6, 1, False], [6, 6, 3, False]], [[6, 8, 1, True], [8, 8, 3, False]], [[8, 12, 1, True]]],
        stage_configs=[[[12, 1]], [[12, 2]], [[12, 8], [12, 3]]],
    )


def backbone(model_type: str) -> Callable[[], Built]:
    def build() -> Built:
        torch.manual_seed(0)
        config, size = BACKBONES[model_type]()
        return perturb(t.AutoBackbone.from_config(config)), {"pixel_values": images(size)}

    return build


TOWERS: dict[str, Callable[[], tuple[t.PretrainedConfig, int]]] = {
    "aimv2_vision_model": lambda: (t.Aimv2VisionConfig(**VIT), 32),
    "chinese_clip_vision_model": lambda: (t.ChineseCLIPVisionConfig(**VIT), 32),
    "clip_vision_model": lambda: (t.CLIPVisionConfig(**VIT), 32),
    "dinov2": CONFIGS["dinov2"],
    "dinov2_with_registers": CONFIGS["dinov2_with_registers"],
    "dinov3_convnext": BACKBONES["dinov3_convnext"],
    "dinov3_vit": BACKBONES["dinov3_vit"],
    "ijepa": CONFIGS["ijepa"],
    "metaclip_2_vision_model": lambda: (t.MetaClip2VisionConfig(**VIT), 32),
    "mlcd_vision_model": lambda: (t.MLCDVisionConfig(**VIT), 32),
    "sam_vision_model": lambda: (
        t.SamVisionConfig(window_size=2, global_attn_indexes=[1], output_channels=12, mlp_dim=40, **VIT), 32
    ),
    "sam2_hiera_det_model": lambda: (
        t.Sam2HieraDetConfig(
            hidden_size=8, num_attention_heads=1, image_size=[64, 64], blocks_per_stage=[1, 1, 2, 1],
            embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 2, 4, 8],
            global_attention_blocks=[3], window_positional_embedding_background_size=[4, 4],
        ),
        64,
    ),
    "siglip_vision_model": lambda: (t.SiglipVisionConfig(**VIT), 32),
    "siglip2_vision_model": lambda: (t.Siglip2VisionConfig(**{**VIT, "num_patches": 16}), 0),
    "vit": CONFIGS["vit"],
    "vit_mae": lambda: (
        t.ViTMAEConfig(
            decoder_num_attention_heads=2, decoder_hidden_size=16, decoder_num_hidden_layers=1, mask_ratio=0.0, **VIT
        ),
        32,
    ),
    "vjepa2": lambda: (
        t.VJEPA2Config(
            crop_size=32, patch_size=8, frames_per_clip=2, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
            pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1, pred_num_mask_tokens=1,
        ),
        32,
    ),
}  # fmt: skip
"""Model type -> a small configuration and the size of its images."""

OTHER_INPUTS: Mapping[str, Callable[[], dict[str, Tensor]]] = {
    "siglip2_vision_model": patches,
    "vit_mae": lambda: {
        "pixel_values": images(32),
        "noise": torch.rand(2, 16, generator=torch.Generator().manual_seed(2)),
    },
    "vjepa2": lambda: {"pixel_values_videos": images(32).unsqueeze(1).repeat(1, 2, 1, 1, 1)},
}


_OUTSIDE_AUTO_MODEL: dict[type[t.PretrainedConfig], type[t.PreTrainedModel]] = {
    t.MetaClip2VisionConfig: t.MetaClip2VisionModel,
}


def tower(model_type: str) -> Callable[[], Built]:
    def build() -> Built:
        torch.manual_seed(0)
        config, size = TOWERS[model_type]()
        inputs = OTHER_INPUTS[model_type]() if model_type in OTHER_INPUTS else {"pixel_values": images(size)}
        kind = t.MODEL_MAPPING.get(type(config), None) or _OUTSIDE_AUTO_MODEL[type(config)]
        return perturb(kind(config)), inputs

    return build


ARCHITECTURES: dict[str, Callable[[], Built]] = {
    **{f"backbone {model_type}": backbone(model_type) for model_type in BACKBONES},
    **{f"tower {model_type}": tower(model_type) for model_type in TOWERS},
}

CANNOT: dict[str, str] = {
    "dinat": "needs natten2dqkrpb and natten2dav of the package natten: 0.21.7 no longer has both, and 0.17.5 "
    "and 0.15.1 do not compile against torch 2.14",
}
"""Model type -> why it cannot be built here."""

WITHOUT: dict[str, set[str]] = {
    "backbone bit": {"masked"},  # every width meets in a group normalisation with one group, or is an output
    "backbone convnextv2": {"masked"},  # its response normalisation takes a mean over the units of the MLP
    "backbone pixio": {"reload"},  # transformers loads the norm of the backbone from that of the model inside
    "backbone timm_backbone": {"reload"},  # takes every name for one of timm's models
}
"""Architecture -> checks that do not apply to it, or that its dense model does not pass either."""
