"""Every object detector of transformers: small, random, ready for the checks of coverage.

Inputs that a detector takes besides pixels come from here as well. Queries that are chosen by ``topk`` among the encoder's
proposals make the output a discontinuous function of the weights; comparing such models stays valid because both sides
run in float64, where the scores differ by 1e-13 and the smallest gap between two scores of a random model by 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from families import images, perturb
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Tensor]]

LABELS = 7


def built(
    kind: type[t.PreTrainedModel], config: Callable[[], t.PretrainedConfig], size: int = 64, **further: Tensor
) -> Callable[[], Built]:
    """A perturbed model of a class, and two images with whatever else it takes."""

    def build() -> Built:
        torch.manual_seed(0)
        return perturb(kind(config())), {"pixel_values": images(size), **further}

    build.model_class = kind  # type: ignore[attr-defined]
    return build


# -- small backbones ----------------------------------------------------------------------------------------------


def resnet(*stages: str) -> t.ResNetConfig:
    return t.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=list(stages),
    )


def rt_detr_resnet() -> t.RTDetrResNetConfig:
    return t.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 2, 1], layer_type="basic", out_indices=[2, 3, 4]
    )


def hgnet(stages: tuple[str, ...] = ("stage2", "stage3", "stage4"), **settings: Any) -> t.HGNetV2Config:
    return t.HGNetV2Config(
        stem_channels=[3, 6, 8], stage_in_channels=[8, 10, 12, 16], stage_mid_channels=[6, 6, 8, 10],
        stage_out_channels=[10, 12, 16, 24], hidden_sizes=[10, 12, 16, 24], stage_num_blocks=[1, 1, 2, 1],
        stage_numb_of_layers=[2, 2, 2, 2], depths=[1, 1, 2, 1], embedding_size=8, out_features=list(stages), **settings,
    )  # fmt: skip


def lcnet() -> t.PPLCNetV3Config:
    blocks = [
        [[3, 8, 8, 1, False]], [[3, 8, 12, 2, False]], [[3, 12, 16, 2, False]],
        [[3, 16, 24, 2, False], [5, 24, 24, 1, False]], [[5, 24, 32, 2, True], [5, 32, 32, 1, False]],
    ]  # fmt: skip
    return t.PPLCNetV3Config(
        scale=1.0, divisor=4, stem_channels=8, conv_symmetric_num=2, block_configs=blocks,
        out_features=["stage2", "stage3", "stage4", "stage5"],
    )  # fmt: skip


# -- detectors ----------------------------------------------------------------------------------------------------

_TRANSFORMER: dict[str, Any] = {
    "d_model": 24, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 3, "decoder_attention_heads": 3,
    "encoder_ffn_dim": 20, "decoder_ffn_dim": 28, "num_queries": 5, "num_labels": LABELS,
}  # fmt: skip

_HYBRID: dict[str, Any] = {  # RT-DETR and its descendants
    **_TRANSFORMER, "d_model": 32, "encoder_hidden_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_in_channels": [12, 16, 24], "decoder_in_channels": [32, 32, 32], "num_denoising": 0, "hidden_expansion": 0.5,
    "num_queries": 6,
}  # fmt: skip


def _plain_detr(kind: type[t.PretrainedConfig], **settings: Any) -> t.PretrainedConfig:
    return kind(use_timm_backbone=False, backbone_config=resnet("stage4"), **{**_TRANSFORMER, **settings})


def _deformable(**settings: Any) -> t.PretrainedConfig:
    return t.DeformableDetrConfig(
        use_timm_backbone=False, backbone_config=resnet("stage2", "stage3", "stage4"), encoder_n_points=2,
        decoder_n_points=3, num_feature_levels=4, **{**_TRANSFORMER, "d_model": 64, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, **settings},
    )  # fmt: skip


def _dab(**settings: Any) -> t.PretrainedConfig:
    own = {key: value for key, value in _TRANSFORMER.items() if key != "d_model"}
    return t.DabDetrConfig(use_timm_backbone=False, backbone_config=resnet("stage4"), hidden_size=24, **own, **settings)


def _hybrid(kind: type[t.PretrainedConfig], backbone: Callable[..., Any] = hgnet, **settings: Any) -> Any:
    return kind(backbone_config=backbone(), **{**_HYBRID, **settings})


def _lw_detr() -> t.PretrainedConfig:
    backbone = t.LwDetrViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, mlp_ratio=2, image_size=64, pretrain_image_size=64,
        patch_size=8, window_block_indices=[0, 2], num_windows=4, out_indices=[1, 3],
    )  # fmt: skip
    return t.LwDetrConfig(
        backbone_config=backbone, projector_scale_factors=[2.0, 0.5], d_model=24, decoder_ffn_dim=28, decoder_layers=2,
        decoder_self_attention_heads=3, decoder_cross_attention_heads=4, decoder_n_points=2, num_queries=5, group_detr=2,
        c2f_num_blocks=2, num_labels=LABELS,
    )  # fmt: skip


def rf_detr(**settings: Any) -> t.PretrainedConfig:
    backbone = t.RfDetrDinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, mlp_ratio=2, image_size=64, patch_size=8,
        num_windows=2, out_indices=[1, 3],
    )  # fmt: skip
    return t.RfDetrConfig(
        backbone_config=backbone, d_model=24, decoder_ffn_dim=28, decoder_layers=2, decoder_self_attention_heads=3,
        decoder_cross_attention_heads=4, decoder_n_points=2, num_queries=5, group_detr=2, c2f_num_blocks=2,
        num_labels=LABELS, **settings,
    )  # fmt: skip


def _yolos() -> t.PretrainedConfig:
    return t.YolosConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=[64, 64],
        patch_size=16, num_detection_tokens=5, num_labels=LABELS,
    )  # fmt: skip


def _doc_v2() -> t.PretrainedConfig:
    order = {
        "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 28, "num_hidden_layers": 2, "rel_pos_bins": 8,
        "max_rel_pos": 16, "max_position_embeddings": 32, "coordinate_size": 4, "shape_size": 4, "num_classes": LABELS,
        "relation_bias_embed_dim": 4, "global_pointer_head_size": 6,
    }  # fmt: skip
    return _hybrid(
        t.PPDocLayoutV2Config, reading_order_config=order, class_thresholds=[0.0] * LABELS, class_order=[0] * LABELS
    )


def _ocr_server(kind: type[t.PretrainedConfig]) -> t.PretrainedConfig:
    """The large-kernel neck: its convolutions are given as (kernel, stride, padding)."""
    block: dict[str, Any] = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    for name, length in (("long", 7), ("mid", 5), ("short", 3)):
        half = length // 2
        block[f"vertical_long_to_small_conv_{name}ratio"] = [[length, 1], [1, 1], [half, 0]]
        block[f"horizontal_small_to_long_conv_{name}ratio"] = [[1, length], [1, 1], [0, half]]
        block[f"symmetric_conv_long_{name}ratio"] = [[length, length], [1, 1], [half, half]]
    return kind(
        backbone_config=hgnet(("stage1", "stage2", "stage3", "stage4")), neck_out_channels=32, kernel_list=[3, 2, 2],
        scale_factor_list=[1, 2, 4, 8], intraclass_block_config=block,
    )  # fmt: skip


# -- detectors that take words -------------------------------------------------------------------------------------

_TEXT: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 28}


def words(count: int, below: int = 1200) -> Tensor:
    return torch.randint(3, below, (2, count), generator=torch.Generator().manual_seed(2))


def swin(stages: tuple[str, ...]) -> t.SwinConfig:
    return t.SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[2, 2, 4, 4], window_size=2,
        out_features=list(stages),
    )  # fmt: skip


def _grounding_dino(kind: type[t.PretrainedConfig]) -> t.PretrainedConfig:
    return kind(
        backbone_config=swin(("stage2", "stage3", "stage4")), text_config={"model_type": "bert", "vocab_size": 1200, **_TEXT},
        encoder_n_points=2, decoder_n_points=3, num_feature_levels=4, max_text_len=8,
        **{**_TRANSFORMER, "d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    )  # fmt: skip


def _grounding_inputs() -> dict[str, Tensor]:
    # the sentence begins with 101 and ends with 102, and a dot (1012) parts its two phrases
    middle = words(4)
    dot = torch.full((2, 1), 1012)
    ids = torch.cat([torch.full((2, 1), 101), middle[:, :2], dot, middle[:, 2:], dot, torch.full((2, 1), 102)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def _owl(kind: type[t.PretrainedConfig]) -> t.PretrainedConfig:
    return kind(
        text_config={"vocab_size": 1200, "max_position_embeddings": 8, "pad_token_id": 0, **_TEXT},
        vision_config={"image_size": 64, "patch_size": 16, **_TEXT}, projection_dim=24,
    )  # fmt: skip


def _omdet() -> t.PretrainedConfig:
    return t.OmDetTurboConfig(
        backbone_config=swin(("stage2", "stage3", "stage4")), image_size=64, encoder_in_channels=[16, 32, 64],
        apply_layernorm_after_vision_backbone=False,
        text_config={
            "model_type": "clip_text_model", "vocab_size": 1200, "max_position_embeddings": 8, "projection_dim": 24, **_TEXT,
        },
        text_projection_in_dim=24, text_projection_out_dim=24, class_embed_dim=24, task_encoder_hidden_dim=20,
        encoder_hidden_dim=32, vision_features_channels=[32, 32, 32], encoder_attention_heads=4,
        encoder_dim_feedforward=20, decoder_hidden_dim=32, decoder_num_heads=4, decoder_num_layers=2,
        decoder_dim_feedforward=28, decoder_num_points=2, num_queries=6,
    )  # fmt: skip


def _omdet_inputs() -> dict[str, Tensor]:
    return {
        "classes_input_ids": words(5), "classes_attention_mask": torch.ones(2, 5, dtype=torch.long),
        "tasks_input_ids": words(6), "tasks_attention_mask": torch.ones(2, 6, dtype=torch.long),
        "classes_structure": torch.ones(2, dtype=torch.long),
    }  # fmt: skip


CANNOT: dict[str, str] = {}
"""Detectors of transformers that cannot be built, and why; there are none."""

ARCHITECTURES: dict[str, Callable[[], Built]] = {
    "detr": built(t.DetrForObjectDetection, lambda: _plain_detr(t.DetrConfig)),
    "detr, learned positions": built(
        t.DetrForObjectDetection, lambda: _plain_detr(t.DetrConfig, position_embedding_type="learned")
    ),
    "conditional_detr": built(t.ConditionalDetrForObjectDetection, lambda: _plain_detr(t.ConditionalDetrConfig)),
    "table-transformer": built(t.TableTransformerForObjectDetection, lambda: _plain_detr(t.TableTransformerConfig)),
    "dab-detr": built(t.DabDetrForObjectDetection, _dab),
    "deformable_detr": built(t.DeformableDetrForObjectDetection, _deformable),
    "deformable_detr, refined boxes": built(t.DeformableDetrForObjectDetection, lambda: _deformable(with_box_refine=True)),
    "deformable_detr, two stages": built(
        t.DeformableDetrForObjectDetection,
        lambda: _deformable(with_box_refine=True, two_stage=True, two_stage_num_proposals=6),
    ),
    "rt_detr": built(t.RTDetrForObjectDetection, lambda: _hybrid(t.RTDetrConfig, rt_detr_resnet)),
    "rt_detr, fixed anchors": built(
        t.RTDetrForObjectDetection, lambda: _hybrid(t.RTDetrConfig, rt_detr_resnet, anchor_image_size=[64, 64])
    ),
    "rt_detr_v2": built(t.RTDetrV2ForObjectDetection, lambda: _hybrid(t.RTDetrV2Config, rt_detr_resnet)),
    "d_fine": built(t.DFineForObjectDetection, lambda: _hybrid(t.DFineConfig, decoder_n_points=[3, 4, 3])),
    "deimv2": built(t.Deimv2ForObjectDetection, lambda: _hybrid(t.Deimv2Config, decoder_n_points=[3, 4, 3])),
    "lw_detr": built(t.LwDetrForObjectDetection, _lw_detr),
    "rf_detr": built(t.RfDetrForObjectDetection, rf_detr),
    "yolos": built(t.YolosForObjectDetection, _yolos),
    "pp_doclayout_v2": built(t.PPDocLayoutV2ForObjectDetection, _doc_v2),
    "pp_doclayout_v3": built(
        t.PPDocLayoutV3ForObjectDetection,
        lambda: _hybrid(
            t.PPDocLayoutV3Config, lambda: hgnet(("stage1", "stage2", "stage3", "stage4")), num_prototypes=6,
            mask_feature_channels=[8, 8], x4_feat_dim=10, global_pointer_head_size=6, encoder_in_channels=[12, 16, 24],
        ),
    ),
    "pp_doclayout_v4": built(
        t.PPDocLayoutV4ForObjectDetection,
        lambda: _hybrid(t.PPDocLayoutV4Config, hidden_size=32, global_pointer_head_size=6),
    ),
    "pp_ocrv5_mobile_det": built(
        t.PPOCRV5MobileDetForObjectDetection,
        lambda: t.PPOCRV5MobileDetConfig(
            backbone_config=lcnet(), neck_out_channels=16, layer_list_out_channels=[6, 8, 12, 16]
        ),
    ),
    "pp_ocrv5_server_det": built(
        t.PPOCRV5ServerDetForObjectDetection,
        lambda: _ocr_server(t.PPOCRV5ServerDetConfig),
    ),
    "pp_ocrv6_medium_det": built(
        t.PPOCRV6MediumDetForObjectDetection,
        lambda: _ocr_server(t.PPOCRV6MediumDetConfig),
    ),
    "pp_ocrv6_small_det": built(
        t.PPOCRV6SmallDetForObjectDetection,
        lambda: t.PPOCRV6SmallDetConfig(
            backbone_config=lcnet(), neck_out_channels=16, layer_list_out_channels=[12, 16, 24, 32]
        ),
    ),
    "grounding-dino": built(
        t.GroundingDinoForObjectDetection, lambda: _grounding_dino(t.GroundingDinoConfig), **_grounding_inputs()
    ),
    "mm-grounding-dino": built(
        t.MMGroundingDinoForObjectDetection, lambda: _grounding_dino(t.MMGroundingDinoConfig), **_grounding_inputs()
    ),
    "omdet-turbo": built(t.OmDetTurboForObjectDetection, _omdet, **_omdet_inputs()),
    "owlvit": built(
        t.OwlViTForObjectDetection, lambda: _owl(t.OwlViTConfig), input_ids=words(5), attention_mask=torch.ones(2, 5).long()
    ),
    "owlv2": built(
        t.Owlv2ForObjectDetection, lambda: _owl(t.Owlv2Config), input_ids=words(5), attention_mask=torch.ones(2, 5).long()
    ),
}  # fmt: skip
