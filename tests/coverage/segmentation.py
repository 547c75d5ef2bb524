"""Every model of transformers that gives a value to each pixel: segmentation, depth, super-resolution. Small and random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from detection import LABELS, Built, built, resnet, rf_detr
from families import images, perturb
from torch import Tensor

_VIT: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 64, "patch_size": 16,
}  # fmt: skip
_LABELED: dict[str, Any] = {"num_labels": LABELS}
_NECK: dict[str, Any] = {
    "neck_hidden_sizes": [8, 12, 16, 20], "fusion_hidden_size": 16, "reassemble_factors": [4, 2, 1, 0.5],
}  # fmt: skip


def swin(stages: tuple[str, ...] = ("stage1", "stage2", "stage3", "stage4"), **settings: Any) -> t.SwinConfig:
    return t.SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[2, 2, 4, 4], window_size=2,
        out_features=list(stages), **settings,
    )  # fmt: skip


def dinov2(**settings: Any) -> t.Dinov2Config:
    return t.Dinov2Config(
        **{"mlp_ratio": 2, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False, **_VIT, **settings}
    )


# -- segmentation -------------------------------------------------------------------------------------------------


def _upernet(backbone: Callable[[], t.PretrainedConfig], width: int) -> t.PretrainedConfig:
    return t.UperNetConfig(
        backbone_config=backbone(), hidden_size=16, pool_scales=[1, 2], auxiliary_in_channels=width,
        auxiliary_channels=12, auxiliary_num_convs=1, **_LABELED,
    )  # fmt: skip


def _beit(kind: type[t.PretrainedConfig]) -> t.PretrainedConfig:
    return kind(
        intermediate_size=40, use_relative_position_bias=True, out_indices=[1, 2, 3, 4], pool_scales=[1, 2],
        auxiliary_channels=12, **_VIT, **_LABELED,
    )  # fmt: skip


def _dpt(**settings: Any) -> t.PretrainedConfig:
    return t.DPTConfig(
        intermediate_size=40, backbone_out_indices=[0, 1, 2, 3], **{**_VIT, **_NECK, **_LABELED, **settings}
    )


def _dpt_hybrid() -> t.PretrainedConfig:
    bit = {
        "model_type": "bit", "global_padding": "same", "layer_type": "bottleneck", "depths": [1, 1, 1],
        "embedding_size": 8, "hidden_sizes": [16, 24, 32], "num_groups": 4, "out_features": ["stage1", "stage2", "stage3"],
        "embedding_dynamic_padding": True,
    }  # fmt: skip
    return _dpt(
        is_hybrid=True, backbone_config=bit, backbone_featmap_shape=[1, 32, 4, 4],
        neck_hidden_sizes=[16, 24, 16, 20], reassemble_factors=[1, 1, 1, 0.5],
    )  # fmt: skip


def _mobilenet_v2() -> t.PretrainedConfig:
    return t.MobileNetV2Config(image_size=64, depth_multiplier=0.25, min_depth=4, depth_divisible_by=4, **_LABELED)


def _mobilevit() -> t.PretrainedConfig:
    return t.MobileViTConfig(
        image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 12, 16, 20, 24, 28, 48], aspp_out_channels=12,
        **_LABELED,
    )  # fmt: skip


def _mobilevitv2() -> t.PretrainedConfig:
    return t.MobileViTV2Config(
        image_size=64, width_multiplier=0.125, base_attn_unit_dims=[32, 48, 64], n_attn_blocks=[1, 1, 1],
        aspp_out_channels=12, **_LABELED,
    )  # fmt: skip


def _sapiens2(**head: Any) -> t.PretrainedConfig:
    head_config = {"upsample_out_channels": [12, 8], "conv_out_channels": [8, 6], **head}
    return t.Sapiens2Config(
        intermediate_size=40, num_key_value_attention_heads=1, num_first_full_attention_layers=1,
        num_last_full_attention_layers=1, num_register_tokens=2, head_config=head_config, **_VIT, **_LABELED,
    )  # fmt: skip


def _segformer() -> t.PretrainedConfig:
    return t.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=12,
        **_LABELED,
    )


def _depth_anything(kind: type) -> Any:
    return kind(
        backbone_config=dinov2(), patch_size=16, reassemble_hidden_size=24, head_hidden_size=12,
        depth_estimation_type="metric", max_depth=10, **_NECK,
    )  # fmt: skip


def _tipsv2() -> t.PretrainedConfig:
    backbone = t.Tipsv2VisionConfig(
        mlp_ratio=2, out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False, **_VIT
    )
    return t.Tipsv2DptConfig(backbone_config=backbone, num_depth_bins=10, **_NECK, **_LABELED)


def _detr() -> t.PretrainedConfig:
    return t.DetrConfig(
        use_timm_backbone=False, backbone_config=resnet("stage1", "stage2", "stage3", "stage4"), d_model=32,
        encoder_layers=1, decoder_layers=2, encoder_attention_heads=8, decoder_attention_heads=4, encoder_ffn_dim=20,
        decoder_ffn_dim=28, num_queries=5, **_LABELED,
    )  # fmt: skip


def _maskformer(backbone: Callable[[], t.PretrainedConfig]) -> t.PretrainedConfig:
    decoder = t.DetrConfig(
        use_timm_backbone=False, backbone_config=resnet("stage4"), d_model=16, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=28, num_queries=5,
    )  # fmt: skip
    return t.MaskFormerConfig(
        backbone_config=backbone(), decoder_config=decoder, fpn_feature_size=32, mask_feature_size=16, **_LABELED
    )


def _mask2former(backbone: Callable[[], t.PretrainedConfig] = swin, **settings: Any) -> t.PretrainedConfig:
    return t.Mask2FormerConfig(
        backbone_config=backbone(), feature_size=32, mask_feature_size=24, hidden_dim=32, encoder_feedforward_dim=20,
        encoder_layers=1, decoder_layers=3, num_attention_heads=4, dim_feedforward=28, num_queries=5, **settings, **_LABELED,
    )  # fmt: skip


def _oneformer() -> t.PretrainedConfig:
    return t.OneFormerConfig(
        backbone_config=swin(), conv_dim=32, mask_dim=32, hidden_dim=32, encoder_feedforward_dim=20, encoder_layers=1,
        decoder_layers=3, num_attention_heads=4, dim_feedforward=28, num_queries=6, query_dec_layers=1, task_seq_len=7,
        text_encoder_width=32, text_encoder_context_length=7, text_encoder_num_layers=1, text_encoder_vocab_size=30,
        text_encoder_n_ctx=2, **_LABELED,
    )  # fmt: skip


def _eomt(kind: type[t.PretrainedConfig], **settings: Any) -> t.PretrainedConfig:
    return kind(
        num_queries=5, num_blocks=2, num_upscale_blocks=1, num_register_tokens=2, **{**_VIT, **settings}, **_LABELED
    )


def _video() -> Built:
    torch.manual_seed(0)
    model = perturb(t.VideomtForUniversalSegmentation(_eomt(t.VideomtConfig, mlp_ratio=2)))
    return model, {"pixel_values_videos": torch.stack([images(64), images(64).flip(-1)], dim=1)}


_video.model_class = t.VideomtForUniversalSegmentation  # type: ignore[attr-defined]

# -- depth and super-resolution -----------------------------------------------------------------------------------


def _glpn() -> t.PretrainedConfig:
    return t.GLPNConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4], mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=12,
    )  # fmt: skip


def _depth_pro(**settings: Any) -> t.PretrainedConfig:
    def part() -> t.PretrainedConfig:
        return dinov2(image_size=16, patch_size=8, num_hidden_layers=2, out_indices=None)

    return t.DepthProConfig(
        patch_size=16, image_model_config=part(), patch_model_config=part(), fov_model_config=part(),
        intermediate_hook_ids=[1, 0], intermediate_feature_dims=[16, 12], scaled_images_ratios=[0.25, 0.5, 1],
        scaled_images_overlap_ratios=[0.0, 0.5, 0.25], scaled_images_feature_dims=[16, 12, 8], fusion_hidden_size=16,
        merge_padding_value=0, **settings,
    )  # fmt: skip


def _zoedepth(several: bool) -> t.PretrainedConfig:
    beit = t.BeitConfig(
        intermediate_size=40, use_relative_position_bias=True, out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
        add_fpn=False, **_VIT,
    )  # fmt: skip
    bins = [{"name": "nyu", "n_bins": 8, "min_depth": 0.001, "max_depth": 10.0}]
    further: dict[str, Any] = {}
    if several:
        bins.append({"name": "kitti", "n_bins": 8, "min_depth": 0.001, "max_depth": 80.0})
        further = {
            "num_patch_transformer_layers": 4, "patch_transformer_hidden_size": 128,
            "patch_transformer_intermediate_size": 20, "patch_transformer_num_attention_heads": 2,
        }  # fmt: skip
    return t.ZoeDepthConfig(
        backbone_config=beit, num_relative_features=8, bottleneck_features=16, num_attractors=[4, 3, 2, 1],
        bin_embedding_dim=8, bin_configurations=bins, **_NECK, **further,
    )  # fmt: skip


def _chmv2() -> t.PretrainedConfig:
    backbone = t.DINOv3ViTConfig(
        intermediate_size=40, num_register_tokens=2, out_indices=[1, 2, 3, 4], apply_layernorm=True,
        reshape_hidden_states=True, return_class_token=True, **_VIT,
    )  # fmt: skip
    return t.CHMv2Config(
        backbone_config=backbone, post_process_channels=[8, 12, 16, 20], fusion_hidden_size=16, head_hidden_size=12,
        number_output_channels=10,
    )  # fmt: skip


def _swin2sr(**settings: Any) -> t.PretrainedConfig:
    return t.Swin2SRConfig(image_size=16, embed_dim=12, depths=[1, 1], num_heads=[2, 3], window_size=4, **settings)


def _generic(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2))


def _tokens(*shape: int, below: int) -> Tensor:
    return torch.randint(1, below, shape, generator=torch.Generator().manual_seed(2))


CANNOT: dict[str, str] = {}
"""Models of these kinds that cannot be built, and why; there are none."""

ARCHITECTURES: dict[str, Callable[[], Built]] = {
    # semantic
    "beit": built(t.BeitForSemanticSegmentation, lambda: _beit(t.BeitConfig)),
    "data2vec-vision": built(t.Data2VecVisionForSemanticSegmentation, lambda: _beit(t.Data2VecVisionConfig)),
    "dpt": built(t.DPTForSemanticSegmentation, _dpt),
    "dpt, hybrid": built(t.DPTForSemanticSegmentation, _dpt_hybrid),
    "mobilenet_v2": built(t.MobileNetV2ForSemanticSegmentation, _mobilenet_v2),
    "mobilevit": built(t.MobileViTForSemanticSegmentation, _mobilevit),
    "mobilevitv2": built(t.MobileViTV2ForSemanticSegmentation, _mobilevitv2),
    "sapiens2": built(t.Sapiens2ForSemanticSegmentation, _sapiens2),
    "sapiens2, pixel shuffle": built(
        t.Sapiens2ForSemanticSegmentation, lambda: _sapiens2(use_pixel_shuffle=True, upsample_kernel_size=3)
    ),
    "segformer": built(t.SegformerForSemanticSegmentation, _segformer),
    "tipsv2_dpt": built(t.Tipsv2DptForSemanticSegmentation, _tipsv2),
    "upernet": built(
        t.UperNetForSemanticSegmentation,
        lambda: _upernet(lambda: resnet("stage1", "stage2", "stage3", "stage4"), 16),
    ),
    "upernet, swin": built(t.UperNetForSemanticSegmentation, lambda: _upernet(swin, 32)),
    # instance, universal
    "detr, masks": built(t.DetrForSegmentation, _detr),
    "maskformer": built(
        t.MaskFormerForInstanceSegmentation,
        lambda: _maskformer(lambda: resnet("stage1", "stage2", "stage3", "stage4")),
    ),
    "maskformer, swin": built(t.MaskFormerForInstanceSegmentation, lambda: _maskformer(swin)),
    "rf_detr, masks": built(t.RfDetrForInstanceSegmentation, rf_detr),
    "mask2former": built(t.Mask2FormerForUniversalSegmentation, _mask2former),
    "mask2former, norm first": built(
        t.Mask2FormerForUniversalSegmentation,
        lambda: _mask2former(lambda: resnet("stage1", "stage2", "stage3", "stage4"), pre_norm=True),
    ),
    "oneformer": built(
        t.OneFormerForUniversalSegmentation, _oneformer, task_inputs=_tokens(2, 7, below=30).float()
    ),
    "eomt": built(t.EomtForUniversalSegmentation, lambda: _eomt(t.EomtConfig, mlp_ratio=2)),
    "eomt_dinov3": built(t.EomtDinov3ForUniversalSegmentation, lambda: _eomt(t.EomtDinov3Config, intermediate_size=40)),
    "videomt": _video,
    # depth
    "chmv2": built(t.CHMv2ForDepthEstimation, _chmv2),
    "depth_anything": built(
        t.DepthAnythingForDepthEstimation,
        lambda: _depth_anything(t.DepthAnythingConfig),
    ),
    "depth_pro": built(t.DepthProForDepthEstimation, _depth_pro),
    "depth_pro, field of view": built(t.DepthProForDepthEstimation, lambda: _depth_pro(use_fov_model=True)),
    "dpt, depth": built(t.DPTForDepthEstimation, _dpt),
    "glpn": built(t.GLPNForDepthEstimation, _glpn),
    "prompt_depth_anything": built(
        t.PromptDepthAnythingForDepthEstimation,
        lambda: _depth_anything(t.PromptDepthAnythingConfig),
        prompt_depth=_generic(2, 1, 8, 8),
    ),
    "tipsv2_dpt, depth": built(t.Tipsv2DptForDepthEstimation, _tipsv2),
    "zoedepth": built(t.ZoeDepthForDepthEstimation, lambda: _zoedepth(several=False)),
    "zoedepth, two domains": built(t.ZoeDepthForDepthEstimation, lambda: _zoedepth(several=True)),
    # super-resolution
    "swin2sr": built(t.Swin2SRForImageSuperResolution, _swin2sr, 16),
    "swin2sr, direct": built(
        t.Swin2SRForImageSuperResolution, lambda: _swin2sr(upsampler="pixelshuffledirect", resi_connection="3conv"), 16
    ),
    "swin2sr, nearest": built(t.Swin2SRForImageSuperResolution, lambda: _swin2sr(upsampler="nearest+conv", upscale=4), 16),
}  # fmt: skip
