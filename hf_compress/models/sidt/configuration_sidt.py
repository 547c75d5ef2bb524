"""Configuration of SiDT's object detector."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from hf_compress.errors import ModelError

PYRAMID_SCALES = (4.0, 2.0, 1.0, 0.5)


@strict
class SidtConfig(PreTrainedConfig):
    """Configuration of :class:`SidtForObjectDetection`: a backbone, a feature pyramid, and the head of FCOS.

    Args:
        backbone_config: configuration (or its dictionary, with ``model_type``) of anything that ``AutoBackbone`` builds.
            By default a pruned ViT of DeiT-S's size. Where the backbone gives one feature map, as plain vision
            transformers do, the pyramid is ViTDet's simple one; where it gives several, they become a feature pyramid
            network, from high to low resolution.
        pyramid_channels: width of the pyramid and of the head.
        pyramid_scales: levels of the simple pyramid, as resolution relative to the one feature map: from 4, 2, 1 and
            0.5, in falling order.
        group_size: channels of one group of the GroupNorms. Whole groups can be pruned from the head.
        head_layers: convolutions of each of the two towers of the head.
        center_sampling_radius: points up to so many strides from the centre of an object are trained to find it.
        object_range: a level with stride s is trained on objects whose farther side is between ``object_range / 2 * s``
            and ``object_range * s`` away, the first and the last level on smaller and larger ones too. FCOS: 8.
        focal_alpha, focal_gamma: of the focal loss on classes.
        initializer_range: standard deviation of the first weights of the pyramid and the head.
        prior_probability: what every class scores before any training.

    Raises:
        ModelError: when a value is impossible.
    """

    model_type = "sidt"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ["loss_dict", "hidden_states", "attentions"]  # noqa: RUF012

    backbone_config: dict | PreTrainedConfig | None = None
    pyramid_channels: int = 256
    pyramid_scales: list[float | int] | tuple[float | int, ...] = (2.0, 1.0, 0.5)
    group_size: int = 8
    head_layers: int = 4
    center_sampling_radius: float | int = 1.5
    object_range: float | int = 8.0
    focal_alpha: float = 0.25
    focal_gamma: float | int = 2.0
    initializer_range: float = 0.02
    prior_probability: float = 0.01

    def __post_init__(self, **kwargs: Any):
        self.backbone_config = _backbone_config(self.backbone_config)
        self.pyramid_scales = [float(scale) for scale in self.pyramid_scales]
        falling = self.pyramid_scales and self.pyramid_scales == sorted(set(self.pyramid_scales), reverse=True)
        possible = {
            "pyramid_scales": (
                falling and set(self.pyramid_scales) <= set(PYRAMID_SCALES),
                "from 4, 2, 1, 0.5, falling",
            ),
            "group_size": (1 <= self.group_size <= 1024, "1 to 1024"),
            "pyramid_channels": (
                1 <= self.pyramid_channels <= 2**14 and self.pyramid_channels % max(1, self.group_size) == 0,
                f"a multiple of group_size={self.group_size}, up to {2**14}",
            ),
            "head_layers": (0 <= self.head_layers <= 16, "0 to 16"),
            "center_sampling_radius": (0 < self.center_sampling_radius < math.inf, "a positive number"),
            "object_range": (0 < self.object_range < math.inf, "a positive number"),
            "focal_alpha": (0 < self.focal_alpha < 1, "between 0 and 1"),
            "focal_gamma": (0 <= self.focal_gamma < math.inf, "0 or more"),
            "initializer_range": (0 < self.initializer_range < math.inf, "a positive number"),
            "prior_probability": (0 < self.prior_probability < 1, "between 0 and 1"),
        }
        for name, (is_possible, what) in possible.items():
            if not is_possible:
                raise ModelError(f"SidtConfig: {name}={getattr(self, name)} is not possible; give {what}.")
        super().__post_init__(**kwargs)
        if (self.num_labels or 0) < 1:
            raise ModelError("SidtConfig: num_labels=0 is not possible; a detector needs at least one class.")


def _backbone_config(received: Any) -> PreTrainedConfig:
    if received is None:
        from ..pruned_vit import PrunedViTConfig

        return PrunedViTConfig(hidden_size=384, num_attention_heads=6, interpolate_pos_encoding=True)
    if isinstance(received, PreTrainedConfig):
        config = received
    else:
        kind = received.get("model_type")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise ModelError(
                f"SidtConfig: backbone_config has model_type={kind!r}, which transformers does not know. Give a backbone's "
                "configuration, such as PrunedViTConfig, SwinConfig, Dinov2Config or TimmBackboneConfig."
            )
        config = CONFIG_MAPPING[kind].from_dict(received)
    if not hasattr(config, "out_indices"):
        raise ModelError(
            f"SidtConfig: backbone_config is a {type(config).__name__}, which is no backbone's configuration. Possible: "
            "those of AutoBackbone, such as PrunedViTConfig, SwinConfig, Dinov2Config, VitDetConfig, TimmBackboneConfig."
        )
    return config


__all__ = ["SidtConfig"]
