"""A broad sample of timm and torchvision models: small, random, ready for the checks of coverage.

timm models come in transformers' ``TimmWrapperForImageClassification``, so that they can be saved and loaded again;
they are made small through timm's own arguments. Where a registered variant leaves no such freedom, its class is used
instead: that and the models of torchvision are plain modules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torchvision
from families import _timm, images, perturb
from timm import layers
from timm.models import metaformer, mlp_mixer, mobilenetv5
from timm.models.cspnet import CspModelCfg, CspStagesCfg, CspStemCfg
from timm.models.mvitv2 import MultiScaleVitCfg
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

Built = tuple[nn.Module, dict[str, Tensor]]


def timm_model(architecture: str, size: int = 64, **arguments: Any) -> Callable[[], Built]:
    """A timm model in transformers' wrapper; ``arguments`` go to timm and must be JSON values."""

    def build() -> Built:
        model, pixels = _timm(architecture, size, **arguments)()
        return model, {"pixel_values": pixels}

    return build


def plain(make: Callable[[], nn.Module], size: int = 64, name: str = "x") -> Callable[[], Built]:
    """A model that is made by a call."""

    def build() -> Built:
        torch.manual_seed(0)
        return perturb(make()), {name: images(size)}

    return build


def timm_class(path: str, size: int = 64, **arguments: Any) -> Callable[[], Built]:
    """An architecture whose registered variants leave no freedom, made from its class."""
    module, _, kind = path.rpartition(".")
    make = getattr(import_module(f"timm.models.{module}"), kind)
    return plain(lambda: make(num_classes=7, **arguments), size)


def torchvision_class(kind: str, size: int = 64, **arguments: Any) -> Callable[[], Built]:
    """An architecture of torchvision, made from its class."""
    return plain(lambda: getattr(torchvision.models, kind)(num_classes=7, **arguments), size)


def torchvision_model(architecture: str, size: int = 64, **arguments: Any) -> Callable[[], Built]:
    """A model of torchvision."""

    def build() -> Built:
        torch.manual_seed(0)
        if architecture in ("googlenet", "inception_v3"):
            arguments.setdefault("init_weights", True)  # what the default does, without its warning
            arguments.setdefault("aux_logits", False)
        model = torchvision.models.get_model(architecture, weights=None, num_classes=7, **arguments)
        return perturb(model), {"x": images(size)}

    return build


_VIT: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}
_DEPTHS = [1, 1, 1, 1]
_DIMS = [8, 16, 24, 32]
_POWERS = [8, 16, 32, 64]

ARCHITECTURES: dict[str, Callable[[], Built]] = {
    # residual networks
    "resnet18": timm_model("resnet18", channels=[8, 8, 16, 16], stem_width=8),
    "resnet50d": timm_model("resnet50d", layers=_DEPTHS, channels=[8, 8, 16, 16], stem_width=8),
    "resnext50": timm_model(
        "resnext50_32x4d", layers=_DEPTHS, channels=[16, 16, 32, 32], cardinality=4, base_width=16, stem_width=8
    ),
    "resnetv2": timm_model("resnetv2_50", layers=_DEPTHS, channels=[32, 32, 64, 64], stem_chs=8),
    "resnetv2_bit": timm_class(
        "resnetv2.ResNetV2", layers=_DEPTHS, channels=[32, 32, 64, 64], stem_type="fixed",
        conv_layer=partial(layers.StdConv2d, eps=1e-8), norm_layer=partial(layers.GroupNormAct, num_groups=4),
    ),
    "seresnet18": timm_model("seresnet18", channels=[8, 8, 16, 16], stem_width=8),
    "ecaresnet26t": timm_model("ecaresnet26t", layers=_DEPTHS, channels=[8, 8, 16, 16], stem_width=8),
    "skresnet18": timm_model("skresnet18", layers=_DEPTHS, channels=[8, 8, 16, 16], stem_width=8),
    "skresnext50": timm_model("skresnext50_32x4d", layers=_DEPTHS, channels=[32, 32, 32, 32], stem_width=8),
    "resnest14d": timm_model("resnest14d", channels=[8, 8, 16, 16], stem_width=8),
    "res2net50": timm_model("res2net50_26w_4s", layers=_DEPTHS, channels=[16, 16, 16, 16], stem_width=8),
    "res2next50": timm_model("res2next50", layers=_DEPTHS, channels=[32, 32, 32, 32], stem_width=8),
    "gcresnet33ts": timm_model("gcresnet33ts", width_factor=0.125),
    "legacy_senet": timm_model("legacy_seresnet18", 32),
    "tresnet_m": timm_model("tresnet_m", layers=_DEPTHS, width_factor=0.125),
    # dense, branching and aggregating convolutional networks
    "densenet121": timm_model("densenet121", growth_rate=4, block_config=[2, 2]),
    "rdnet": timm_model(
        "rdnet_tiny", num_init_features=8, growth_rates=[8, 8, 8], num_blocks_list=[2, 1, 1],
        block_type=["Block", "Block", "BlockESE"], is_downsample_block=[None, True, True],
        transition_compression_ratio=0.5,
    ),
    "dla34": timm_model("dla34", 32, channels=[8, 8, 16, 16, 24, 32]),
    "dla46x_c": timm_model("dla46x_c", 32),
    "dpn48b": timm_model(
        "dpn48b", num_init_features=8, k_r=32, groups=8, k_sec=[1, 2, 1, 1], inc_sec=[4, 8, 8, 16]
    ),
    "vovnet39a": timm_model(
        "vovnet39a", stem_chs=[8, 8, 8], stage_conv_chs=_DIMS, stage_out_chs=_DIMS, layer_per_block=2,
        block_per_stage=_DEPTHS,
    ),
    "ese_vovnet19b_dw": timm_model(
        "ese_vovnet19b_dw", stem_chs=[8, 8, 8], stage_conv_chs=_DIMS, stage_out_chs=_DIMS, layer_per_block=2
    ),
    "hrnet": timm_model("hrnet_w18_small", 32),
    "selecsls42b": timm_model("selecsls42b"),
    "inception_v3": timm_model("inception_v3", 96),
    "inception_v4": timm_model("inception_v4", 96),
    "inception_resnet_v2": timm_model("inception_resnet_v2", 96),
    "nasnet": timm_model("nasnetalarge", 64, stem_size=8, num_features=96, channel_multiplier=2),
    "pnasnet": timm_model("pnasnet5large", 64),
    "legacy_xception": timm_model("legacy_xception"),
    "xception41": timm_model("xception41"),
    "cspdarknet53": timm_class(
        "cspnet.CspNet", cfg=CspModelCfg(stem=CspStemCfg(out_chs=8, kernel_size=3), stages=CspStagesCfg(depth=(2, 2),
        out_chs=(16, 32), expand_ratio=(2.0, 1.0), bottle_ratio=(0.5, 1.0), block_ratio=(1.0, 0.5), down_growth=True,
        block_type="dark")),
    ),
    "cspresnet50": timm_class(
        "cspnet.CspNet", cfg=CspModelCfg(stem=CspStemCfg(out_chs=8, kernel_size=3), stages=CspStagesCfg(depth=(2, 2),
        out_chs=(16, 32), expand_ratio=2.0, bottle_ratio=0.5, cross_linear=True)),
    ),
    "cs3darknet": timm_class(
        "cspnet.CspNet", cfg=CspModelCfg(stem=CspStemCfg(out_chs=8, kernel_size=3), stages=CspStagesCfg(depth=(2, 2),
        out_chs=(16, 32), bottle_ratio=1.0, block_ratio=0.5, stage_type="cs3", block_type="bottle")),
    ),
    "cspnext": timm_model("cspnext_tiny"),
    "vgg11_bn": timm_class(
        "vgg.VGG", 32, cfg=[8, "M", 16, "M", 16, 16, "M", 24, 24, "M"], mlp_ratio=0.01, norm_layer=nn.BatchNorm2d,
    ),
    "nfnet_l0": timm_model("nfnet_l0", width_factor=0.125, group_size=8, depths=_DEPTHS),
    "darknet": timm_class(
        "cspnet.CspNet", cfg=CspModelCfg(stem=CspStemCfg(out_chs=8, kernel_size=3), stages=CspStagesCfg(depth=(2, 2),
        out_chs=(16, 32), bottle_ratio=0.5, block_ratio=1.0, avg_down=True, stage_type="dark", block_type="dark")),
    ),
    # mobile networks
    "mobilenetv3_small": timm_model("mobilenetv3_small_050", 32),
    "mobilenetv4_conv_small": timm_model("mobilenetv4_conv_small_050"),
    "mobilenetv4_hybrid": timm_model("mobilenetv4_hybrid_medium"),
    "mobilenetv5": plain(
        lambda: mobilenetv5._gen_mobilenet_v5("mobilenetv5_base", channel_multiplier=0.125, num_classes=7), 64,
    ),
    "efficientnet": timm_model("test_efficientnet"),
    "efficientnet_b0": timm_model("efficientnet_b0", 32),
    "efficientnet_gn": timm_model("test_efficientnet_gn"),
    "efficientnet_evos": timm_model("test_efficientnet_evos"),
    "efficientnetv2": timm_model("tf_efficientnetv2_b0", 32),
    "mixnet": timm_model("mixnet_s", 32),
    "mnasnet": timm_model("mnasnet_050", 32),
    "fbnetv3": timm_model("fbnetv3_b", 32),
    "hardcorenas_a": timm_model("hardcorenas_a", 32),
    "lcnet": timm_model("lcnet_050", 32),
    "lcnetv2": timm_model("lcnetv2_small", 32),
    "ghostnet": timm_model("ghostnet_050", 32),
    "ghostnetv2": timm_model("ghostnetv2_100", 64),
    "ghostnetv3": timm_model("ghostnetv3_050", 64),
    "repghostnet": timm_model("repghostnet_050", 32),
    "rexnet": timm_model("rexnet_100", 32, width_mult=0.25),
    "tinynet": timm_model("tinynet_e", 32),
    "semnasnet": timm_model("semnasnet_050", 32),
    # reparametrisable
    "repvgg": timm_model("repvgg_a0", width_factor=0.25),
    "mobileone": timm_model("mobileone_s0", 32),
    "repvit": timm_model("repvit_m1", embed_dim=_DIMS, depth=_DEPTHS),
    "fasternet": timm_model("fasternet_t0", embed_dim=8, depths=_DEPTHS),
    "regnety": timm_model("regnety_002", 32),
    "regnetz": timm_model("regnetz_005", 32),
    "starnet": timm_model("starnet_s1", 32, base_dim=8, depths=_DEPTHS),
    "hgnetv2": timm_model("hgnetv2_b0", 32),
    "hgnet": timm_model("hgnet_tiny", 32),
    "shvit": timm_model("shvit_s1"),
    "mambaout": timm_model("mambaout_femto", depths=_DEPTHS, dims=_DIMS),
    # attention inside convolutional networks
    "halonet26t": timm_model("halonet26t", 256, width_factor=0.125),
    "lambda_resnet26t": timm_model("lambda_resnet26t", 64, width_factor=0.125),
    "lambda_resnet26rpt": timm_model("lambda_resnet26rpt_256", 64, img_size=64, width_factor=0.125),
    "botnet26t": timm_model("botnet26t_256", 64, img_size=64, width_factor=0.125),
    "bat_resnext26ts": timm_model("bat_resnext26ts", 256),
    "sebotnet33ts": timm_model("sebotnet33ts_256", 64, img_size=64, width_factor=0.125),
    # convolutional networks in the manner of transformers
    "convnext": timm_model("convnext_atto", 32, dims=_DIMS, depths=_DEPTHS),
    "convnextv2": timm_model("convnextv2_atto", 32, dims=_DIMS, depths=_DEPTHS),
    "convmixer": timm_class("convmixer.ConvMixer", 32, dim=16, depth=2),
    "poolformerv2": timm_class(
        "metaformer.MetaFormer", depths=_DEPTHS, dims=_DIMS, norm_layers=metaformer.GroupNorm1NoBias,
        use_mlp_head=False,
    ),
    "caformer": timm_class(
        "metaformer.MetaFormer", depths=_DEPTHS, dims=[32, 32, 64, 64],
        token_mixers=[metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
        norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
    ),
    "convformer": timm_class("metaformer.MetaFormer", depths=_DEPTHS, dims=_DIMS, token_mixers=metaformer.SepConv),
    "inception_next": timm_model("inception_next_tiny", depths=_DEPTHS, dims=[16, 16, 24, 32]),
    "focalnet": timm_class("focalnet.FocalNet", 64, embed_dim=8, depths=_DEPTHS),
    "edgenext": timm_model("edgenext_xx_small", dims=[8, 16, 24, 32], depths=_DEPTHS, heads=[2, 2, 2, 2]),
    "fastvit": timm_model("fastvit_t8", embed_dims=_POWERS, layers=_DEPTHS),
    "fastvit_sa": timm_model("fastvit_sa12", embed_dims=[32, 32, 32, 32], layers=_DEPTHS),
    "efficientvit_mit": timm_model("efficientvit_b0", widths=[8, 16, 16, 32, 32], depths=[1, 1, 1, 1, 1]),
    "efficientvit_msra": timm_model(
        "efficientvit_m0", 64, img_size=64, embed_dim=[16, 32, 48], key_dim=[8, 8, 8], depth=[1, 1, 1],
        num_heads=[2, 2, 2],
    ),
    "efficientvim": timm_model("efficientvim_m1"),
    "lowformer": timm_model("lowformer_b0"),
    "iformer": timm_model("iformer_t"),
    "csatv2": timm_model("csatv2", 64, dims=[8, 16, 32, 64], depths=[1, 1, 2, 2], transformer_depths=[0, 0, 1, 1]),
    "cpubone": timm_model("cpubone_nano"),
    # transformers
    "vit": timm_model("vit_tiny_patch16_224", **_VIT),
    "vit_qk_norm": timm_model("vit_tiny_patch16_224", **_VIT, qk_norm=True),
    "vit_parallel": timm_model("vit_small_patch16_18x2_224", **_VIT),
    "vit_siglip_gap": timm_model("vit_base_patch16_siglip_gap_224", **_VIT),
    "vit_siglip_map": timm_model("vit_base_patch16_siglip_224", **_VIT),
    "vit_reg": timm_model("vit_small_patch16_18x2_224", **_VIT, reg_tokens=2),
    "vit_relpos": timm_model("vit_relpos_small_patch16_224", **_VIT),
    "vit_srelpos": timm_model("vit_srelpos_small_patch16_224", **_VIT),
    "vit_hybrid": timm_model("vit_tiny_r_s16_p8_224", 64, img_size=64, embed_dim=24, depth=2, num_heads=3),
    "vit_dinov3": timm_model("vit_small_patch16_dinov3", **{**_VIT, "embed_dim": 48}),
    "vit_rope": timm_model("vit_small_patch16_rope_224", **{**_VIT, "embed_dim": 48}),
    "vit_rope_mixed": timm_model("vit_small_patch16_rope_mixed_224", **{**_VIT, "embed_dim": 48}),
    "aimv2": timm_model("aimv2_large_patch14_224", **{**_VIT, "embed_dim": 48}),
    "samvit": timm_model("samvit_base_patch16_224", **_VIT, neck_chans=16, global_attn_indexes=[1]),
    "deit3": timm_model("deit3_small_patch16_224", **_VIT),
    "deit_distilled": timm_model("deit_tiny_distilled_patch16_224", **_VIT),
    "beit": timm_model("beit_base_patch16_224", **_VIT),
    "beitv2": timm_model("beitv2_base_patch16_224", **_VIT),
    "eva02": timm_model("eva02_tiny_patch14_224", **{**_VIT, "embed_dim": 48}),
    "eva_large": timm_model("eva_large_patch14_196", **{**_VIT, "embed_dim": 48}),
    "pe_core": timm_model("vit_pe_core_tiny_patch16_384", **{**_VIT, "embed_dim": 48}),
    "naflexvit": timm_model("naflexvit_base_patch16_gap", 64, embed_dim=24, depth=2, num_heads=3),
    "convit": timm_model("convit_tiny", 64, img_size=64, embed_dim=24, depth=2, num_heads=3, local_up_to_layer=1),
    "cait": timm_model("cait_xxs24_224", **{**_VIT, "depth_token_only": 1}),
    "xcit": timm_model("xcit_nano_12_p16_224", **_VIT),
    "coat": timm_class(
        "coat.CoaT", img_size=64, patch_size=4, embed_dims=[64, 64, 64, 64], serial_depths=_DEPTHS, parallel_depth=1,
        num_heads=8,
    ),
    "coat_lite": timm_class(
        "coat.CoaT", img_size=64, patch_size=4, embed_dims=[64, 64, 64, 64], serial_depths=_DEPTHS, parallel_depth=0,
        num_heads=8,
    ),
    "twins_svt": timm_model(
        "twins_svt_small", 64, img_size=64, embed_dims=[8, 16, 24, 32], depths=_DEPTHS, num_heads=[1, 2, 2, 4],
    ),
    "twins_pcpvt": timm_model(
        "twins_pcpvt_small", 64, img_size=64, embed_dims=[8, 16, 24, 32], depths=_DEPTHS, num_heads=[1, 2, 2, 4],
    ),
    "pit": timm_model("pit_ti_224", 64, img_size=64, base_dims=[8, 8, 8], depth=_DEPTHS[:3], heads=[2, 2, 2]),
    "crossvit": timm_model("crossvit_tiny_240", 240, embed_dim=[16, 24], num_heads=[2, 2], depth=[[1, 1, 0]]),
    "tnt": timm_model(
        "tnt_s_patch16_224", 64, img_size=64, embed_dim=24, inner_dim=8, depth=2, num_heads_inner=2, num_heads_outer=3,
    ),
    "volo": timm_class(
        "volo.VOLO", layers=[1, 1], embed_dims=[24, 32], num_heads=[2, 4], img_size=64, downsamples=(True, False),
        outlook_attention=(True, False), stem_hidden_dim=8,
    ),
    "levit": timm_model(
        "levit_128s", 64, img_size=64, embed_dim=[16, 24, 32], key_dim=8, num_heads=[2, 3, 4], depth=[1, 1, 1],
    ),
    "levit_conv": timm_model(
        "levit_conv_128s", 64, img_size=64, embed_dim=[16, 24, 32], key_dim=8, num_heads=[2, 3, 4], depth=[1, 1, 1],
    ),
    "visformer": timm_model("visformer_tiny", 64, img_size=64, embed_dim=24, init_channels=8, depth=[1, 1, 1]),
    "tiny_vit": timm_model(
        "tiny_vit_5m_224", 64, embed_dims=[16, 24, 32, 40], depths=_DEPTHS, num_heads=[2, 2, 2, 2],
        window_sizes=[4, 4, 4, 2],
    ),
    "davit": timm_model("davit_tiny", 64, embed_dims=[16, 16, 32, 32], depths=_DEPTHS, num_heads=[2, 2, 2, 2]),
    "gcvit": timm_class("gcvit.GlobalContextVit", img_size=64, embed_dim=16, depths=_DEPTHS, num_heads=(2, 2, 2, 2)),
    "mvitv2": timm_class(
        "mvitv2.MultiScaleVit",
        cfg=MultiScaleVitCfg(depths=(1, 1, 1), embed_dim=16, stride_q=((1, 1), (2, 2), (2, 2))), img_size=(64, 64),
    ),
    "pvt_v2": timm_model("pvt_v2_b0", 64, embed_dims=[8, 16, 24, 32], depths=_DEPTHS, num_heads=[1, 2, 2, 4]),
    "hiera": timm_model("hiera_tiny_224", 64, img_size=64, embed_dim=16, stages=_DEPTHS),
    "hieradet": timm_model("sam2_hiera_tiny", 256, embed_dim=16, stages=[1, 2, 2, 1], global_att_blocks=[4]),
    "swin": timm_model("swin_tiny_patch4_window7_224", 56, img_size=56, depths=[2, 1], embed_dim=12, num_heads=[2, 3]),
    "swinv2": timm_model("swinv2_tiny_window8_256", 64, img_size=64, depths=[2, 1], embed_dim=12, num_heads=[2, 3]),
    "swinv2_cr": timm_model("swinv2_cr_tiny_224", 64, img_size=64, depths=[2, 1], embed_dim=12, num_heads=[2, 3]),
    "swiftformer": timm_model("swiftformer_xs", 64, embed_dims=_DIMS, layers=_DEPTHS),
    "sequencer2d": timm_model(
        "sequencer2d_s", 56, img_size=56, embed_dims=[8, 16, 16, 16], layers=_DEPTHS, hidden_sizes=[4, 4, 4, 4],
    ),
    "vitamin": timm_model("vitamin_small_224", 64, img_size=64),
    "maxvit": timm_model("maxvit_tiny_tf_224", img_size=64, embed_dim=[32, 32, 32, 32], depths=_DEPTHS, stem_width=16),
    "maxvit_rmlp": timm_model("maxvit_rmlp_pico_rw_256", 64, img_size=64, depths=_DEPTHS),
    "coatnet": timm_model("coatnet_0_224", 64, img_size=64, embed_dim=[32, 32, 32, 32], depths=_DEPTHS),
    "nest": timm_class("nest.Nest", img_size=64, embed_dims=(8, 16, 32), num_heads=(2, 2, 2), depths=(1, 1, 1)),
    "nextvit": timm_model("nextvit_small", depths=[1, 1, 5, 1], stem_chs=[16, 16, 16]),
    "mobilevit": timm_model("mobilevit_xxs", 64),
    "mobilevitv2": timm_model("mobilevitv2_050", 64),
    "efficientformer": timm_model("efficientformer_l1", 224, embed_dims=[8, 16, 24, 32], depths=_DEPTHS),
    "efficientformerv2": timm_model("efficientformerv2_s0", 64, img_size=64, embed_dims=_DIMS, depths=_DEPTHS),
    # multilayer perceptrons
    "mixer": timm_class("mlp_mixer.MlpMixer", img_size=64, embed_dim=24, num_blocks=2),
    "gmixer": timm_class(
        "mlp_mixer.MlpMixer", img_size=64, embed_dim=24, num_blocks=2, mlp_ratio=(1.0, 4.0), mlp_layer=layers.GluMlp,
        act_layer=nn.SiLU,
    ),
    "resmlp": timm_class(
        "mlp_mixer.MlpMixer", img_size=64, embed_dim=24, num_blocks=2, mlp_ratio=4, block_layer=mlp_mixer.ResBlock,
        norm_layer=mlp_mixer.Affine,
    ),
    "gmlp": timm_class(
        "mlp_mixer.MlpMixer", img_size=64, embed_dim=24, num_blocks=2, mlp_ratio=6,
        block_layer=mlp_mixer.SpatialGatingBlock, mlp_layer=layers.GatedMlp,
    ),
    # torchvision
    "tv_shufflenet": torchvision_model("shufflenet_v2_x0_5"),
    "tv_googlenet": torchvision_model("googlenet"),
    "tv_mnasnet": torchvision_model("mnasnet0_5", 32),
    "tv_squeezenet": torchvision_model("squeezenet1_1"),
    "tv_regnet": torchvision_model("regnet_y_400mf", 32),
    "tv_vit": torchvision_class(
        "VisionTransformer", image_size=64, patch_size=16, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=40,
    ),
    "tv_swin_v2": torchvision_class(
        "SwinTransformer", patch_size=[4, 4], embed_dim=12, depths=[2, 1], num_heads=[2, 3], window_size=[4, 4],
        block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
    ),
    "tv_maxvit": torchvision_class(
        "MaxVit", input_size=(64, 64), stem_channels=8, partition_size=2, block_channels=[8, 16], block_layers=[1, 1],
        head_dim=4, stochastic_depth_prob=0.0,
    ),
    "tv_efficientnet": torchvision_model("efficientnet_v2_s", 32),
    "tv_resnet": torchvision_class(
        "ResNet", block=torchvision.models.resnet.Bottleneck, layers=[1, 1, 1, 1], groups=2, width_per_group=8,
    ),
    "tv_convnext": torchvision_class(
        "ConvNeXt", block_setting=[CNBlockConfig(8, 16, 1), CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 2)],
    ),
}  # fmt: skip

SLOW = set(
    """
    pnasnet inception_resnet_v2 inception_v4 nasnet ghostnetv3 bat_resnext26ts xception41 mobileone
    mobilenetv4_hybrid selecsls42b inception_v3 legacy_xception tv_efficientnet mobilenetv5 hrnet regnetz cspnext
    efficientnet_b0 fbnetv3 vitamin rexnet ghostnetv2 legacy_senet efficientnetv2 hgnet lowformer shvit nextvit
    repghostnet tv_regnet dla46x_c iformer semnasnet hardcorenas_a mnasnet efficientvim hgnetv2
    """.split()
)
"""The slowest ones: checked by the command that writes the table, not in the test suite."""

WITHOUT = {key: {"masked"} for key in ("convnextv2", "poolformerv2", "gmlp")}
"""Checks that do not apply: these have no exact axis (a mean over channels, a shift behind every activation)."""
