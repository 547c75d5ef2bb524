"""The model families that contracts are tested on. One entry adds an architecture.

``FAMILIES`` holds one of each kind and is what every contract is tested on; ``MORE_FAMILIES`` holds further ones, for the
tests of axes alone.
Each builder returns a small random model (float32, evaluation mode) and an input of batch size 2. Parameters and
BatchNorm statistics are perturbed, so that no shift, scale or statistic is trivially zero or one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

from hf_compress.models.afidaf import AfidafConfig
from hf_compress.models.darts import DartsConfig

Built = tuple[nn.Module, Tensor]


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every float parameter and statistic a generic value."""
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict()  # a buffer that checkpoints leave out is a constant of the architecture
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or name not in saved:
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
            if name.endswith("running_var"):
                tensor.add_(noise.abs() * 0.3)
            else:
                tensor.add_(noise * 0.1)
    return model.eval()


def images(size: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def _classifier(config: transformers.PretrainedConfig, size: int = 32) -> Callable[[], Built]:
    def build() -> Built:
        torch.manual_seed(0)
        model = transformers.AutoModelForImageClassification.from_config(copy.deepcopy(config))
        return perturb(model), images(size)

    return build


def _timm(architecture: str, size: int, **arguments: object) -> Callable[[], Built]:
    """A timm model in transformers' wrapper; ``arguments`` go to timm."""

    def build() -> Built:
        torch.manual_seed(0)
        config = transformers.TimmWrapperConfig(
            architecture=architecture, num_labels=7, model_args=arguments, do_pooling=True
        )
        model = transformers.TimmWrapperForImageClassification(config)
        return perturb(model), images(size)

    return build


class PlainCnn(nn.Module):
    """VGG-like: convolution, BatchNorm, pooling, a linear head after flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(12, 16, 3, bias=False), nn.BatchNorm2d(16), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(16 * 6 * 6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class PlainDense(nn.Module):
    """Dense connections: every layer reads the concatenation of all before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 6 * i), nn.ReLU(), nn.Conv2d(8 + 6 * i, 6, 3, padding=1)) for i in range(3)
        )
        self.head = nn.Linear(26, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return self.head(torch.relu(x).mean((2, 3)))


class PlainPreActivation(nn.Module):
    """Pre-activation residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1, bias=False),
            )
            for _ in range(2)
        )  # fmt: skip
        self.norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(torch.relu(self.norm(x)).mean((2, 3)))


def _plain(kind: type[nn.Module], size: int) -> Callable[[], Built]:
    def build() -> Built:
        torch.manual_seed(0)
        return perturb(kind()), images(size)

    return build


_LABELS = {"num_labels": 7}

FAMILIES: dict[str, Callable[[], Built]] = {
    "resnet_basic": _classifier(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic", **_LABELS
        )
    ),
    "resnet_bottleneck": _classifier(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], **_LABELS)
    ),
    "mobilenet_v2": _classifier(
        transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.25, min_depth=4, depth_divisible_by=4, **_LABELS),
    ),
    "regnet_x": _classifier(
        transformers.RegNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8, layer_type="x", **_LABELS
        )
    ),
    "regnet_y": _classifier(
        transformers.RegNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8, layer_type="y", **_LABELS
        )
    ),
    "vit": _classifier(
        transformers.ViTConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=32,
            patch_size=8, **_LABELS,
        )
    ),
    "convnext": _classifier(
        transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], image_size=32, **_LABELS)
    ),
    "swin": _classifier(
        transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=12, depths=[2, 1], num_heads=[2, 3], window_size=4, **_LABELS
        )
    ),
    "darts": _classifier(
        DartsConfig(
            genotype={
                "normal": [
                    [["sep_conv_3x3", 0], ["max_pool_3x3", 1]], [["skip_connect", 0], ["dil_conv_5x5", 2]],
                ],
                "reduce": [
                    [["avg_pool_3x3", 0], ["skip_connect", 1]], [["sep_conv_5x5", 2], ["dil_conv_3x3", 1]],
                ],
            },
            num_cells=3, width=8, stem_multiplier=2, **_LABELS,
        )
    ),
    "timm_resnet": _timm("resnet18", 32, channels=[8, 8, 16, 16], stem_width=8),
    "timm_vit": _timm(
        "vit_tiny_patch16_224", 32, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3
    ),
    "timm_densenet": _timm("densenet121", 32, growth_rate=4, block_config=(2, 2)),
    "plain_cnn": _plain(PlainCnn, 16),
    "plain_dense": _plain(PlainDense, 12),
    "plain_preactivation": _plain(PlainPreActivation, 12),
}  # fmt: skip

_TINY_VIT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "image_size": 32,
    "patch_size": 8, **_LABELS,
}  # fmt: skip

MORE_FAMILIES: dict[str, Callable[[], Built]] = {
    "deit": _classifier(transformers.DeiTConfig(architectures=["DeiTForImageClassification"], **_TINY_VIT)),
    "dinov2": _classifier(transformers.Dinov2Config(mlp_ratio=2, **_TINY_VIT)),
    "dinov2_swiglu": _classifier(transformers.Dinov2Config(mlp_ratio=2, use_swiglu_ffn=True, **_TINY_VIT)),
    "dinov2_registers": _classifier(transformers.Dinov2WithRegistersConfig(mlp_ratio=2, **_TINY_VIT)),
    "beit": _classifier(transformers.BeitConfig(use_relative_position_bias=True, **_TINY_VIT)),
    "data2vec": _classifier(transformers.Data2VecVisionConfig(use_relative_position_bias=True, **_TINY_VIT)),
    "clip": _classifier(transformers.CLIPConfig(vision_config=_TINY_VIT, **_LABELS)),
    "siglip": _classifier(transformers.SiglipConfig(vision_config=_TINY_VIT, **_LABELS)),
    "segformer": _classifier(
        transformers.SegformerConfig(
            hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4], **_LABELS
        ),
        64,
    ),
    "pvt_v2": _classifier(
        transformers.PvtV2Config(
            image_size=64, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4],
            mlp_ratios=[2, 2, 2, 2], **_LABELS,
        ),
        64,
    ),
    "swinv2": _classifier(
        transformers.Swinv2Config(
            image_size=32, patch_size=2, embed_dim=12, depths=[2, 1], num_heads=[2, 3], window_size=4, **_LABELS
        )
    ),
    "hiera": _classifier(
        transformers.HieraConfig(
            image_size=[64, 64], embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], **_LABELS
        ),
        64,
    ),
    "levit": _classifier(
        transformers.LevitConfig(
            architectures=["LevitForImageClassification"], image_size=64, hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[8, 8, 8],
            down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]], **_LABELS,
        ),
        64,
    ),
    "convnextv2": _classifier(
        transformers.ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], image_size=32, **_LABELS)
    ),
    "poolformer": _classifier(
        transformers.PoolFormerConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], **_LABELS), 64
    ),
    "swiftformer": _classifier(
        transformers.SwiftFormerConfig(image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32], **_LABELS), 64
    ),
    "mobilenet_v1": _classifier(
        transformers.MobileNetV1Config(image_size=32, depth_multiplier=0.1, min_depth=4, **_LABELS)
    ),
    "mobilevit": _classifier(
        transformers.MobileViTConfig(
            image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 12, 16, 20, 24, 28, 48], **_LABELS
        ),
        64,
    ),
    "efficientnet": _classifier(
        transformers.EfficientNetConfig(
            image_size=32, width_coefficient=0.25, depth_coefficient=1.0, hidden_dim=320, kernel_sizes=[3, 3, 5],
            in_channels=[32, 16, 24], out_channels=[16, 24, 40], strides=[1, 2, 2], num_block_repeats=[1, 2, 1],
            expand_ratios=[1, 4, 4], **_LABELS,
        )
    ),
    "bit": _classifier(
        transformers.BitConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4, **_LABELS)
    ),
    "afidaf": _classifier(
        AfidafConfig(
            stem_channels=8, hidden_sizes=[8, 12, 16, 24, 64], depths=[1, 0, 1], expand_ratio=2, fourier_groups=4,
            image_projection_groups=4, expansion_size=20, **_LABELS,
        ),
        48,
    ),
    "timm_mobilenetv3": _timm("mobilenetv3_small_050", 32),
    "timm_convnext": _timm("convnext_atto", 32, dims=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
    "timm_resnext": _timm(
        "resnext50_32x4d", 32, layers=[1, 1, 1, 1], channels=[16, 16, 32, 32], cardinality=4, base_width=16, stem_width=8
    ),
    "timm_swin": _timm(
        "swin_tiny_patch4_window7_224", 56, img_size=56, depths=[2, 1], embed_dim=12, num_heads=[2, 3]
    ),
    "timm_regnety": _timm("regnety_002", 32),
    "timm_efficientnet": _timm("lcnet_050", 32),
}  # fmt: skip
